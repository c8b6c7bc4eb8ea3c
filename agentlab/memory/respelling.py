"""What schema versions 3 to 5 bring to older files: signatures and terms as they are made today."""

import sqlite3

from agentlab.memory.chunks import chunk_checksum, chunk_is_intact
from agentlab.memory.schema import CHUNK_BITS
from agentlab.memory.store import COLUMNS, to_item
from agentlab.memory.words import signature
from agentlab.memory.writing import index_terms

_AT_ONCE = 1_000


def respell_all(db: sqlite3.Connection) -> None:
    """Make every signature anew, and the terms of chunks that have others today, inside the caller's transaction.

    What is damaged is left as it is, for whoever reads it to find.
    """
    columns = 'SELECT id, start, "end", terms, vector, checksum FROM chunks WHERE id >= ? AND id < ?'
    last = 0
    while rows := db.execute(
        f"SELECT signature, {COLUMNS} FROM memories WHERE id > ? ORDER BY id LIMIT ?", (last, _AT_ONCE)
    ).fetchall():
        last = rows[-1][1]
        for old, *fields in rows:
            if (item := to_item(fields, [])) is None:
                continue
            row, content, created_at = fields[0], item.content, item.created_at
            if (mark := signature(content)) != old:
                db.execute("UPDATE memories SET signature = ? WHERE id = ?", (mark, row))
            low, high = row << CHUNK_BITS, (row + 1) << CHUNK_BITS
            for key, start, end, terms, vector, checksum in db.execute(columns, (low, high)).fetchall():
                if not chunk_is_intact(start, end, terms, vector, checksum):
                    continue
                if (now := index_terms(content[start:end], created_at)) != terms:
                    db.execute("INSERT INTO text_index(text_index, rowid, terms) VALUES ('delete', ?, ?)", (key, terms))
                    db.execute("INSERT INTO text_index(rowid, terms) VALUES (?, ?)", (key, now))
                    db.execute(
                        "UPDATE chunks SET terms = ?, checksum = ? WHERE id = ?",
                        (now, chunk_checksum(start, end, now, vector), key),
                    )
