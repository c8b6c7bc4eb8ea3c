"""Repair: everything intact comes back, what is lost is named, nobody's acknowledged write goes missing."""

from agentlab import Memory

from .helpers import HashingEmbedder, contents, open_memory


def flip(path, offset, count=1):
    data = bytearray(path.read_bytes())
    for place in range(offset, offset + count):
        data[place] ^= 0xFF
    path.write_bytes(data)


def repair(path):
    return Memory.repair(path, embedder=HashingEmbedder())


def facts(count):
    return [f"fact {i} about topic{i % 40} and place{i}" for i in range(count)]


def test_living_memories_stay_in_recall_after_a_repair(path):
    """A repair numbers rows anew, and tombstones kept the old numbers: views buried who has them now."""
    with open_memory(path) as memory:
        ids = memory.remember_many(facts(6))
        for number in range(5):
            memory.remember(f"later note number {number} about river{number}")
        memory.forget(ids[1], ids[2])
    flip(path, path.read_bytes().index(b"fact 5 about") + 3)
    repair(path)
    with open_memory(path) as memory, open_memory(path) as other:
        assert memory.recall("place3", words_only=True)
        other.remember("a new note by another process")
        for number in (0, 3, 4):
            assert contents(memory.recall(f"place{number}", k=1, words_only=True)) == [facts(6)[number]]
        assert {stone.memory_id for stone in memory.tombstones()} == {ids[1], ids[2]}
