"""What ranking and filters need of every slot, as arrays in RAM. A slot is one chunk; most memories have one."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from agentlab.memory.records import MEMORY_TYPES, SOURCES

_FIELDS = {
    "row": np.int64,
    "alive": np.bool_,
    "start": np.int32,
    "end": np.int32,
    "kind": np.int8,
    "source": np.int8,
    "session": np.int32,
    "importance": np.float32,
    "created": np.float64,
    "accessed": np.float64,  # 0: never
    "uses": np.float32,
    "told": np.float32,
    "previous": np.int32,  # the slot before in the same session, -1: none
    "next": np.int32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Which memories may be recalled: all that match every part given. Times in seconds since the epoch."""

    session_id: str | None = None
    memory_type: str | None = None
    source: str | None = None
    tags: Sequence[str] = ()
    since: float | None = None
    until: float | None = None


class Slot(NamedTuple):
    """One slot as it comes from the file."""

    row: int
    start: int
    end: int
    memory_type: str
    source: str
    session_id: str | None
    importance: float
    created: float
    accessed: float | None
    uses: int
    told: int
    tags: Sequence[str]
    told_in: Sequence[str]  # sessions, where they are several


class Columns:
    """Growing arrays, one entry per slot. Slots of one memory stand beside each other, memories by row id."""

    row: np.ndarray
    alive: np.ndarray
    start: np.ndarray
    end: np.ndarray
    kind: np.ndarray
    source: np.ndarray
    session: np.ndarray
    importance: np.ndarray
    created: np.ndarray
    accessed: np.ndarray
    uses: np.ndarray
    told: np.ndarray
    previous: np.ndarray
    next: np.ndarray

    def __init__(self) -> None:
        self.size = 0
        self.dead = 0
        self._capacity = 1024
        for name, kind in _FIELDS.items():
            setattr(self, name, np.zeros(self._capacity, dtype=kind))
        self._sessions: dict[str, int] = {}
        self._last: dict[int, int] = {}  # session → its newest slot
        self._tagged: dict[str, set[int]] = {}  # tag → row ids
        self._told_in: dict[str, set[int]] = {}  # session → row ids of what was told in others, too
        self._sessions_of: dict[int, set[str]] = {}  # the same the other way round

    def slots(self, row: int) -> slice:
        """Where the memory with this row id stands; an empty slice when it is not here."""
        rows = self.row[: self.size]
        return slice(int(np.searchsorted(rows, row)), int(np.searchsorted(rows, row, side="right")))

    def extend(self, slots: Sequence["Slot"]) -> None:
        """Add slots; row ids must not fall, and a memory's slots come together."""
        first, last = self.size, self.size + len(slots)
        while last > self._capacity:
            self._grow()
        where = slice(first, last)
        given = dict(zip(Slot._fields, zip(*slots, strict=True), strict=True))
        for name in ("row", "start", "end", "importance", "created", "uses", "told"):
            getattr(self, name)[where] = given[name]
        self.accessed[where] = [accessed or 0.0 for accessed in given["accessed"]]
        self.kind[where] = [MEMORY_TYPES.index(kind) for kind in given["memory_type"]]
        self.source[where] = [SOURCES.index(source) for source in given["source"]]
        self.alive[where] = True
        self.session[where], self.previous[where], self.next[where] = -1, -1, -1
        for number, slot in enumerate(slots, start=first):
            for tag in slot.tags:
                self._tagged.setdefault(tag, set()).add(slot.row)
            self._tell(slot.row, slot.told_in)
            if slot.session_id is not None:
                session = self._session(slot.session_id)
                before = self._last.get(session, -1)
                self.session[number], self.previous[number] = session, before
                if before >= 0:
                    self.next[before] = number
                self._last[session] = number
        self.size = last

    def update(
        self, where: slice, *, importance: float, told: int, uses: int, accessed: float | None, tags: Sequence[str],
        source: str, session_id: str | None, told_in: Sequence[str], more: bool = False,
    ) -> None:  # fmt: skip
        """Set what may change after a memory was made. more: it was told again, `told_in` is where; nothing left it."""
        if where.start == where.stop:
            return
        row = int(self.row[where.start])
        fewer = told < self.told[where.start]
        self.importance[where], self.told[where], self.uses[where] = importance, told, uses
        self.accessed[where] = accessed or 0.0
        self.source[where] = SOURCES.index(source)
        moved = self._move(where, -1 if session_id is None else self._session(session_id))
        if not more:
            before, now = self._sessions_of.pop(row, set()), set(told_in)
            for name in before - now:
                self._told_in[name].discard(row)
            if moved or fewer or before or now:  # a session or a source may have left it
                kept = set(tags)
                for tag, rows in self._tagged.items():
                    if tag not in kept:
                        rows.discard(row)
        self._tell(row, told_in)
        for tag in tags:
            self._tagged.setdefault(tag, set()).add(row)

    def _tell(self, row: int, sessions: Sequence[str]) -> None:
        for name in sessions:
            self._told_in.setdefault(name, set()).add(row)
            self._sessions_of.setdefault(row, set()).add(name)

    def _session(self, name: str) -> int:
        return self._sessions.setdefault(name, len(self._sessions))

    def _move(self, where: slice, session: int) -> bool:
        """Let a memory stand in a session, beside its neighbours there; whether it stood in another."""
        if self.session[where.start] == session:
            return False
        self._unlink(where)
        self.session[where], self.previous[where], self.next[where] = -1, -1, -1
        if session < 0:
            return True
        theirs = np.flatnonzero((self.session[: self.size] == session) & self.alive[: self.size])
        place = int(np.searchsorted(theirs, where.start))
        chain = [*theirs[place - 1 : place].tolist(), *range(where.start, where.stop), *theirs[place:][:1].tolist()]
        for before, after in itertools.pairwise(chain):
            self.next[before], self.previous[after] = after, before
        self.session[where] = session
        if place == len(theirs):
            self._last[session] = where.stop - 1
        return True

    def count_use(self, rows: Sequence[int], now: float) -> None:
        """One use more of each of these memories, which are all here."""
        known = self.row[: self.size]
        first, last = np.searchsorted(known, rows), np.searchsorted(known, rows, side="right")
        slots = np.concatenate([np.arange(*pair) for pair in zip(first, last, strict=True)]) if len(rows) else first
        self.uses[slots] += 1
        self.accessed[slots] = now

    def use(self, where: slice, uses: int, accessed: float) -> None:
        """Set how often and when last a memory was recalled."""
        self.uses[where], self.accessed[where] = uses, accessed

    def bury(self, where: slice) -> None:
        """Forget a memory's slots; their places stay until the index is rebuilt."""
        row = int(self.row[where.start]) if where.start < where.stop else -1
        self.dead += int(self.alive[where].sum())
        self.alive[where] = False
        self._unlink(where)
        for name in self._sessions_of.pop(row, ()):
            self._told_in[name].discard(row)
        for rows in self._tagged.values():
            rows.discard(row)

    def _unlink(self, where: slice) -> None:
        """Let a memory's neighbours become each other's, as in a view loaded anew."""
        for slot in range(where.start, where.stop):
            before, after = int(self.previous[slot]), int(self.next[slot])
            if before >= 0:
                self.next[before] = after
            if after >= 0:
                self.previous[after] = before
            elif self.session[slot] >= 0:
                self._last[int(self.session[slot])] = before

    def allowed(self, wanted: Filter) -> np.ndarray | None:
        """Which slots match, as a mask (size,); None when all that are alive do."""
        n = self.size
        mask = self.alive[:n].copy()
        if wanted.session_id is not None:
            theirs = self.session[:n] == self._sessions.get(wanted.session_id, -2)
            if shared := self._told_in.get(wanted.session_id):
                theirs |= self._among(shared)
            mask &= theirs
        if wanted.memory_type is not None:
            mask &= self.kind[:n] == MEMORY_TYPES.index(wanted.memory_type)
        if wanted.source is not None:
            mask &= self.source[:n] == SOURCES.index(wanted.source)
        if wanted.since is not None:
            mask &= self.created[:n] >= wanted.since
        if wanted.until is not None:
            mask &= self.created[:n] <= wanted.until
        for tag in wanted.tags:
            mask &= self._among(self._tagged.get(tag, ()))
        return None if not self.dead and wanted == Filter() else mask

    def _among(self, rows: Iterable[int]) -> np.ndarray:
        """Which slots are of these memories, as a mask (size,)."""
        known = self.row[: self.size]
        flags = np.zeros(int(known[-1]) + 1 if self.size else 1, dtype=np.bool_)
        flags[list(rows)] = True
        return np.asarray(flags[known])

    def _grow(self) -> None:
        for name in _FIELDS:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._capacity *= 2
