"""Records out of a damaged SQLite file without its trees: every page that still is a leaf is read by itself.

The format is https://www.sqlite.org/fileformat2.html, sections 1.6 and 2.1. A record is only as good as its checksum,
which is the caller's to verify: nothing here tells which table a record is of.
"""

import struct
from collections.abc import Iterator
from typing import Any

_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def records(data: bytes, page_bytes: int = 4096) -> Iterator[tuple[int | None, tuple[Any, ...]]]:
    """(row id, values) of every record that can be decoded; the row id is None in tables without one and in indexes."""
    for start in range(0, len(data) - page_bytes + 1, page_bytes):
        head = start + (100 if start == 0 else 0)
        kind = data[head]
        if kind not in (_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR):
            continue
        pointers = head + (12 if kind == _INDEX_INTERIOR else 8)
        for number in range(int.from_bytes(data[head + 3 : head + 5], "big")):
            place = pointers + 2 * number
            offset = int.from_bytes(data[place : place + 2], "big")
            if not pointers - start <= offset < page_bytes:
                continue
            try:
                yield _cell(data, start + offset, kind, page_bytes)
            except (IndexError, ValueError, OverflowError, struct.error):
                continue  # a damaged cell says nothing about its neighbours


def _cell(data: bytes, at: int, kind: int, page_bytes: int) -> tuple[int | None, tuple[Any, ...]]:
    if kind == _INDEX_INTERIOR:
        at += 4  # the number of a child page
    size, at = _varint(data, at)
    row = None
    if kind == _TABLE_LEAF:
        row, at = _varint(data, at)
    most = page_bytes - 35 if kind == _TABLE_LEAF else (page_bytes - 12) * 64 // 255 - 23
    if size > len(data):
        raise ValueError("longer than the file")
    here = size
    if size > most:  # the rest is in a chain of overflow pages
        least = (page_bytes - 12) * 32 // 255 - 23
        here = least + (size - least) % (page_bytes - 4)
        here = here if here <= most else least
    payload = bytearray(data[at : at + here])
    link = int.from_bytes(data[at + here : at + here + 4], "big")
    while len(payload) < size:
        start = (link - 1) * page_bytes
        if start < page_bytes or start + page_bytes > len(data):
            raise ValueError("the chain of pages is broken")
        link = int.from_bytes(data[start : start + 4], "big")
        payload += data[start + 4 : start + min(page_bytes, 4 + size - len(payload))]
    return row, _values(bytes(payload))


def _values(payload: bytes) -> tuple[Any, ...]:
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INTEGER_BYTES.get(kind, 8 if kind == 7 else max(0, (kind - 12) // 2))
        piece = payload[at : at + size]
        if len(piece) < size or kind in (10, 11):
            raise ValueError("the record is cut off")
        at += size
        if kind in _INTEGER_BYTES:
            values.append(int.from_bytes(piece, "big", signed=True))
        elif kind == 7:
            values.append(struct.unpack(">d", piece)[0])
        elif kind < 12:
            values.append({0: None, 8: 0, 9: 1}[kind])
        else:
            values.append(piece if kind % 2 == 0 else piece.decode("utf-8", "replace"))
    return tuple(values)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for number in range(8):
        byte = data[at + number]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + number + 1
    return value << 8 | data[at + 8], at + 9
