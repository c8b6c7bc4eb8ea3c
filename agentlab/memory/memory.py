"""`Memory`: one file that remembers, opened with `Memory.open("memory.db")`."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from agentlab.config import home
from agentlab.errors import MemoryStoreError
from agentlab.memory import consolidation, forgetting, maintenance, tellings, transfer, writing
from agentlab.memory.bulk import no_collections
from agentlab.memory.columns import Filter
from agentlab.memory.compression import count_tokens
from agentlab.memory.conversation import Conversation, Summariser, sessions
from agentlab.memory.core import Core, as_floats
from agentlab.memory.doctor import Report, examine
from agentlab.memory.embedding import Embedder, SentenceEmbedder, check_embedder
from agentlab.memory.index import to_hit
from agentlab.memory.ranking import Weights
from agentlab.memory.records import (
    MEMORY_TYPES,
    SOURCES,
    Hit,
    KnowledgeItem,
    MemoryItem,
    SessionContext,
    Tombstone,
    check_choice,
    check_number,
    check_optional,
    check_path,
    check_string,
    check_tags,
    check_text,
    check_time,
)
from agentlab.memory.repair import kept_files, repair
from agentlab.memory.store import unknown
from agentlab.memory.words import terms

_RELATED = 0.5  # cosine from which on a memory counts as related
_RELATED_SHOWN = 5


class Memory:
    """What a person and an agent remember, in one SQLite file. Several threads and processes may use it at once.

    >>> memory = Memory.open("memory.db")
    >>> memory_id = memory.remember("The report is due on Friday.", memory_type="knowledge", tags=["work"])
    >>> memory.recall("when is the report due?", k=5)[0].content
    """

    def __init__(self, core: Core, weights: Weights) -> None:
        self._core = core
        self.weights = weights

    @classmethod
    def open(
        cls, path: str | Path | None = None, *, embedding_model: str | None = None, embedder: Embedder | None = None,
        weights: Weights | None = None, create: bool = True,
    ) -> "Memory":  # fmt: skip
        """The memory at `path`, made when it is not there; without a path the person's own, under AGENTLAB_HOME.

        embedding_model: a sentence-transformers name or folder, all-MiniLM-L6-v2 by default; embedder: an object that
        fulfils `Embedder` instead. The file keeps the model it began with: another one raises MemoryStoreError, and so
        do a damaged file, one of another program and one of a newer agentlab; none of them is touched.
        """
        # SQLite keeps the log beside the file itself, whatever links lead there
        place = (home() / "memory.db" if path is None else check_path(path)).resolve()
        check_optional("embedding_model", embedding_model)
        if embedder is not None:
            check_embedder(embedder)
        if not isinstance(weights, Weights | None):
            raise MemoryStoreError(f"weights: {weights!r:.80}; allowed: Weights(…)")
        return cls(Core(place, embedding_model, embedder, create=create), weights or Weights())

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._core.path

    @property
    def embedding_model(self) -> str:
        """Whose vectors the file holds."""
        return self._core.model

    def close(self) -> None:
        """Write the counted uses and close the file; harmless when closed already."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- remembering --------------------------------------------------------------------------------------------------

    def remember(
        self, content: str, *, memory_type: str = "conversation", session_id: str | None = None,
        tags: Sequence[str] = (), source: str = "person", source_name: str = "", importance: float | None = None,
        metadata: dict[str, Any] | None = None, created_at: float | None = None, derived_from: Sequence[str] = (),
        vector: Sequence[float] | np.ndarray | None = None,
    ) -> str:  # fmt: skip
        """The id under which `content` is remembered; durable on disk when this returns.

        The same words of the same type merge with what is there and count as a validation (in a conversation: of the
        same session). What an agent or a tool repeats of an older memory is not stored again: the old id comes back.
        importance: 0 to 1; None judges it by novelty. vector: a unit vector made elsewhere, instead of embedding.
        derived_from: ids of memories; raises MemoryStoreError where one of them was forgotten.
        """
        return writing.tell(
            self._core, content, memory_type=memory_type, session_id=session_id, tags=tags, source=source,
            source_name=source_name, importance=importance, metadata=metadata, created_at=created_at,
            derived_from=derived_from, vector=vector,
        ).memory_id  # fmt: skip

    @no_collections()
    def remember_many(
        self, items: Iterable[MemoryItem | str], *, vectors: Sequence[Sequence[float]] | np.ndarray | None = None
    ) -> list[str]:
        """The ids of many memories, stored in one transaction: all or none.

        Items without a memory_id get one; texts become conversations of the person. vectors: (n, dimension), one per
        item. Novelty is not judged here: what has no importance of its own gets 0.5.
        """
        now = time.time()
        full = []
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise MemoryStoreError(f"items: {items!r:.80}; allowed: a list of MemoryItems and texts")
        for item in items:
            if not isinstance(item, MemoryItem | str):
                raise MemoryStoreError(f"items: {item!r:.80}; allowed: MemoryItem or text")
            whole = MemoryItem(memory_id="", content=item, created_at=now) if isinstance(item, str) else item
            if not whole.memory_id:
                whole = writing.replaced(whole, memory_id=writing.new_id(), created_at=whole.created_at or now)
            full.append(writing.checked(whole))
        self._core.check_usable()
        ready = None
        if vectors is not None:
            ready = as_floats(vectors, "vectors are no list of lists of numbers")
            if ready.ndim != 2 or len(ready) != len(full):
                raise MemoryStoreError(f"vectors: shape {ready.shape}; allowed: ({len(full)}, dimension), one per item")
            if len(ready):
                self._core.check_dimension(ready.shape[1], "each vector")
            lengths = np.sqrt(np.vecdot(ready, ready))
            if not np.isfinite(lengths).all() or (lengths == 0).any():
                raise MemoryStoreError("a vector is zero or not finite; allowed: any direction")
            ready = ready / lengths[:, None]
        return writing.remember_many(self._core, full, ready)

    # -- recalling ----------------------------------------------------------------------------------------------------

    def recall(
        self, query: str, k: int = 5, *, session_id: str | None = None, memory_type: str | None = None,
        source: str | None = None, tags: Sequence[str] = (), since: float | None = None, until: float | None = None,
        explain: bool = False, words_only: bool = False, count: bool = True,
        vector: Sequence[float] | np.ndarray | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The `k` memories that answer `query` best, best first; fewer where fewer match.

        Filters hold all at once: session, type, source, every tag, told `since` and `until` (seconds since 1970).
        explain fills `Hit.parts`; words_only leaves the embedding model out; count=False leaves the uses alone;
        vector: the query's embedding, made elsewhere.
        """
        check_text("the query", query)
        check_number("k", k, 1)
        check_optional("session_id", session_id)
        if memory_type is not None:
            check_choice("memory_type", memory_type, MEMORY_TYPES)
        if source is not None:
            check_choice("source", source, SOURCES)
        core = self._core
        wanted = Filter(
            session_id=session_id, memory_type=memory_type, source=source, tags=tuple(check_tags(tags)),
            since=None if since is None else check_time("since", since),
            until=None if until is None else check_time("until", until),
        )  # fmt: skip
        core.check_usable()
        if core.empty:
            return []
        direction = None
        if not words_only:
            direction = core.embed(query) if vector is None else core.vector(vector)
        now = time.time()
        with core.view() as index:
            ranked = index.recall(direction, terms(query), k, wanted, self.weights, now)
            items = core.store.items_of(one.row for one in ranked)
            ranked = [one for one in ranked if one.row in items]
            if count:
                core.count_uses(index, [one.row for one in ranked], now)
            for one in ranked:
                core.note_recalled(one.row, items[one.row].content)
        if core.uses_due():
            core.write_uses(now)
        return [to_hit(one, items[one.row], explain=explain) for one in ranked]

    def search(self, words: str, k: int = 10) -> list[Hit]:
        """The memories that have all of `words`, by FTS5 in the file: no model and nothing loaded, for a quick look."""
        check_text("the query", words)
        check_number("k", k, 1)
        expression = " AND ".join(f'"{term}"' for term in dict.fromkeys(terms(words)))
        self._core.check_usable()
        if not expression:
            return []
        found = self._core.store.matching(expression, k)
        items = self._core.store.items_of(row for row, _, _, _ in found)
        hits: dict[str, Hit] = {}
        for row, start, end, score in found:
            if row in items:
                item = items[row]
                hits.setdefault(
                    item.memory_id,
                    Hit(memory_id=item.memory_id, content=item.content, score=score, memory_type=item.memory_type,
                        session_id=item.session_id, source=item.source, created_at=item.created_at, tags=item.tags,
                        start=start, end=end),
                )  # fmt: skip
        return list(hits.values())

    # -- looking ------------------------------------------------------------------------------------------------------

    def get(self, memory_id: str) -> MemoryItem:
        """The whole memory: its embedding, the sessions it was told in, and up to five related ones by similarity."""
        core = self._core
        check_text("memory_id", memory_id)
        with core.view() as index, core.store.reading():  # one state: somebody else may forget it in between
            row = core.store.row_of(memory_id)
            if row is None:
                raise unknown(core.path, memory_id)
            item = core.store.item_of(row)
            told_in = tellings.sessions_of(core.store, memory_id)
            vectors = core.store.vectors_of(row, index.dimension)
            near: dict[int, float] = {}
            for vector in vectors:
                for other, cosine in index.nearest(vector, _RELATED_SHOWN + len(vectors)):
                    near[other] = max(cosine, near.get(other, 0.0))
            order = sorted(
                (other for other in near if other != row and near[other] >= _RELATED), key=lambda o: -near[o]
            )
            related = core.store.items_of(order[:_RELATED_SHOWN])
        return writing.replaced(
            item, embedding=vectors, access_count=item.access_count + core.uncounted(row), told_in=told_in,
            related_memories=[related[other].memory_id for other in order[:_RELATED_SHOWN] if other in related],
        )  # fmt: skip

    def peek(self, memory_id: str) -> MemoryItem | None:
        """The memory without embedding and related ones; None when it is not there."""
        self._core.check_usable()
        check_text("memory_id", memory_id)
        row = self._core.store.row_of(memory_id)
        return None if row is None else self._core.store.items_of([row]).get(row)

    def items(self, *, session_id: str | None = None, memory_type: str | None = None) -> Iterator[MemoryItem]:
        """All memories in the order they came, without embeddings."""
        self._core.check_usable()
        check_optional("session_id", session_id)
        if memory_type is not None:
            check_choice("memory_type", memory_type, MEMORY_TYPES)
        told_there = (
            "(session_id = ?1 OR memory_id IN (SELECT memory_id FROM tellings t WHERE t.session_id = ?1) OR ?1 IS NULL)"
        )
        found = self._core.store.items(f"{told_there} AND memory_type IS coalesce(?2, memory_type)",
                                       (session_id, memory_type))  # fmt: skip
        yield from found.values()

    def __len__(self) -> int:
        self._core.check_usable()
        with self._core.store.reading() as db:
            return int(db.execute("SELECT count(*) FROM memories").fetchone()[0])

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, *memory_ids: str, session_id: str | None = None, reason: str = "") -> list[str]:
        """The ids that were forgotten: those asked for, or a whole session, and what derives from them.

        Of what another session told, too, a forgotten session loses its part: it stays, and is found from there.

        When this returns, no byte of them is in any of the memory's files, unless another process is reading just now:
        then when it has closed and this one wrote, closed or opened the memory again. Tombstones keep the ids.
        """
        self._core.check_usable()
        for memory_id in memory_ids:
            check_text("memory_id", memory_id)
        check_optional("session_id", session_id)
        check_string("reason", reason)
        return forgetting.forget(self._core, memory_ids, reason, session_id=session_id)

    def traces(self) -> list[str]:
        """Where what was forgotten may still be, one sentence each: a log that is read, files kept by repairs."""
        self._core.check_usable()
        found = []
        if self._core.store.purge_due:
            found.append(
                f"another program is reading {self.path}: bytes of what was forgotten stay in its log until that has "
                "closed it and the memory is next written, closed or opened"
            )
        return found + [f"{kept} holds what the memory held when it was repaired" for kept in self.kept_files()]

    def kept_files(self) -> list[Path]:
        """The damaged files that repairs kept."""
        return kept_files(self.path)

    def drop_kept(self) -> list[Path]:
        """Delete the damaged files that repairs kept; which they were."""
        gone = self.kept_files()
        for kept in gone:
            kept.unlink()
        return gone

    def tombstones(self) -> list[Tombstone]:
        """What was forgotten, oldest first: by these ids, data sets and adapters that learned from it are found."""
        self._core.check_usable()
        return self._core.store.tombstones()

    # -- talk and knowledge -------------------------------------------------------------------------------------------

    def conversation(
        self, session_id: str, *, user_id: str = "", summariser: Summariser | None = None,
        tokens: Callable[[str], int] = count_tokens,
    ) -> Conversation:  # fmt: skip
        """The session's talk, new or as it was left; see `Conversation`."""
        self._core.check_usable()
        return Conversation(self._core, self, session_id, user_id, summariser, tokens)

    def sessions(self) -> list[SessionContext]:
        """All sessions, the last active first."""
        self._core.check_usable()
        return sessions(self._core)

    def consolidate(self) -> list[KnowledgeItem]:
        """Knowledge that was made or strengthened of what the person told more than once since the last call."""
        self._core.check_usable()
        return consolidation.consolidate(self._core)

    def knowledge(self) -> list[KnowledgeItem]:
        """All knowledge, oldest first."""
        self._core.check_usable()
        return consolidation.knowledge(self._core)

    # -- the file -----------------------------------------------------------------------------------------------------

    def export(self, path: str | Path) -> int:
        """Write everything as JSON lines; how many memories went. Vectors go along, so an import needs no model."""
        self._core.check_usable()
        return transfer.export(self._core, check_path(path))

    def import_(self, path: str | Path) -> int:
        """Take in an export, all or nothing; how many memories were new. What was forgotten here stays forgotten."""
        self._core.check_usable()
        return transfer.import_(self._core, check_path(path))

    def doctor(self) -> Report:
        """Read and check everything; `report.clean` says whether the file is whole, `report.problems` what is not."""
        self._core.check_usable()
        return examine(self._core)

    @staticmethod
    def repair(
        path: str | Path, *, embedding_model: str | None = None, embedder: Embedder | None = None
    ) -> Report:  # fmt: skip
        """Rebuild a damaged memory of what is intact; the damaged file is kept beside it, see `traces`.

        `report.problems` names what is lost. Raises MemoryStoreError where any program has the file open.
        """
        return repair(check_path(path).resolve(), embedding_model, embedder)

    def only_read(self) -> str:
        """Why nothing can be stored just now, where the disk is full or takes no writes; else empty.

        What is there can be read all the same, as it was when the memory was opened. Whoever stores something tries the
        file again.
        """
        return str(self._core.store.frozen or "")

    def damage(self) -> list[str]:
        """What was found damaged while reading so far, one sentence each."""
        return list(self._core.store.damage)

    def stats(self) -> dict[str, Any]:
        """Counts, sizes in MB, model, and what was found damaged."""
        self._core.check_usable()
        return maintenance.stats(self._core)

    def reembed(self, model: str | None = None, *, embedder: Embedder | None = None) -> int:
        """Change the vectors of all memories to another model's; how many there are. Other processes open anew."""
        self._core.check_usable()
        check_optional("model", model)
        if embedder is not None:
            check_embedder(embedder)
        return maintenance.reembed(self._core, embedder or SentenceEmbedder(model or self._core.model))
