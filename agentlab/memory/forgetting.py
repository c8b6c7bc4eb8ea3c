"""Forgetting: the memory, what derives from it, and every byte of both; what stays is a tombstone without a word."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from agentlab.errors import StorageError
from agentlab.memory import consolidation, sealed, tellings, writing
from agentlab.memory.core import Core
from agentlab.memory.index import Index
from agentlab.memory.records import MemoryItem
from agentlab.memory.resembling import SAME, content_words, names, resembles
from agentlab.memory.saying import unframed
from agentlab.memory.store import unknown
from agentlab.memory.words import STOP_WORDS, sentences, signature, terms, tokens

_NEAR = 0.3  # share of a sentence's words that a memory must have to be compared with it in earnest
_NO_TRACES = STOP_WORDS.union(terms("true false yes no none null not never cannot without nothing nobody"))


def forget(core: Core, memory_ids: Iterable[str], reason: str, *, session_id: str | None = None) -> list[str]:
    """Forget memories, or a whole session, and what derives from them; the memory ids that went, as they were found.

    What another session told, too, stays with that one.

    Derived are: what names them as its source, turns that contain their text, the agent's answers to them or with a
    word that only they had, and the sentences of summaries made of such turns. What shares nothing with them stays.
    Knowledge that loses a source is made anew of the sources that stay, where these suffice.
    """
    asked = list(dict.fromkeys(memory_ids))
    for memory_id in asked:
        if core.store.row_of(memory_id) is None:
            raise unknown(core.path, memory_id)
    if not asked and session_id is None:
        return []
    with core.changing() as (index, generation):
        numbers: set[int] = set()
        shared: list[str] = []
        if session_id is not None:
            alone, shared = tellings.told_in(core.store, session_id)
            asked = list(dict.fromkeys([*alone, *asked]))
            numbers = {row["id"] for row in sealed.rows(core.store, "turns", "session_id = ?", (session_id,))}
        gone, turns = closure(core, asked, leaving=session_id)
        if session_id is not None:
            for memory_id in shared:
                if memory_id not in gone and (row := core.store.row_of(memory_id)) is not None:
                    item = tellings.leave(core.store, row, session_id, generation)
                    writing.refresh(core, index, row, item)
                    consolidation.recount(core, index, generation, memory_id)
        dropped = drop(core, index, generation, gone, turns | numbers, reason)
        if session_id is not None:
            core.store.db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))
            core.store.bury(session_mark(session_id), 0, generation, "session", time.time(), "")
    finish(core, dropped)
    return [*gone, *dropped.weak]


def take_back(
    core: Core, own: Sequence[str], retold: Sequence[str], session_id: str, turn: int | None = None
) -> None:  # fmt: skip
    """Undo one turn, or what one told that is not stored: its memories go with what derives from them.

    Nothing else goes, however much it says the same. own: those that it told first; what was told again since, by
    whomever, stays and counts once less. retold: memories that it told again, which count once less, too. turn: the
    turn's number.
    """
    with core.changing() as (index, generation):
        numbers = set() if turn is None else {turn}
        there = core.store.items("memory_id IN (SELECT value FROM json_each(?))", (json.dumps(list(own)),)).values()
        asked = [item.memory_id for item in there if item.validation_count == 1]
        again = [item.memory_id for item in there if item.validation_count > 1]
        gone, _ = closure(core, asked, Within(numbers, None, frozenset(again)))
        less = [(one, session_id) for one in [*again, *(retold if turn is None else ())]]
        dropped = drop(core, index, generation, gone, numbers, "taken back", less)
    finish(core, dropped)


@dataclasses.dataclass(frozen=True)
class Within:
    """What may go beside what was asked for: turns by number, memories by id (None: any) but for those that stay."""

    turns: set[int]
    memories: set[str] | None
    stay: frozenset[str] = frozenset()

    def has(self, memory_id: str) -> bool:
        return memory_id not in self.stay and (self.memories is None or memory_id in self.memories)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Row ids of memories that went, and of those that stay of knowledge that went; ids of what is none any more."""

    rows: set[int]
    left: list[int]
    weak: list[str]


def session_mark(session_id: str) -> str:
    """What a tombstone calls a session: its name may be a word of what was forgotten."""
    return f"s-{hashlib.sha256(session_id.encode()).hexdigest()[:32]}"


