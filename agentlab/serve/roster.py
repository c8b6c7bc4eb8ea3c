"""Who can be asked: the run's champion, followed as it changes, the adapters of its pool, and the base model."""

import logging
import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.adapters import Pool
from agentlab.adapters.lora import WEIGHTS_FILE
from agentlab.adapters.peft_config import CONFIG_FILE
from agentlab.answering import CHAMPION, with_adapter
from agentlab.errors import AdapterError, AgentlabError
from agentlab.hardware.oom import let_go
from agentlab.records import BASE
from agentlab.serve.asking import MODEL
from agentlab.serve.metrics import Metrics
from agentlab.serve.problems import Problem

if TYPE_CHECKING:
    from agentlab.agent import Agent
    from agentlab.evolution.run import Run

_LOG = logging.getLogger("agentlab.serve")
_RETRY_S = 30.0  # after a lack of memory


class Roster:
    """Puts the adapter that a request names onto the resident model, and follows the run's champion.

    adapter: "champion", or what is served under the stable name for good. `seat` and `refresh` are for the one thread
    that answers; the rest may be called from anywhere.
    """

    def __init__(self, agent: "Agent", run: "Run", adapter: str, metrics: Metrics) -> None:
        self.agent = agent
        self.run = run
        self.metrics = metrics
        self.model_sha256 = agent.describe(agent.chain.links[0]).model_sha256
        self.served = agent.chain.links[0].adapter or BASE
        self.started_s = time.time()
        self._follow = adapter == CHAMPION
        self._seen: tuple[Any, ...] | None = None  # a champion may have been promoted while the agent was loaded
        self._refused: tuple[Any, ...] | None = None  # the state of the disk at which a champion could not be loaded
        self._again_s = math.inf  # when it is tried again all the same
        self._lock = threading.Lock()
        self._tell_metrics()

    @property
    def _pool(self) -> Pool:
        return Pool(self.run.folder / "adapters", self.run.settings.population.pool, self.model_sha256)

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: the stable name first, then the pool, best first, then the base model.

        An adapter whose card is damaged is left out; the others go on answering.
        """
        cards = [card for card in self._pool.members(strict=False) if card.base_sha256 == self.model_sha256]
        found = [_model(MODEL, self.started_s, self.served)]
        found += [_model(card.adapter_id, card.created_at_s, card.adapter_id) for card in cards]
        return [*found, _model(BASE, self.started_s, BASE)]

    def check(self, model: str) -> None:
        """Raise Problem (404) with the names that are allowed, unless `model` is one of them."""
        if model not in (MODEL, BASE):  # these need no look at the disk
            self.entry(model)

    def entry(self, model: str) -> dict[str, Any]:
        """What `/v1/models` lists of `model`. Raises Problem (404) with the names that are allowed."""
        entries = {entry["id"]: entry for entry in self.models()}
        if model not in entries:
            raise Problem(
                404, f"there is no model {model!r:.80}; allowed: {', '.join(entries)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return entries[model]

    def seat(self, model: str) -> str:
        """Let the resident model answer as `model` from now on; the adapter's id. Raises Problem or AgentlabError.

        Where memory is lacking for it, the chain's recovery makes room.
        """
        wanted = self.served if model == MODEL else model
        chain = self.agent.chain
        if (chain.links[0].adapter or BASE) != wanted:
            self._put(wanted, pinned=wanted == self.served, pressing=True)
        return wanted

    def refresh(self) -> None:
        """Take over a newly promoted champion, if there is one; one that cannot be loaded leaves the old one."""
        if not self._follow:
            return
        signature = self._signature()
        if signature == self._seen:
            return
        try:
            champion = self.run.champion()
        except AgentlabError as error:  # a damaged result file
            self._refuse(signature, f"the run's results cannot be read, {self.served} goes on answering: {error}")
            return
        if champion == self.served:
            self._seen = signature
            return
        state = (champion, self._content(champion))
        if state == self._refused and time.monotonic() < self._again_s:
            return
        try:
            self._put(champion, pinned=True)
        except Exception as error:  # an adapter can fail to load in as many ways as there are libraries under it
            self._refuse(state, f"champion {champion} cannot be loaded, {self.served} goes on answering: {error}")
            # what is wrong with an adapter lies on the disk; memory, a process, a server may be there later
            self._again_s = math.inf if isinstance(error, AdapterError) else time.monotonic() + _RETRY_S
            let_go(error)
            return
        before, self.served = self.served, champion
        self._seen, self._refused = signature, None
        self.metrics.swaps.inc()
        self._tell_metrics()
        _LOG.warning("champion %s took over from %s", champion, before)
        self._let_go_of_others(champion)

    def _let_go_of_others(self, champion: str) -> None:
        chain = self.agent.chain
        with chain.lock:
            chain.drop_adapters(keep=(champion,))
            try:
                chain.use(chain.links[0])  # pinned, now that the old one has left its place
            except Exception as error:  # it answers all the same
                _LOG.warning("champion %s is not kept on the device: %s", champion, error)
                let_go(error)

    def _put(self, adapter: str, pinned: bool, pressing: bool = False) -> None:
        chain = self.agent.chain
        with chain.lock:  # an abandoned answer may still be at its last token
            link = with_adapter(chain.links[0], self.run, adapter, self.model_sha256, pinned)
            chain.use(link, pressing)
            chain.drop_adapters(keep=(self.served,))
        if link.adapter is not None:
            self._count_use(link.adapter)

    def _count_use(self, adapter: str) -> None:
        try:
            self._pool.count_use(adapter)
        except AgentlabError as error:  # it is loaded: a full disk is no reason not to answer
            _LOG.warning("the use of %s is not counted: %s", adapter, error)

    def _refuse(self, state: tuple[Any, ...], message: str) -> None:
        if state != self._refused:
            self._refused = state
            self.metrics.swap_failures.inc()
            _LOG.warning("%s", message)

    def _signature(self) -> tuple[Any, ...]:
        """Changes whenever a generation is finished."""
        results = sorted((self.run.folder / "generations").glob("*/result.json"))
        return tuple(_stamp(path) for path in results)

    def _content(self, adapter: str) -> tuple[Any, ...]:
        """Changes whenever an adapter's files do, or its card in more than the number of its uses."""
        files = [_stamp(self._pool.folder / adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        try:
            return (*files, self._pool.card(adapter).model_copy(update={"usage_count": 0}))
        except AgentlabError as error:
            return (*files, str(error))

    def _tell_metrics(self) -> None:
        info = self.agent.describe(self.agent.chain.links[0])
        self.metrics.champion(run=self.run.id, adapter=self.served, model=info.model)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError:  # it went away meanwhile
        return (path.name, 0, 0, 0)
    return (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _model(name: str, created_s: float, adapter: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": int(created_s), "owned_by": "agentlab",
        "agentlab": {"adapter": adapter},
    }  # fmt: skip
