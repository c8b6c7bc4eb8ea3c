"""How each model of a chain stands: loaded, or not to be tried, and why."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from agentlab.events import RecoveryStep
from agentlab.hardware.recovery import Footprint
from agentlab.inference.contract import Engine
from agentlab.inference.given_up import GivenUp
from agentlab.inference.links import Fall, Link, pin

REST_S = 30.0  # a server that cannot be reached is left alone for so long: finding out takes seconds of an answer


class Lineup:
    """The models of a chain by their position. What they gave up for lack of memory is `given_up`'s account.

    A model is not tried for good where it broke, on each of its engines; with another adapter where its adapter cannot
    be loaded; after REST_S by `clock` where its server could not be reached; when memory has returned where it was
    given up. tell: gets what an engine gives up by itself, its note, and where another engine answers than the one that
    a model's scores come from, or that was chosen for it.
    """

    def __init__(
        self, links: Sequence[Link], given_up: GivenUp, tell: Callable[[Fall | RecoveryStep], None],
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.links = list(links)
        self.engines: dict[int, Engine] = {}
        self._given_up = given_up
        self._tell = tell
        self._clock = clock
        self._broken: dict[int, str] = {}
        self._otherwise: dict[int, Callable[[], Engine]] = {}  # what opens a model whose usual engine broke
        self._unfit: dict[int, str] = {}  # models whose adapter, as it is now, cannot be loaded
        self._resting: dict[int, tuple[float, str]] = {}  # until when, and why
        self._not_on_cpu: set[int] = set()  # what does not run there
        self._cpu_full: set[int] = set()  # what the RAM did not suffice for in this answer

    # -- which may be tried --------------------------------------------------------------------------------------------

    def missing(self, position: int) -> str:
        """Why a model is not tried now; "" where it is."""
        until, reason = self._resting.get(position, (0.0, ""))
        if reason and self._clock() < until:
            return reason
        return self._broken.get(position) or self._unfit.get(position) or self._given_up.reason(position)

    def next(self, after: int = -1) -> int | None:
        """The first model behind a position that may be tried; None where there is none."""
        return next((at for at in range(after + 1, len(self.links)) if not self.missing(at)), None)

    def refuge(self) -> int | None:
        """The last model of the chain that may do on the CPU; None where one is there, or none is left."""
        barred = {*self._broken, *self._unfit, *self._not_on_cpu, *self._cpu_full}
        found = [at for at, link in enumerate(self.links) if at not in barred and link.reopen is not None]
        return found[-1] if found and self._given_up.on_cpu is None else None

    def breaks(self, position: int, reason: str) -> bool:
        """Free a model and leave it alone from now on; one on the CPU only there, which says nothing of the card.

        True where it can be opened on another engine instead, which is told.
        """
        self.close(position)
        link = self.links[position]
        if position == self._given_up.on_cpu:
            self._not_on_cpu.add(position)
            self._given_up.leave_cpu()
        elif self._is_usual(position) and (otherwise := link.otherwise()) is not None:
            self._otherwise[position] = otherwise
            self._tell(Fall(link.model, link.model, f"{reason}; it is opened on another engine"))
            return True
        else:
            self._broken[position] = reason
            self._given_up.forget(position)
        return False

    def _is_usual(self, position: int) -> bool:
        """Whether a model is on the engine that was chosen for it: neither broke that, nor was memory lacking there."""
        return position not in self._otherwise and self._given_up.rung(position) is None

    def rests(self, position: int, reason: str) -> None:
        """Leave a model alone for a while: its server may still be starting, or be started later."""
        self._resting[position] = self._clock() + REST_S, reason

    def does_not_fit(self, position: int, reason: str) -> None:
        """Leave a model alone until it answers with another adapter."""
        self._unfit[position] = reason

    def finds_no_room(self, position: int) -> None:
        """Leave the CPU of a model that not even the RAM suffices for; in this answer it is not moved there again."""
        self._cpu_full.add(position)
        self._given_up.leave_cpu()

    def change(self, position: int, link: Link) -> None:
        """Let a model answer with another adapter, or with none."""
        self.links[position] = link
        self._unfit.pop(position, None)

    def begin_answer(self) -> None:
        """The RAM may have become free since the last one."""
        self._cpu_full.clear()

    # -- which are loaded ----------------------------------------------------------------------------------------------

    def open(self, position: int) -> None:
        """Load a model with its adapter, as it was when it was closed. Raises what the libraries under it raise."""
        link, rung = self.links[position], self._given_up.rung(position)
        on_cpu = self._given_up.on_cpu == position
        usual = self._otherwise.get(position, link.open)
        engine = link.reopen(rung, on_cpu) if link.reopen is not None and (rung or on_cpu) else usual()
        engine.tell = self._tell
        try:
            if link.adapter is not None and link.adapter_folder is not None:
                engine.load_adapter(link.adapter, link.adapter_folder)
                pin(engine, link)
            for action in self._given_up.opened(position, engine):
                engine.relieve(action, link.adapter)
        except BaseException:
            self._given_up.closed(engine, lasting=True)
            engine.close()
            raise
        if engine.note:
            self._tell(Fall(link.model, link.model, engine.note))
        if link.engine not in (None, engine.name):
            self._tell(Fall(link.model, link.model, f"its scores are {link.engine}'s, and {engine.name} answers"))
        self.engines[position] = engine

    def close(self, position: int) -> None:
        """Free a model. It is opened again, if it ever is, with the context and at the rung that it had."""
        engine = self.engines.pop(position, None)
        if engine is None:
            return
        self._given_up.closed(engine, lasting=self.links[position].reopen is not None)
        with contextlib.suppress(Exception):  # it may be broken: what it says at the end helps nobody
            engine.close()

    def idle(self, position: int) -> list[int]:
        """What is loaded beside a model and takes memory of this machine."""
        return [at for at, engine in sorted(self.engines.items()) if at != position and not engine.is_elsewhere]

    def footprint(self, position: int) -> tuple[Footprint | None, bool]:
        """(what a model holds, or will hold when it is opened, and could give up; whether it is loaded and can act).

        One that is loaded on an engine with nothing to give up can be opened elsewhere at a lower rung.
        """
        link, engine = self.links[position], self.engines.get(position)
        held = None if engine is None else engine.footprint(link.adapter)
        if held is not None or link.reopen is None:
            return held, engine is not None
        held = link.planned()
        rung, on_cpu = self._given_up.rung(position), self._given_up.on_cpu == position
        if held is not None and (rung is not None or on_cpu):
            device: Literal["cuda", "cpu"] = "cpu" if on_cpu else held.device
            held = dataclasses.replace(held, rung=rung or held.rung, device=device)
        if engine is not None and held is not None and held.rung is not None:
            taken = int(engine.planned_vram_mib(1, 1) * 2**20) - held.rung_bytes[held.rung]  # its cache
            held = dataclasses.replace(held, elastic_bytes=max(0, taken))
        return held, False
