"""The fallback chain: primary → fallback → emergency model, one of which answers."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, Self

from agentlab.errors import AgentlabError, ModelError
from agentlab.inference.contract import Engine, EngineError, OutOfMemoryError

Role = Literal["primary", "fallback", "emergency"]


@dataclasses.dataclass(frozen=True)
class Link:
    """One model of the chain; `open` loads it. The adapter, an id and its folder, fits this model alone."""

    role: Role
    model: str
    open: Callable[[], Engine]
    adapter: str | None = None
    adapter_folder: Path | None = None
    adapter_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Fall:
    """One step down the chain and why."""

    from_model: str
    to_model: str
    reason: str


class ChainExhausted(ModelError):
    """No model of the chain is left; the message says what became of each."""


class Chain:
    """Models in the order in which they are tried; each is loaded when it is its turn. Not thread-safe: hold `lock`.

    A model that cannot be loaded, runs out of memory or breaks is not tried again in this chain's life; one whose
    output was unusable is, at the next `rewind`.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        if not links:
            raise ValueError("a chain needs at least one model")
        self.links = list(links)
        self._engines: dict[int, Engine] = {}
        self._broken: dict[int, str] = {}
        self._position = 0
        self._falls: list[Fall] = []
        self.lock = threading.Lock()  # for whoever answers: engines take one call at a time

    @property
    def link(self) -> Link:
        """Whose turn it is."""
        return self.links[self._position]

    def current(self) -> tuple[Link, Engine]:
        """The model whose turn it is, loaded; falls on where loading fails. Raises ChainExhausted at the end."""
        while True:
            engine = self._engines.get(self._position)
            if engine is not None:
                return self.link, engine
            if self._position in self._broken:
                self._next(self._broken[self._position])
                continue
            try:
                engine = self._load(self.link)
            except Exception as error:  # a model fails to load in as many ways as there are libraries under it
                if _is_memory(error) and self._engines:
                    self._close_all()  # a model that is kept for later may be what takes the room
                    try:
                        engine = self._load(self.link)
                    except Exception as again:
                        self.fall(f"{self.link.model} cannot be loaded: {_first_line(again)}", broken=True)
                        continue
                else:
                    self.fall(f"{self.link.model} cannot be loaded: {_first_line(error)}", broken=True)
                    continue
            self._engines[self._position] = engine
            return self.link, engine

    @staticmethod
    def _load(link: Link) -> Engine:
        engine = link.open()
        if link.adapter is not None and link.adapter_folder is not None:
            try:
                engine.load_adapter(link.adapter, link.adapter_folder)
            except BaseException:
                engine.close()
                raise
        return engine

    def fall(self, reason: str, *, broken: bool) -> None:
        """Go on to the next model; a broken one is freed first. Raises ChainExhausted when there is none."""
        if broken:
            self._broken[self._position] = reason
            engine = self._engines.pop(self._position, None)
            if engine is not None:
                with contextlib.suppress(Exception):  # it is broken: what it says at the end helps nobody
                    engine.close()
        self._next(reason)

    def _next(self, reason: str) -> None:
        if self._position + 1 >= len(self.links):
            raise ChainExhausted(reason if len(self.links) == 1 else f"no model of the chain is left; last: {reason}")
        source = self.link.model
        self._position += 1
        self._falls.append(Fall(source, self.link.model, reason))

    def broken(self, error: BaseException) -> None:
        """Fall because answering raised `error`; a request that no model could take is raised again instead."""
        if isinstance(error, EngineError) and not isinstance(error, OutOfMemoryError):
            self.fall(f"{self.link.model} cannot take this: {_first_line(error)}", broken=False)
            return
        if isinstance(error, AgentlabError) and not isinstance(error, OutOfMemoryError):
            raise error
        if not isinstance(error, Exception):
            raise error
        what = "ran out of memory" if _is_memory(error) else f"broke: {_first_line(error)}"
        self.fall(f"{self.link.model} {what}", broken=True)

    def use(self, link: Link) -> None:
        """Let `link`, the first model with another adapter or none, answer from now on; a loaded model stays loaded.

        Raises what loading the adapter raises; then nothing has changed.
        """
        engine = self._engines.get(0)
        if engine is not None and link.adapter is not None and link.adapter_folder is not None:
            own = self.links[0]
            changed = link.adapter == own.adapter and link.adapter_sha256 != own.adapter_sha256
            if changed or link.adapter not in engine.adapters():
                engine.load_adapter(link.adapter, link.adapter_folder)
        self.links[0] = link

    def drop_adapters(self, keep: Collection[str | None]) -> None:
        """Free the first model's adapters that are neither its own now nor in `keep`."""
        engine = self._engines.get(0)
        for adapter in engine.adapters() if engine is not None else []:
            if engine is not None and adapter != self.links[0].adapter and adapter not in keep:
                engine.unload_adapter(adapter)

    @property
    def usable(self) -> bool:
        """Whether a model is left that did not break."""
        return len(self._broken) < len(self.links)

    def take_falls(self) -> list[Fall]:
        """Falls since the last call, oldest first."""
        falls, self._falls = self._falls, []
        return falls

    def rewind(self) -> None:
        """Begin again with the first model that is not broken."""
        self._position = next((i for i in range(len(self.links)) if i not in self._broken), len(self.links) - 1)

    def loaded(self) -> list[str]:
        """Models in memory now."""
        return [self.links[position].model for position in sorted(self._engines)]

    def _close_all(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def close(self) -> None:
        """Free every model; harmless when repeated."""
        self._close_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, EngineError) and "out of memory" in str(error).lower()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
