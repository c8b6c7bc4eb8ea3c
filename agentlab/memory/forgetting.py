"""Forgetting: the memory, what derives from it, and every byte of both; what stays is a tombstone without a word."""

import json
import time
from collections.abc import Iterable

from agentlab.errors import StorageError
from agentlab.memory.core import Core
from agentlab.memory.store import unknown
from agentlab.memory.words import terms


def forget(core: Core, memory_ids: Iterable[str], reason: str) -> list[str]:
    """Forget memories and what derives from them; the ids that went, in the order they were found.

    Derived are: knowledge consolidated from them, the turns that told them with what else those turns told, answers
    that used a word they can only have from them, and the sentences of summaries made of such turns.
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
        core.store.db.execute("UPDATE meta SET value = '1' WHERE key = 'purge'")
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
        db.execute("UPDATE meta SET value = '1' WHERE key = 'purge'")
        db.execute("DELETE FROM turns WHERE session_id = ?", (session_id,))
        db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))
    if ids:
        return forget(core, ids, reason)
    core.store.purge()
    return []


def _closure(core: Core, asked: list[str]) -> tuple[list[str], set[int]]:
    """Memory ids and turn numbers that go, starting from `asked`."""
    gone, turns, queue = list(asked), set(), list(asked)
    while queue:
        memory_id = queue.pop(0)
        found = core.store.derived_of(memory_id)
        for number, told in _turns_of(core, memory_id):
            turns.add(number)
            found += told
        for other in found:
            if other not in gone:
                gone.append(other)
                queue.append(other)
    return gone, turns


def _turns_of(core: Core, memory_id: str) -> list[tuple[int, list[str]]]:
    """(turn number, the memories that it told) of the turns that tell `memory_id` or whose answer used it."""
    row = core.store.row_of(memory_id)
    words = set(terms(core.store.items_of([row])[row].content)) if row is not None else set()
    found = []
    cursor = core.store.db.execute(
        "SELECT id, user_input, agent_response, context_used, memory_ids, echoes FROM turns "
        "WHERE instr(memory_ids || echoes || context_used, ?)",
        (f'"{memory_id}"',),
    ).fetchall()
    for number, said, answered, context, told, echoes in cursor:
        ids = json.loads(told)
        if memory_id in ids + json.loads(echoes) or _leaks(
            core, words, said, answered, set(json.loads(context)) - {memory_id}
        ):
            found.append((number, ids))
    return found


def _leaks(core: Core, words: set[str], said: str, answered: str, context: set[str]) -> bool:
    """Whether an answer has a word of the forgotten memory that neither the question nor its other context had."""
    known = set(terms(said))
    for other in context:
        row = core.store.row_of(other)
        if row is not None:
            known |= set(terms(core.store.items_of([row])[row].content))
    return bool((words & set(terms(answered))) - known)


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
