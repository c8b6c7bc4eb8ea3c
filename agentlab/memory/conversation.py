"""One session's talk: the last turns word for word, the older ones as a summary with its sources, across restarts."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from agentlab.errors import MemoryStoreError
from agentlab.memory import consolidation, forgetting, sealed, writing
from agentlab.memory.compression import Context, Part, count_tokens, extract, fit
from agentlab.memory.core import Core
from agentlab.memory.records import (
    ConversationItem,
    SessionContext,
    check_metadata,
    check_number,
    check_share,
    check_string,
    check_tags,
    check_text,
    check_time,
)

if TYPE_CHECKING:
    from agentlab.memory.memory import Memory

WINDOW = 50  # turns kept word for word
SUMMARY_AT = 2_000  # tokens of the turns in the window, above which the older half of them is summarised
SUMMARY_LIMIT = 500  # tokens of the summary
_ACTIVE = 20

Summariser = Callable[[Sequence[ConversationItem]], str]
_FIELDS = tuple(field.name for field in dataclasses.fields(ConversationItem))


class Conversation:
    """A session of a memory, continued where it was left: `memory.conversation("s1")`.

    summariser: turns → their summary, called with the older turns when the window passes `SUMMARY_AT` tokens; without
    one the most telling sentences are kept as they were said. tokens: how the window's tokens are counted.
    """

    def __init__(
        self, core: Core, memory: "Memory", session_id: str, user_id: str, summariser: Summariser | None,
        tokens: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._core = core
        self._memory = memory
        self.session_id = check_text("session_id", session_id)
        self._user_id = check_string("user_id", user_id)
        if not callable(tokens) or not (summariser is None or callable(summariser)):
            raise MemoryStoreError(f"tokens: {tokens!r:.80}, summariser: {summariser!r:.80}; allowed: functions")
        self._summariser = summariser
        self._tokens = tokens

    def _begin(self) -> sealed.Row:
        """The session's row, made where it is not there: it is new, or was forgotten since this object was made."""
        store = self._core.store
        if (found := sealed.row(store, "sessions", self.session_id)) is None:
            found = self._empty()
            sealed.insert(store.db, "sessions", found)
        if self._user_id:
            sealed.change(store, "sessions", self.session_id, user_id=self._user_id)
        return found

    def _empty(self) -> sealed.Row:
        now = time.time()
        return sealed.empty_session(self.session_id, self._user_id, now, now)

    def add(
        self, user_input: str, agent_response: str, *, context_used: Sequence[str] = (), tags: Sequence[str] = (),
        importance_score: float = 0.5, metadata: dict[str, Any] | None = None, timestamp: float | None = None,
        agent: str = "", notes: Sequence[str] = (), cut_off: bool = False,
    ) -> ConversationItem:  # fmt: skip
        """The turn, stored with what it tells: the person's words and the agent's, echoes left out, as memories.

        notes: ids of memories that the agent made in this turn; they are forgotten and taken back with it. cut_off: the
        agent did not finish what it was saying, so its words are a part of the talk and no memory.
        Raises MemoryStoreError, and keeps nothing of the turn, when something it was answered with, or something that
        it told, was forgotten meanwhile: what is forgotten would come back in other words.
        """
        now = time.time() if timestamp is None else check_time("timestamp", timestamp)
        context_used, notes = check_tags(context_used, "context_used"), check_tags(notes, "notes")
        check_string("agent", agent)
        item = ConversationItem(
            conversation_id=writing.new_id("c"), session_id=self.session_id, timestamp=now,
            user_input=check_text("user_input", user_input),
            agent_response=check_text("agent_response", agent_response),
            context_used=list(context_used), importance_score=check_share("importance_score", importance_score),
            tags=check_tags(tags), metadata=check_metadata(metadata or {}),
        )  # fmt: skip
        if self._core.store.buried([*context_used, *notes]):  # before anything of it is written
            self._take_back(list(notes), [])
        common: dict[str, Any] = {"session_id": self.session_id, "tags": tags, "created_at": now}
        told = [writing.tell(self._core, user_input, source="person", **common)]
        if not cut_off:
            told.append(writing.tell(self._core, agent_response, source="agent", source_name=agent, **common))
        # what was an echo or merged belongs to the turn or session that told it first
        own = list(dict.fromkeys([*(one.memory_id for one in told if one.how == "new"), *notes]))
        others = [one for one in told if one.memory_id not in own]
        echoes = list(dict.fromkeys(one.memory_id for one in others))
        retold = [one.memory_id for one in others if one.how == "merged"]
        with self._core.store.writing() as db:
            forgotten = self._core.store.buried([*context_used, *own, *echoes])
            if not forgotten:
                row = {**{name: getattr(item, name) for name in _FIELDS}, "memory_ids": own, "echoes": echoes}
                sealed.insert(db, "turns", {**row, "retold": retold})
                active = [one for one in self._begin()["active_memories"] if one not in context_used]
                active = [*active, *dict.fromkeys(context_used)][-_ACTIVE:]
                sealed.change(
                    self._core.store, "sessions", self.session_id, last_activity=now, active_memories=active
                )  # fmt: skip
        if forgotten:
            self._take_back(own, retold)
        self._summarise()
        return item

    def _take_back(self, own: list[str], retold: list[str]) -> None:
        forgetting.take_back(self._core, own, retold, self.session_id)
        raise MemoryStoreError(
            f"what this turn of {self.session_id!r} was answered with or told was forgotten meanwhile; it is not kept"
        )

    def undo(self) -> ConversationItem | None:
        """Take back the last turn, and forget what was remembered of it; None where there is none.

        Turns that the summary covers stay: what was made of them cannot be taken apart. Other turns stay, also those
        that say the same; what the turn told again counts as told once less.
        """
        rows = self._open_rows()
        if not rows:
            return None
        last = rows[-1]
        forgetting.take_back(self._core, last["memory_ids"], last["retold"], self.session_id, last["id"])
        return _turn(rows[-1])

    def turns(self, last: int = WINDOW) -> list[ConversationItem]:
        """The last turns, oldest first."""
        newest = f"id DESC LIMIT {check_number('last', last, 0)}"
        rows = sealed.rows(self._core.store, "turns", "session_id = ?", (self.session_id,), order=newest)
        return [_turn(row) for row in reversed(rows)]

    def window(self) -> list[ConversationItem]:
        """The turns that the summary does not cover, at most `WINDOW`, oldest first."""
        return [_turn(row) for row in self._open_rows()][-WINDOW:]

    def summary(self) -> list[Part]:
        """The summary's parts, oldest first, each with the ids of the turns that it is made of."""
        found = sealed.rows(self._core.store, "sessions", "session_id = ?", (self.session_id,))
        return [Part(part["text"], part["sources"]) for row in found for part in row["summary"]]

    def memories_of(self, conversation_ids: Iterable[str]) -> list[str]:
        """Ids of the memories that these turns told or repeated and that are not forgotten, oldest first."""
        asked = (json.dumps(check_tags(conversation_ids, "conversation_ids")),)
        with self._core.store.reading():
            rows = sealed.rows(
                self._core.store, "turns", "conversation_id IN (SELECT value FROM json_each(?))", asked, order="id"
            )  # fmt: skip
            ids = list(dict.fromkeys(one for row in rows for one in [*row["memory_ids"], *row["echoes"]]))
            gone = self._core.store.buried(ids)
        return [memory_id for memory_id in ids if memory_id not in gone]

    def session(self) -> SessionContext:
        """The session as it stands; before its first turn, which stores it, it is empty."""
        with self._core.store.reading():
            found = sealed.row(self._core.store, "sessions", self.session_id)
            return _context(self._core, found or self._empty())

    def prefer(self, /, **preferences: Any) -> None:
        """Set preferences of the session; None removes one."""
        with self._core.store.writing():
            merged = {**self._begin()["preferences"], **preferences}
            merged = check_metadata({key: value for key, value in merged.items() if value is not None})
            sealed.change(self._core.store, "sessions", self.session_id, preferences=merged)

    def context(self, query: str, budget_tokens: int, *, k: int = 5, **filters: Any) -> Context:
        """What an answer to `query` should see, in at most `budget_tokens`: newest turns, memories, summary.

        Long memories are cut to the sentences that share most with the query; what does not fit is left out, the
        newest turn last. `Context.used` are the ids of the memories in it, for `add(context_used=…)`.
        """
        check_number("budget_tokens", budget_tokens, 0)
        hits = self._memory.recall(query, k, **filters)
        return fit(query, budget_tokens, self.window(), hits, self.summary(), self._tokens)

    # -- summarising --------------------------------------------------------------------------------------------------

    def _open_rows(self) -> list[sealed.Row]:
        return sealed.rows(
            self._core.store, "turns",
            "session_id = ?1 AND id > (SELECT summarised FROM sessions WHERE session_id = ?1)", (self.session_id,),
            order="id",
        )  # fmt: skip

    def _summarise(self) -> None:
        rows = self._open_rows()
        sizes = [self._tokens(row["user_input"]) + self._tokens(row["agent_response"]) for row in rows]
        over = max(0, len(rows) - WINDOW)
        if sum(sizes) > SUMMARY_AT:
            # half of the room is made free at once, so that not every turn summarises again
            while len(rows) - over > 1 and sum(sizes[over:]) > SUMMARY_AT // 2:
                over += 1
        if not over:
            return
        folded = [_turn(row) for row in rows[:over]]
        before = self.summary()
        parts = self._shortened(before, folded)
        with self._core.store.writing() as db:
            # only if nobody summarised meanwhile, or forgot a turn that the summary is made of: it would live on there
            found = sealed.row(self._core.store, "sessions", self.session_id)
            marks = ", ".join("?" * over)
            there = f"SELECT count(*) FROM turns WHERE id IN ({marks})"
            (left,) = db.execute(there, [row["id"] for row in rows[:over]]).fetchone()
            last = rows[over - 1]["id"]
            mine = bool(found and found["summarised"] < last and found["summary"] == _plain(before) and left == over)
            if mine:
                sealed.change(
                    self._core.store, "sessions", self.session_id, summary=_plain(parts), summarised=last
                )  # fmt: skip

        if mine:
            self._core.aside(lambda: self._consolidate(rows[:over]), "what was told more than once is no knowledge yet")

    def _consolidate(self, folded: list[sealed.Row]) -> None:
        """Make knowledge of what the turns that left the window told and somebody told before, here or elsewhere."""
        ids = dict.fromkeys(one for row in folded for one in [*row["memory_ids"], *row["retold"]])
        found = [self._core.store.row_of(memory_id) for memory_id in ids]
        consolidation.consolidate_rows(self._core, [row for row in found if row is not None])

    def _shortened(self, before: list[Part], folded: list[ConversationItem]) -> list[Part]:
        if self._summariser is None:
            return extract([*before, *_said(folded)], SUMMARY_LIMIT, self._tokens)
        parts = [*before, Part(self._summary_of(folded), [turn.conversation_id for turn in folded])]
        if sum(self._tokens(part.text) for part in parts) > SUMMARY_LIMIT and len(parts) > 1:
            sources = list(dict.fromkeys(source for part in parts for source in part.sources))
            turns = [turn for turn in self.turns(10**9) if turn.conversation_id in set(sources)]
            parts = [Part(self._summary_of(turns), sources)]
        return parts

    def _summary_of(self, turns: list[ConversationItem]) -> str:
        """What the summariser says; what the turns say where it says nothing that can be kept."""
        assert self._summariser is not None
        with contextlib.suppress(MemoryStoreError):
            return check_text("a summary", self._summariser(turns))
        return " ".join(part.text for part in extract(_said(turns), SUMMARY_LIMIT, self._tokens))


def sessions(core: Core) -> list[SessionContext]:
    """The stored contexts of all sessions, the last active first."""
    with core.store.reading():
        found = sealed.rows(core.store, "sessions", order="last_activity DESC, session_id")
        return [_context(core, row) for row in found]


def _context(core: Core, row: sealed.Row) -> SessionContext:
    count = "SELECT count(*) FROM turns WHERE session_id = ?"
    (turns,) = core.store.db.execute(count, (row["session_id"],)).fetchone()
    names = ("session_id", "user_id", "start_time", "last_activity", "active_memories", "preferences")
    summary = " ".join(part["text"] for part in row["summary"])
    return SessionContext(**{name: row[name] for name in names}, conversation_count=turns, summary=summary)


def _turn(row: sealed.Row) -> ConversationItem:
    return ConversationItem(**{name: row[name] for name in _FIELDS})


def _said(turns: Sequence[ConversationItem]) -> list[Part]:
    return [Part(text, [turn.conversation_id]) for turn in turns for text in (turn.user_input, turn.agent_response)]


def _plain(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [{"text": part.text, "sources": part.sources} for part in parts]


__all__ = ["Conversation", "Summariser", "count_tokens", "sessions"]