def drop(
    core: Core, index: Index, generation: int, gone: Mapping[str, MemoryItem], turns: set[int], reason: str,
    less: Iterable[tuple[str, str]] = (),
) -> Dropped:  # fmt: skip
    """Delete memories and turns and leave tombstones, inside `changing`; `finish` belongs after it.

    less: memories that are told once less in a session, for each time that they are named, beside what the turns told
    again. Knowledge that nobody tells twice any more goes, too.
    """
    store, now = core.store, time.time()
    talk = sealed.rows(store, "turns", f"id IN ({', '.join(map(str, turns))})")
    less = [*less, *((memory_id, row["session_id"]) for row in talk for memory_id in row["retold"])]
    stay = []
    for memory_id in gone:
        sources = store.sources_of(memory_id) if sealed.row(store, "knowledge", memory_id) is not None else []
        if set(sources) & gone.keys():  # else the knowledge itself is to be forgotten, and is not made anew
            stay += [source for source in sources if source not in gone]
    weak = _lose(core, index, generation, gone, [one for one in less if one[0] not in gone])
    everything = {**gone, **weak}
    told = _words_told(core, everything)
    reason = _without_words_of(reason, gone.values())
    rows = set()
    for memory_id, item in everything.items():
        row = store.row_of(memory_id)
        if row is None:
            continue
        store.delete([row])
        store.bury(memory_id, row, generation, item.memory_type, now, reason)
        for alias in sealed.rows(store, "aliases", "stands_for = ?", (memory_id,)):  # the same words, another id
            store.bury(alias["memory_id"], 0, generation, item.memory_type, now, reason)
        rows.add(row)
    for turn in talk:
        store.db.execute("DELETE FROM turns WHERE id = ?", (turn["id"],))
        store.bury(turn["conversation_id"], 0, generation, "turn", now, "")
    _drop_names(core, everything, {turn["conversation_id"] for turn in talk}, told)
    left = [row for row in map(store.row_of, dict.fromkeys(stay)) if row is not None]
    store.db.executemany("UPDATE memories SET generation = ? WHERE id = ?", [(generation, row) for row in left])
    # a deleted entry's words stay in FTS5's segments until they are merged
    store.db.execute("INSERT INTO text_index(text_index) VALUES ('optimize')")
    store.owe_purge()
    for row in rows:
        index.bury(row)
    return Dropped(rows, left, list(weak))


def _lose(
    core: Core, index: Index, generation: int, gone: Mapping[str, MemoryItem], less: Sequence[tuple[str, str]]
) -> dict[str, MemoryItem]:  # fmt: skip
    """Take out of memories that stay what derived from those that go, and what is taken back of their tellings.

    What others told of them directly is left. Returns the knowledge that nobody tells twice any more.
    """
    store = core.store
    bereft = {derived for memory_id in gone for derived in store.derived_of(memory_id)} - gone.keys()
    for memory_id in gone:
        store.db.execute("DELETE FROM sources WHERE source = ?", (memory_id,))
    for memory_id in sorted(bereft):
        row = store.row_of(memory_id)
        if row is None or tellings.is_knowledge(store, memory_id):
            continue
        if _told_by_itself(core, memory_id, None):
            left = tellings.leave(store, row, store.item_of(row).session_id or "", generation)
            writing.refresh(core, index, row, left)
    for memory_id, session_id in less:
        if (row := store.row_of(memory_id)) is not None:
            writing.refresh(core, index, row, tellings.once_less(store, row, session_id, generation))
            bereft |= {memory_id, *store.derived_of(memory_id)}
    weak = {}
    for memory_id in sorted(bereft - gone.keys()):
        row = store.row_of(memory_id)
        if row is not None and not consolidation.recount(core, index, generation, memory_id):
            weak[memory_id] = store.item_of(row)
            for derived in store.derived_of(memory_id):  # which goes with what tells it now
                sealed.link(store.db, derived, store.sources_of(memory_id))
    return weak


def finish(core: Core, dropped: Dropped) -> None:
    """Rewrite the file without what was dropped, and make knowledge anew of what stays of it."""
    core.unhear(dropped.rows)
    core.aside(lambda: consolidation.consolidate_rows(core, dropped.left), "what stays of some knowledge is none yet")
    try:
        core.store.purge()
    except StorageError as error:
        raise StorageError(
            f"forgotten, but traces stay in {core.path} until there is room to rewrite it ({error})"
        ) from error


