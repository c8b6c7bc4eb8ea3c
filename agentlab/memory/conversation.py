"""One session's talk: the last turns word for word, the older ones as a summary with its sources, across restarts."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from agentlab.errors import MemoryStoreError
from agentlab.memory.compression import Context, Part, count_tokens, extract, fit
from agentlab.memory.core import Core
from agentlab.memory.records import ConversationItem, SessionContext, check_share, check_tags, check_text
from agentlab.memory.writing import new_id

if TYPE_CHECKING:
    from agentlab.memory.memory import Memory

WINDOW = 50  # turns kept word for word
SUMMARY_AT = 2_000  # tokens of the turns in the window, above which the older half of them is summarised
SUMMARY_LIMIT = 500  # tokens of the summary
_ACTIVE = 20

Summariser = Callable[[Sequence[ConversationItem]], str]
_COLUMNS = (
    "id, conversation_id, session_id, timestamp, user_input, agent_response, context_used, importance_score, tags, "
    "metadata"
)


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
        self._user_id = user_id
        self._summariser = summariser
        self._tokens = tokens
        with core.store.writing() as db:
            self._begin(db)
            if user_id:
                db.execute("UPDATE sessions SET user_id = ? WHERE session_id = ?", (user_id, session_id))

    def _begin(self, db: sqlite3.Connection) -> None:
        """Make the session where it is not there: it is new, or was forgotten since this object was made."""
        now = time.time()
        db.execute(
            "INSERT OR IGNORE INTO sessions VALUES (?, ?, ?, ?, '[]', '{}', '[]', 0)",
            (self.session_id, self._user_id, now, now),
        )

    def add(
        self, user_input: str, agent_response: str, *, context_used: Sequence[str] = (), tags: Sequence[str] = (),
        importance_score: float = 0.5, metadata: dict[str, Any] | None = None, timestamp: float | None = None,
        agent: str = "", notes: Sequence[str] = (), cut_off: bool = False,
    ) -> ConversationItem:  # fmt: skip
        """The turn, stored with what it tells: the person's words and the agent's, echoes left out, as memories.

        notes: ids of memories that the agent made in this turn; they are forgotten and taken back with it. cut_off: the
        agent did not finish what it was saying, so its words are a part of the talk and no memory.
        """
        now = time.time() if timestamp is None else float(timestamp)
        item = ConversationItem(
            conversation_id=new_id("c"), session_id=self.session_id, timestamp=now,
            user_input=check_text("user_input", user_input),
            agent_response=check_text("agent_response", agent_response),
            context_used=list(context_used), importance_score=check_share("importance_score", importance_score),
            tags=check_tags(tags), metadata=dict(metadata or {}),
        )  # fmt: skip
        common: dict[str, Any] = {"session_id": self.session_id, "tags": tags, "created_at": now}
        told = [self._memory.remember(user_input, source="person", **common)]
        if not cut_off:
            told.append(self._memory.remember(agent_response, source="agent", source_name=agent, **common))
        # what was an echo or merged belongs to the turn or session that told it first
        own = [*dict.fromkeys([*(memory_id for memory_id in told if self._is_new(memory_id, now)), *notes])]
        echoes = [memory_id for memory_id in dict.fromkeys(told) if memory_id not in own]
        with self._core.store.writing() as db:
            db.execute(
                "INSERT INTO turns(conversation_id, session_id, timestamp, user_input, agent_response, context_used, "
                "importance_score, tags, metadata, memory_ids, echoes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (item.conversation_id, item.session_id, now, user_input, agent_response,
                 json.dumps(item.context_used), item.importance_score, json.dumps(item.tags, ensure_ascii=False),
                 json.dumps(item.metadata, ensure_ascii=False, sort_keys=True), json.dumps(own),
                 json.dumps(echoes)),
            )  # fmt: skip
            self._begin(db)
            (active,) = db.execute(
                "SELECT active_memories FROM sessions WHERE session_id = ?", (self.session_id,)
            ).fetchone()
            kept = [memory_id for memory_id in json.loads(active) if memory_id not in context_used]
            db.execute(
                "UPDATE sessions SET last_activity = ?, active_memories = ? WHERE session_id = ?",
                (now, json.dumps([*kept, *dict.fromkeys(context_used)][-_ACTIVE:]), self.session_id),
            )
        self._summarise()
        return item

    def undo(self) -> ConversationItem | None:
        """Take back the last turn, and forget what was remembered of it; None where there is none.

        Turns that the summary covers stay: what was made of them cannot be taken apart.
        """
        rows = self._open_rows()
        if not rows:
            return None
        last = _turn(rows[-1])
        with self._core.store.reading() as db:
            (told,) = db.execute("SELECT memory_ids FROM turns WHERE id = ?", (rows[-1][0],)).fetchone()
        ids = [memory_id for memory_id in json.loads(told) if self._memory.peek(memory_id) is not None]
        if ids:
            self._memory.forget(*ids, reason="taken back")
        with self._core.store.writing() as db:  # a turn that told nothing new is still there
            db.execute("DELETE FROM turns WHERE id = ?", (rows[-1][0],))
        return last

    def _is_new(self, memory_id: str, now: float) -> bool:
        item = self._memory.peek(memory_id)
        return item is not None and item.created_at == now and item.session_id == self.session_id

    def turns(self, last: int = WINDOW) -> list[ConversationItem]:
        """The last turns, oldest first."""
        with self._core.store.reading() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM turns WHERE session_id = ? ORDER BY id DESC LIMIT ?", (self.session_id, last)
            ).fetchall()
        return [_turn(row) for row in reversed(rows)]

    def window(self) -> list[ConversationItem]:
        """The turns that the summary does not cover, at most `WINDOW`, oldest first."""
        return [_turn(row) for row in self._open_rows()][-WINDOW:]

    def summary(self) -> list[Part]:
        """The summary's parts, oldest first, each with the ids of the turns that it is made of."""
        with self._core.store.reading() as db:
            found = db.execute("SELECT summary FROM sessions WHERE session_id = ?", (self.session_id,)).fetchone()
        return [Part(part["text"], part["sources"]) for part in json.loads(found[0])] if found else []

    def memories_of(self, conversation_ids: Iterable[str]) -> list[str]:
        """Ids of the memories that these turns told or repeated, oldest first."""
        with self._core.store.reading() as db:
            rows = db.execute(
                "SELECT memory_ids, echoes FROM turns WHERE conversation_id IN (SELECT value FROM json_each(?)) "
                "ORDER BY id",
                (json.dumps(list(conversation_ids)),),
            ).fetchall()
        return list(dict.fromkeys(one for row in rows for ids in row for one in json.loads(ids)))

    def session(self) -> SessionContext:
        """The session as it stands."""
        return session_context(self._core, self.session_id)

    def prefer(self, **preferences: Any) -> None:
        """Set preferences of the session; None removes one."""
        with self._core.store.writing() as db:
            self._begin(db)
            (stored,) = db.execute(
                "SELECT preferences FROM sessions WHERE session_id = ?", (self.session_id,)
            ).fetchone()
            merged = {**json.loads(stored), **preferences}
            merged = {key: value for key, value in merged.items() if value is not None}
            db.execute(
                "UPDATE sessions SET preferences = ? WHERE session_id = ?",
                (json.dumps(merged, ensure_ascii=False, sort_keys=True), self.session_id),
            )

    def context(self, query: str, budget_tokens: int, *, k: int = 5, **filters: Any) -> Context:
        """What an answer to `query` should see, in at most `budget_tokens`: newest turns, memories, summary.

        Long memories are cut to the sentences that share most with the query; what does not fit is left out, the
        newest turn last. `Context.used` are the ids of the memories in it, for `add(context_used=…)`.
        """
        hits = self._memory.recall(query, k, **filters)
        return fit(query, budget_tokens, self.window(), hits, self.summary(), self._tokens)

    # -- summarising --------------------------------------------------------------------------------------------------

    def _open_rows(self) -> list[tuple[Any, ...]]:
        with self._core.store.reading() as db:
            return db.execute(
                f"SELECT {_COLUMNS} FROM turns WHERE session_id = ?1 AND id > "
                "(SELECT summarised FROM sessions WHERE session_id = ?1) ORDER BY id",
                (self.session_id,),
            ).fetchall()

    def _summarise(self) -> None:
        rows = self._open_rows()
        sizes = [self._tokens(row[4]) + self._tokens(row[5]) for row in rows]
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
            # only if nobody else summarised meanwhile
            db.execute(
                "UPDATE sessions SET summary = ?, summarised = ? WHERE session_id = ? AND summarised < ? "
                "AND summary = ?",
                (_dump(parts), rows[over - 1][0], self.session_id, rows[over - 1][0], _dump(before)),
            )

    def _shortened(self, before: list[Part], folded: list[ConversationItem]) -> list[Part]:
        if self._summariser is None:
            said = [Part(text, [turn.conversation_id]) for turn in folded
                    for text in (turn.user_input, turn.agent_response)]  # fmt: skip
            return extract([*before, *said], SUMMARY_LIMIT, self._tokens)
        parts = [*before, Part(self._summariser(folded), [turn.conversation_id for turn in folded])]
        if sum(self._tokens(part.text) for part in parts) > SUMMARY_LIMIT and len(parts) > 1:
            sources = list(dict.fromkeys(source for part in parts for source in part.sources))
            turns = [turn for turn in self.turns(10**9) if turn.conversation_id in set(sources)]
            parts = [Part(self._summariser(turns), sources)]
        return parts


