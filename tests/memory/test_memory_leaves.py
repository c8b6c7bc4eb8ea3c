"""The page scanner reads what SQLite wrote, without SQLite."""

import contextlib
import sqlite3

import pytest

from agentlab.memory.leaves import records

VALUES = [
    None,
    0,
    1,
    -1,
    127,
    -128,
    40_000,
    -(1 << 23),
    1 << 31,
    1 << 45,
    -(1 << 62),
    0.5,
    "",
    "x",
    "日本語",
    b"",
    b"\0",
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "any.db"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE plain(id INTEGER PRIMARY KEY, a, b)")
        db.execute("CREATE TABLE keyed(k TEXT PRIMARY KEY, v) WITHOUT ROWID")
        for row, value in enumerate(VALUES, start=1):
            db.execute("INSERT INTO plain VALUES (?, ?, ?)", (row << (2 * row), value, "end"))
        for size in (900, 990, 1000, 3900, 4061, 4062, 4100, 20_000):
            db.execute("INSERT INTO plain VALUES (?, ?, ?)", (-size, "long", "y" * size))
            db.execute("INSERT INTO keyed VALUES (?, ?)", (f"key{size}", "z" * size))
        db.executemany("INSERT INTO keyed VALUES (?, ?)", [(f"many{i}", i) for i in range(3000)])
    return path


def signed(row):
    return row - (1 << 64) if row >= 1 << 63 else row


def test_every_row_is_read(file):
    found = list(records(file.read_bytes()))
    with contextlib.closing(sqlite3.connect(file)) as db:
        plain = {(row, (None, a, b)) for row, a, b in db.execute("SELECT * FROM plain")}
        keyed = set(db.execute("SELECT * FROM keyed"))
    assert plain <= {(signed(row), values) for row, values in found if row is not None}
    assert keyed <= {values for row, values in found if row is None}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_error(file, seed):
    import random

    chance = random.Random(seed)
    data = bytearray(file.read_bytes())
    for _ in range(2000):
        data[chance.randrange(len(data))] = chance.randrange(256)
    list(records(bytes(data)))
    list(records(bytes(data[:-100])))
    assert list(records(b"")) == []
