"""Forgetting: the memory, what derives from it, and every byte of both; what stays is a tombstone without a word."""

import dataclasses
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable

from agentlab.errors import StorageError
from agentlab.memory.core import Core
from agentlab.memory.echo import SAME, content_words, repeats, unframed
from agentlab.memory.records import MemoryItem
from agentlab.memory.schema import damaged
from agentlab.memory.store import unknown
from agentlab.memory.words import STOP_WORDS, sentences, signature, tokens

_NEAR = 0.3  # share of a sentence's words that a memory must have to be compared with it in earnest


def forget(core: Core, memory_ids: Iterable[str], reason: str) -> list[str]:
    """Forget memories and what derives from them; the ids that went, in the order they were found.

    Derived are: what names them as its source, turns that contain their text, the agent's answers to them or with a
    word that only they had, and the sentences of summaries made of such turns. What shares nothing with them stays.
    """
    asked = list(dict.fromkeys(memory_ids))
    for memory_id in asked:
        if core.store.row_of(memory_id) is None:
            raise unknown(core.path, memory_id)
    if not asked:
        return []
    now = time.time()
    with core.changing() as (index, generation):
        gone, turns = _closure(core, asked)
        rows = []
        for memory_id in gone:
            row = core.store.row_of(memory_id)
            if row is None:
                continue
            kind = core.store.db.execute("SELECT memory_type FROM memories WHERE id = ?", (row,)).fetchone()[0]
            core.store.delete([row])
            core.store.bury(memory_id, row, generation, kind, now, reason)
            rows.append(row)
        _drop_rows(core, gone, turns)
        # a deleted entry's words stay in FTS5's segments until they are merged
        core.store.db.execute("INSERT INTO text_index(text_index) VALUES ('optimize')")
        core.store.owe_purge()
        for row in rows:
            index.bury(row)
    core.unhear(set(rows))
    try:
        core.store.purge()
    except StorageError as error:
        raise StorageError(
            f"forgotten, but traces stay in {core.path} until there is room to rewrite it ({error})"
        ) from error
    return gone