def session_context(core: Core, session_id: str) -> SessionContext:
    """The stored context of a session."""
    with core.store.reading() as db:
        found = db.execute("SELECT * FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
        if found is None:
            raise MemoryStoreError(f"session {session_id!r} was forgotten; its next turn begins it anew")
        _, user, start, last, active, preferences, summary, _ = found
        (count,) = db.execute("SELECT count(*) FROM turns WHERE session_id = ?", (session_id,)).fetchone()
    return SessionContext(
        session_id=session_id, user_id=user, start_time=start, last_activity=last, conversation_count=count,
        active_memories=json.loads(active), preferences=json.loads(preferences),
        summary=" ".join(part["text"] for part in json.loads(summary)),
    )  # fmt: skip


def _turn(row: tuple[Any, ...]) -> ConversationItem:
    _, conversation_id, session_id, timestamp, said, answered, context, importance, tags, metadata = row
    return ConversationItem(
        conversation_id=conversation_id, session_id=session_id, timestamp=timestamp, user_input=said,
        agent_response=answered, context_used=json.loads(context), importance_score=importance,
        tags=json.loads(tags), metadata=json.loads(metadata),
    )  # fmt: skip


def _dump(parts: Sequence[Part]) -> str:
    return json.dumps([{"text": part.text, "sources": part.sources} for part in parts], ensure_ascii=False)


__all__ = ["Conversation", "Summariser", "count_tokens", "session_context"]