def _without_words_of(reason: str, gone: Iterable[MemoryItem]) -> str:
    """`reason` with … for each word that a forgotten text has: a tombstone keeps none of them."""
    known = {
        word for item in gone for text in (item.content, item.session_id or "", *item.tags)
        for word in content_words(text)
    }  # fmt: skip
    return "".join("…" if known & set(content_words(part)) else part for part in re.split(r"(\s+)", reason))


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

    def __init__(self, core: Core, within: Within | None) -> None:
        self._by_id: dict[str, list[_Turn]] = {}
        self._by_word: dict[str, list[int]] = {}  # numbers of sentences
        self._sentences: list[tuple[_Turn, int]] = []  # the turn and how many words it has
        # what a person said and is a memory of its own is found by that, so its words need not be looked at
        own = """
            EXISTS (SELECT 1 FROM json_each(memory_ids) j JOIN memories m ON m.memory_id = j.value
                    WHERE content = user_input)
        """
        which = "1" if within is None else f"id IN ({', '.join(map(str, within.turns))})"
        own_texts = dict(core.store.db.execute(f"SELECT id, {own} FROM turns WHERE {which}"))
        for row in sealed.rows(core.store, "turns", which):
            said, answered = row["user_input"], row["agent_response"]
            turn = _Turn(row["id"], said, answered, row["context_used"], row["memory_ids"], row["echoes"])
            for memory_id in {*turn.used, *turn.told, *turn.echoes}:
                self._by_id.setdefault(memory_id, []).append(turn)
            loose = [answered] if own_texts[row["id"]] else [said, answered]
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


def closure(
    core: Core, asked: Sequence[str], within: Within | None = None, leaving: str | None = None
) -> tuple[dict[str, MemoryItem], set[int]]:  # fmt: skip
    """Memories by id and numbers of turns that go, starting from `asked`; `within` limits what else may go.

    leaving: the session that is forgotten, whose tellings keep nothing.
    """
    talk = _Turns(core, within)
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
            # what was told in another session as well stays with that one, see `_lose`
            derived = [one for one in core.store.derived_of(memory_id) if within is None or within.has(one)]
            queue += [one for one in derived if not _told_by_itself(core, one, leaving)]
            for turn in talk.near(item):
                if (answer := _tells(core, turn, item, gone)) is None:
                    continue
                turns.add(turn.number)
                told = _memories(core, turn.told, gone)
                said = {core.store.row_of(other.memory_id) for other in told if other.source != "person"}
                for other in told:
                    limited = within is not None and not within.has(other.memory_id)
                    if limited or tellings.of(core.store, other.memory_id):  # another session told it as well
                        continue
                    if answer and other.source != "person":
                        answers[other.memory_id] = None
                    if _only_from(core, item, other, {*rows, *said}):
                        queue.append(other.memory_id)
        if not queue:
            # an answer that other turns gave too, like "I will remember that.", is not about what is forgotten
            queue = [
                one for one in answers if one not in gone
                and all(turn.number in turns for turn in talk.naming(one) if one in turn.told + turn.echoes)
            ]  # fmt: skip
    return gone, turns


def _told_by_itself(core: Core, memory_id: str, leaving: str | None) -> bool:
    """Whether somebody told what derives from other memories, too, but in a session that is forgotten."""
    if (row := core.store.row_of(memory_id)) is None or not tellings.of(core.store, memory_id):
        return False
    item = core.store.item_of(row)
    known = tellings.parts_of(core.store, item)
    own = None if None in known else item.session_id or ""
    return bool(known.keys() - {own, leaving, None})


def _tells(core: Core, turn: _Turn, item: MemoryItem, gone: Iterable[str]) -> bool | None:
    """None where a turn does not contain the text of `item`; else whether its answer is one to that."""
    if item.memory_id in turn.told:
        return True
    if item.memory_id in turn.used and _leaks(core, turn, item, gone):
        return True
    words, marks = set(content_words(item.content)), {signature(sentence) for sentence in sentences(item.content)}
    same = [
        (sentence, mark) for sentence, mark, said in turn.sentences
        if mark in marks or (len(said & words) >= SAME * len(said) and resembles(sentence, item.content))
    ]  # fmt: skip
    if same:  # what the person told there, or what repeats older memories, stays with those
        own = [other for other in _memories(core, turn.told, gone) if other.source == "person"]
        older = _memories(core, [*turn.echoes, *turn.used], gone)
        known = {signature(sentence) for other in [*own, *older] for sentence in sentences(other.content)}
        if any(
            mark not in known and not any(resembles(sentence, other.content) for other in older)
            for sentence, mark in same
        ):
            return False
    return None


def _leaks(core: Core, turn: _Turn, item: MemoryItem, gone: Iterable[str]) -> bool:
    """Whether an answer has a word of the forgotten memory that neither the question nor its context that stays had."""
    known = set(content_words(turn.said))
    for other in _memories(core, turn.used, gone):
        known |= set(content_words(other.content))
    return bool(set(content_words(item.content)) & set(content_words(turn.answered)) - known)


