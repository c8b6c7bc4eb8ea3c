"""One model of a fallback chain: how it is opened, with which adapter it answers, what is told where it gives way."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from agentlab.config import RungName
from agentlab.errors import ModelError
from agentlab.hardware.recovery import Footprint
from agentlab.inference.contract import Engine, EngineBroken, EngineError, OutOfMemoryError

Role = Literal["primary", "fallback", "emergency"]


@dataclasses.dataclass(frozen=True)
class Link:
    """One model of the chain; `open` loads it. The adapter, an id and its folder, fits this model alone.

    pinned: keep the adapter on the device beside whatever else is loaded, where the engine has room for that.
    reopen: loads it at a rung, None for the usual one, and on the CPU if the second argument says so; a link without it
    is only opened as it is. planned: what it will hold when it is opened, known without loading it. engine: the name of
    the one that its scores come from, None where there are none; where another one answers that is told. otherwise:
    what opens it on another engine after its own broke; None where there is none, or the person named the engine.
    """

    role: Role
    model: str
    open: Callable[[], Engine]
    adapter: str | None = None
    adapter_folder: Path | None = None
    adapter_sha256: str | None = None
    pinned: bool = False
    reopen: Callable[[RungName | None, bool], Engine] | None = None
    planned: Callable[[], Footprint | None] = lambda: None
    engine: str | None = None
    otherwise: Callable[[], Callable[[], Engine] | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Fall:
    """One step down the chain, or to the same model opened anew or elsewhere, and why."""

    from_model: str
    to_model: str
    reason: str


class ChainExhausted(ModelError):
    """No model of the chain is left; the message says what became of each."""


def pin(engine: Engine, link: Link) -> None:
    """Pin the link's adapter if that is wished; where every place on the device is taken it answers as well."""
    if link.pinned and link.adapter is not None:
        try:
            engine.pin(link.adapter)
        except (EngineBroken, OutOfMemoryError):
            raise
        except EngineError:
            pass