def forget_session(core: Core, session_id: str, reason: str) -> list[str]:
    """Forget a session: its memories, turns, summary and context; the memory ids that went."""
    ids = [item.memory_id for item in core.store.items("session_id = ?", (session_id,)).values()]
    with core.store.writing() as db:
        core.store.owe_purge()
        db.execute("DELETE FROM turns WHERE session_id = ?", (session_id,))
        db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))
    if ids:
        return forget(core, ids, reason)
    core.store.purge()
    return []


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A turn as forgetting looks at it: its texts, the ids it was answered with, told, or told again."""

    number: int
    said: str
    answered: str
    used: list[str]
    told: list[str]
    echoes: list[str]

    @functools.cached_property
    def sentences(self) -> list[tuple[str, bytes, set[str]]]:
        """(sentence, its signature, its content words) of all that was said."""
        found = [*sentences(self.said), *sentences(self.answered)]
        return [(sentence, signature(sentence), set(content_words(unframed(sentence)))) for sentence in found]


class _Turns:
    """All turns, read once, by the ids that they name and the words that they have."""

    def __init__(self, core: Core) -> None:
        self._by_id: dict[str, list[_Turn]] = {}
        self._by_word: dict[str, list[int]] = {}  # numbers of sentences
        self._sentences: list[tuple[_Turn, int]] = []  # the turn and how many words it has
        # a text that is a memory of its own is found by that, so its words need not be looked at
        own = (
            "EXISTS (SELECT 1 FROM json_each(memory_ids) j JOIN memories m ON m.memory_id = j.value WHERE content = {})"
        )
        columns = "id, conversation_id, user_input, agent_response, context_used, memory_ids, echoes"
        rows = core.store.db.execute(
            f"SELECT {columns}, {own.format('user_input')}, {own.format('agent_response')} FROM turns"
        )
        for number, conversation_id, said, answered, *lists, said_own, answered_own in rows:
            try:
                turn = _Turn(number, said, answered, *(json.loads(part) for part in lists))
            except ValueError:
                raise damaged(core.path, f"turn {conversation_id} holds something that is not JSON") from None
            for memory_id in {*turn.used, *turn.told, *turn.echoes}:
                self._by_id.setdefault(memory_id, []).append(turn)
            loose = [text for text, known in ((said, said_own), (answered, answered_own)) if not known]
            for sentence in itertools.chain.from_iterable(map(sentences, loose)):
                words = _words(sentence)
                for word in words:
                    self._by_word.setdefault(word, []).append(len(self._sentences))
                self._sentences.append((turn, len(words)))

    def near(self, item: MemoryItem) -> list[_Turn]:
        """Turns that name a memory or may repeat it: one with an echo beside news does not name what it echoes."""
        found = {turn.number: turn for turn in self.naming(item.memory_id)}
        shared = Counter(itertools.chain.from_iterable(self._by_word.get(word, ()) for word in _words(item.content)))
        for number, count in shared.items():
            turn, size = self._sentences[number]
            if count >= _NEAR * size:
                found[turn.number] = turn
        return [found[number] for number in sorted(found)]

    def naming(self, memory_id: str) -> list[_Turn]:
        return self._by_id.get(memory_id, [])


def _words(text: str) -> set[str]:
    """Words and, of a script without spaces, pairs of characters."""
    found = set(tokens(text)) - STOP_WORDS
    return found | {token[i : i + 2] for token in found if not token.isascii() for i in range(len(token) - 1)}


def _closure(core: Core, asked: list[str]) -> tuple[list[str], set[int]]:
    """Memory ids and turn numbers that go, starting from `asked`."""
    talk = _Turns(core)
    gone: dict[str, MemoryItem] = {}
    rows: set[int] = set()  # of what goes
    turns: set[int] = set()
    answers: dict[str, None] = {}  # what the agent answered to something that goes
    queue = list(asked)
    while queue:
        memory_id = queue.pop(0)
        row = core.store.row_of(memory_id)
        if row is not None and memory_id not in gone:
            item = gone[memory_id] = core.store.item_of(row)
            rows.add(row)
            queue += core.store.derived_of(memory_id)
            for turn in talk.near(item):
                if (answer := _tells(core, turn, item, gone)) is None:
                    continue
                turns.add(turn.number)
                for other in _memories(core, turn.told, gone):
                    if answer and other.source != "person":
                        answers[other.memory_id] = None
                    if _only_from(core, item, other, rows):
                        queue.append(other.memory_id)
        if not queue:
            # an answer that other turns gave too, like "I will remember that.", is not about what is forgotten
            queue = [
                one for one in answers if one not in gone
                and all(turn.number in turns for turn in talk.naming(one) if one in turn.told + turn.echoes)
            ]  # fmt: skip
    return list(gone), turns


def _tells(core: Core, turn: _Turn, item: MemoryItem, gone: Iterable[str]) -> bool | None:
    """None where a turn does not contain the text of `item`; else whether its answer is one to that."""
    if item.memory_id in turn.told:
        return True
    if item.memory_id in turn.used and _leaks(core, turn, item, gone):
        return True
    words, marks = set(content_words(item.content)), {signature(sentence) for sentence in sentences(item.content)}
    same = [
        mark for sentence, mark, said in turn.sentences
        if mark in marks or (len(said & words) >= SAME * len(said) and repeats(sentence, item.content))
    ]  # fmt: skip
    if same:  # what the turn told by itself stays with the turn, as in another session
        others = _memories(core, [*turn.told, *turn.echoes], gone)
        own = {signature(sentence) for other in others for sentence in sentences(other.content)}
        if set(same) - own:
            return False
    return None


def _leaks(core: Core, turn: _Turn, item: MemoryItem, gone: Iterable[str]) -> bool:
    """Whether an answer has a word of the forgotten memory that neither the question nor its context that stays had."""
    known = set(content_words(turn.said))
    for other in _memories(core, turn.used, gone):
        known |= set(content_words(other.content))
    return bool(set(content_words(item.content)) & set(content_words(turn.answered)) - known)


def _only_from(core: Core, item: MemoryItem, other: MemoryItem, rows: set[int]) -> bool:
    """Whether `other` has a word of `item` that no memory but these and those that go, at `rows`, has."""
    known = {*rows, core.store.row_of(other.memory_id)}
    shared = set(content_words(item.content)) & set(content_words(other.content))
    return any(not core.store.rows_with(word) - known for word in shared)


def _memories(core: Core, memory_ids: Iterable[str], without: Iterable[str]) -> list[MemoryItem]:
    """The memories with these ids that are there and intact."""
    rows = [core.store.row_of(memory_id) for memory_id in memory_ids if memory_id not in without]
    return list(core.store.items_of(row for row in rows if row is not None).values())


def _drop_rows(core: Core, gone: list[str], turns: set[int]) -> None:
    db = core.store.db
    dropped = set(gone)
    for memory_id in gone:
        db.execute("DELETE FROM sources WHERE derived = ? OR source = ?", (memory_id, memory_id))
        db.execute("DELETE FROM knowledge WHERE knowledge_id = ?", (memory_id,))
    for knowledge_id, related in db.execute("SELECT knowledge_id, relationships FROM knowledge").fetchall():
        kept = [other for other in json.loads(related) if other not in dropped]
        db.execute("UPDATE knowledge SET relationships = ? WHERE knowledge_id = ?", (json.dumps(kept), knowledge_id))
    conversations = set()
    for number in turns:
        (conversation,) = db.execute("SELECT conversation_id FROM turns WHERE id = ?", (number,)).fetchone()
        conversations.add(conversation)
        db.execute("DELETE FROM turns WHERE id = ?", (number,))
    for session, active, summary in db.execute("SELECT session_id, active_memories, summary FROM sessions").fetchall():
        ids = [memory_id for memory_id in json.loads(active) if memory_id not in dropped]
        parts = [part for part in json.loads(summary) if not conversations & set(part["sources"])]
        db.execute(
            "UPDATE sessions SET active_memories = ?, summary = ? WHERE session_id = ?",
            (json.dumps(ids), json.dumps(parts, ensure_ascii=False), session),
        )