def _only_from(core: Core, item: MemoryItem, other: MemoryItem, rows: set[int | None]) -> bool:
    """Whether `other` has a word of `item` that no memory but these and those at `rows` has: that go, or answer it."""
    known = {*rows, core.store.row_of(other.memory_id)}
    shared = set(content_words(item.content)) & set(content_words(other.content))
    return any(not core.store.rows_with(word) - known for word in shared)


def _memories(core: Core, memory_ids: Iterable[str], without: Iterable[str]) -> list[MemoryItem]:
    """The memories with these ids that are there and intact."""
    rows = [core.store.row_of(memory_id) for memory_id in memory_ids if memory_id not in without]
    return list(core.store.items_of(row for row in rows if row is not None).values())


def _words_told(core: Core, gone: Mapping[str, MemoryItem]) -> dict[str, tuple[set[str], set[str]]]:
    """The words, and those of them that are names, of what goes, by the session that told it, "" for none.

    What consolidation made of talk was told where its sources were. Nothing where no session prefers anything.
    """
    found: dict[str, tuple[set[str], set[str]]] = {}
    if not core.store.db.execute("SELECT 1 FROM sessions WHERE preferences != '{}'").fetchone():
        return {}
    for item in gone.values():
        words = {word for word in content_words(item.content) if not word.isnumeric()} - _NO_TRACES
        for name in tellings.parts_of(core.store, item).keys() - {None}:
            known, named = found.setdefault(name or "", (set(), set()))
            known |= words
            named |= words.intersection(names(item.content))
    return found


def _drop_names(
    core: Core, gone: Mapping[str, MemoryItem], conversations: set[str],
    told: Mapping[str, tuple[set[str], set[str]]],
) -> None:  # fmt: skip
    """Remove what names forgotten memories and turns: relations, knowledge, sentences of summaries, preferences.

    A preference goes when it has a word of what its session told, or was told outside of any, that no memory has which
    stays. Numbers, switches and function words are no trace of anything, nor is a plain key like tone or font_size,
    unless the forgotten text has it as a name or a number-word like Zebra77. told: those words, and names, by session.
    """
    store = core.store
    for memory_id in gone:
        store.db.execute("DELETE FROM sources WHERE derived = ? OR source = ?", (memory_id, memory_id))
        store.db.execute("DELETE FROM aliases WHERE stands_for = ?", (memory_id,))
        store.db.execute("DELETE FROM knowledge WHERE knowledge_id = ?", (memory_id,))
        store.db.execute("DELETE FROM tellings WHERE memory_id = ?", (memory_id,))
    for row in sealed.rows(store, "knowledge"):
        related = [other for other in row["relationships"] if other not in gone]
        sealed.change(store, "knowledge", row["knowledge_id"], relationships=related)
    for row in sealed.rows(store, "sessions"):
        here = [told[name] for name in (row["session_id"], "") if name in told]
        words, named = (set().union(*both) for both in zip(*here, strict=True)) if here else (set(), set())
        wishes = {
            name: wish for name, wish in row["preferences"].items()
            if all(_stays(core, word) for word in _shared({name: wish}, words, named))
        }  # fmt: skip
        ids = [memory_id for memory_id in row["active_memories"] if memory_id not in gone]
        parts = [part for part in row["summary"] if not conversations & set(part["sources"])]
        sealed.change(
            store, "sessions", row["session_id"], active_memories=ids, summary=parts, preferences=wishes
        )  # fmt: skip


def _shared(preference: dict[str, Any], words: set[str], named: set[str]) -> set[str]:
    """Which of `words` a preference has, and of those that are names its plain keys."""
    found = set()
    for text, is_key in _texts(preference):
        # a Han character is a word where it stands alone, else 子供 would be a trace of 花子
        said = {word for word in content_words(text) if len(word) > 1 or word in tokens(text)}
        found |= said & (named if is_key and text.isascii() and text.islower() else words)
    return found


def _stays(core: Core, word: str) -> bool:
    """Whether a memory has a word; the index alone does not tell, because the month of a telling is in there."""
    rows = sorted(core.store.rows_with(word))
    return any(word in terms(item.content) for row in rows for item in core.store.items_of([row]).values())


def _texts(value: Any) -> Iterator[tuple[str, bool]]:
    """The texts in a value that JSON can hold, however deep, and whether each is a key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, True
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value, False
