"""The agent of one run: its models as a fallback chain, the adapter asked for, the lease on the accelerator."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from agentlab import config, models
from agentlab.adapters import Pool
from agentlab.config import RungName
from agentlab.errors import AdapterError, ModelError
from agentlab.evolution.run import Run
from agentlab.hardware import watch
from agentlab.hardware.lease import Lease
from agentlab.hardware.monitor import accelerator
from agentlab.hardware.recovery import Footprint, free_bytes
from agentlab.hardware.threads import limit_threads
from agentlab.inference import Engine, open_engine
from agentlab.inference.chain import Chain
from agentlab.inference.links import Link, Role
from agentlab.inference.opening import EngineName, engine_of_run, only_on_vllm, planned_footprint, served_model
from agentlab.records import BASE

if TYPE_CHECKING:
    from agentlab.agent import Agent, Options, Tool
    from agentlab.memory import Memory

CHAMPION = "champion"


def open_agent(
    run: Run, adapter: str, memory: "Memory | None", tools: "Iterable[Tool | Callable[..., Any]]", lease: bool,
    load: bool, options: "Options | None", metric: str, **switches: bool,
) -> "Agent":  # fmt: skip
    """See `Lab.agent`."""
    from agentlab.agent import Agent, Options

    links, known = _links(run, adapter)
    budget = run.settings.budget
    chain = Chain(links, lambda: free_bytes(watch.read(watch.OWNERS.holdings()), budget))
    here = any(link.reopen is not None for link in links)  # else nothing of this machine's memory is taken
    held = Lease(config.home() / "accelerator.lock", f"the agent of {run.id}") if lease and here else None
    if held is not None:
        held.acquire(wait_s=1.0)
    options = options or Options()
    taught_calls = metric == "tool_call" and links[0].adapter is not None
    options = dataclasses.replace(options, single_call=options.single_call or taught_calls)
    try:
        agent = Agent(
            chain, tools, memory=memory, run=run.id if run.folder.exists() else "", options=options,
            describe=lambda link: known[link.role], on_close=held.release if held else lambda: None, **switches,
        )  # fmt: skip
        if load:
            agent.load()
        if links[0].adapter is not None:
            Pool(run.folder / "adapters").count_use(links[0].adapter)
    except BaseException:
        chain.close()
        if held is not None:
            held.release()
        raise
    return agent


def _links(run: Run, adapter: str) -> tuple[list[Link], dict[str, dict[str, Any]]]:
    """The chain's models, and what is known of each by its role. Files are found and checked, nothing is loaded."""
    wanted = run.settings.model
    links: list[Link] = []
    known: dict[str, dict[str, Any]] = {}
    roles: list[tuple[Role, str | None]] = [
        ("primary", wanted.primary), ("fallback", wanted.fallback), ("emergency", wanted.emergency)
    ]  # fmt: skip
    for role, name in roles:
        if name is None:
            continue
        known[role] = {}
        opener = _Opener(run, role, name, known[role])
        if _is_served(run, role, name):  # whether the server has it is seen when it is its turn
            link = Link(role, name, opener.open)
            if adapter not in (CHAMPION, BASE):
                raise AdapterError(
                    f"adapter {adapter}: {name} answers on a server, which knows no adapters of this run; allowed: "
                    f"{CHAMPION}, {BASE}"
                )
            links.append(link)
            continue
        link = Link(role, name, opener.open, reopen=opener.reopen, planned=opener.planned, otherwise=opener.otherwise)
        if role == "primary":
            scored = run.model()
            link = link if scored is None else dataclasses.replace(link, engine=scored.engine)
            # the others may be missing until they are needed: that is one of the failures they are there for
            try:
                files = models.resolve(name, run.root)
            except ModelError:
                if wanted.fallback is None and wanted.emergency is None:
                    raise
            else:
                known[role]["model_sha256"] = files.sha256
                link = with_adapter(link, run, adapter, files.sha256, pinned=True)
        links.append(link)
    return links, known


def _is_served(run: Run, role: Role, name: str) -> bool:
    """Whether `name` is a model of the server: the primary is; others are where they are not found on this machine."""
    if run.settings.model.engine != "openai":
        return False
    if role == "primary":
        return True
    try:
        models.check(name, run.root)
    except ModelError:
        return True
    return False


@dataclasses.dataclass
class _Opener:
    """One model of the chain: loaded as the settings say, or smaller where memory is lacking. known: filled by it."""

    run: Run
    role: Role
    name: str
    known: dict[str, Any]

    def open(self) -> Engine:
        settings = self.run.settings
        if _is_served(self.run, self.role, self.name):
            return open_engine(settings, served_model(self.name), "openai")
        files = self._files()
        return open_engine(settings, files, self._engine(files), rung=self._rung())

    def reopen(self, rung: RungName | None, on_cpu: bool) -> Engine:
        """On transformers, at this rung, and on the CPU if need be."""
        return open_engine(self.run.settings, self._files(), "transformers", rung, on_cpu)

    def otherwise(self) -> Callable[[], Engine] | None:
        """What opens it on transformers where `auto` is vLLM for a model that both can load."""
        if self.run.settings.model.engine != "auto":
            return None
        try:
            files = self._files()
        except ModelError:
            return None
        if self._engine(files) != "vllm" or only_on_vllm(files):
            return None
        return lambda: open_engine(self.run.settings, files, "transformers", self._rung())

    def planned(self) -> Footprint | None:
        try:
            files = models.resolve(self.name, self.run.root)
            held = planned_footprint(self.run.settings, files, accelerator())
        except ModelError:
            return None
        rung = self._rung()
        if held is None or rung is None or self._engine(files) == "vllm":  # which loads the device's usual one
            return held
        return dataclasses.replace(held, rung=rung)

    def _engine(self, files: models.ModelFiles) -> EngineName:
        """The engine that scored the run, where it is here; what the settings ask for before that and for other models.

        Where it is not, as after a run on a larger machine, the link's `engine` lets the chain say so.
        """
        wanted = self.run.settings.model.engine
        if wanted == "openai":
            return "transformers"
        known = self.run.model() if self.role == "primary" else None
        return engine_of_run(self.run.settings, files, None if known is None else known.engine)

    def _rung(self) -> RungName | None:
        """What the run's adapters were trained and scored at; None: as for any other model."""
        return self.run.rung() if self.role == "primary" else None

    def _files(self) -> models.ModelFiles:
        files = models.resolve(self.name, self.run.root)
        self.known["model_sha256"] = files.sha256
        limit_threads(self.run.settings.budget.threads)
        return files


def with_adapter(link: Link, run: Run, adapter: str, model_sha256: str, pinned: bool) -> Link:
    """`link` with "champion", "base" or an adapter of the pool, whose files are checked.

    Its use is the caller's to count once it is loaded. pinned: it is the one that stays while others come and go.
    Raises AdapterError that names what is allowed.
    """
    name = run.champion() if adapter == CHAMPION else adapter
    if name == BASE:
        return dataclasses.replace(link, adapter=None, adapter_folder=None, adapter_sha256=None, pinned=False)
    pool = Pool(run.folder / "adapters", run.settings.population.pool, model_sha256)
    try:
        folder = pool.verify(name)
    except AdapterError as error:
        there = ", ".join([CHAMPION, BASE, *(card.adapter_id for card in pool.members(strict=False))])
        raise AdapterError(f"{error}; allowed for {run.id}: {there}") from None
    return dataclasses.replace(
        link, adapter=name, adapter_folder=folder, adapter_sha256=pool.card(name).weights_sha256, pinned=pinned
    )  # fmt: skip
