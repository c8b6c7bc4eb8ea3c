"""The agent at work for many: takes jobs from the line, seats the adapter asked for, and passes the steps on."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentlab.agent.agent import check_asked, check_session, checked
from agentlab.agent.steps import Answered, Delta, FellBack, Generated, ReasoningResult, Recovered, Retracted
from agentlab.errors import AdapterError, AgentError, AgentlabError
from agentlab.hardware.monitor import memory_stats
from agentlab.hardware.watch import OWNERS, Monitor
from agentlab.records import BASE
from agentlab.serve import replies
from agentlab.serve.asking import Ask
from agentlab.serve.line import Job, Line
from agentlab.serve.metrics import Metrics
from agentlab.serve.problems import Problem
from agentlab.serve.roster import Roster

if TYPE_CHECKING:
    from agentlab.agent import Agent
    from agentlab.lab import Lab

_LOG = logging.getLogger("agentlab.serve")
_AGAIN_S = 3.0  # between two looks whether a model can be loaded, where none is left


@contextlib.contextmanager
def _refusing(param: str | None) -> Iterator[None]:
    """What the agent refuses here is the client's to change: the field `param` of its request."""
    try:
        yield
    except AgentError as error:
        raise Problem(400, str(error), param=param, code="invalid_value") from None


@dataclasses.dataclass(frozen=True)
class Begun:
    """A job's turn has come."""

    fingerprint: str


class Service:
    """One agent, its line and its roster. deadline_s: for requests that name none. places: how many may wait."""

    def __init__(self, lab: "Lab", agent: "Agent", adapter: str, places: int, deadline_s: float | None = None) -> None:
        self.agent = agent
        self.metrics = Metrics()
        self.watching = Monitor(lab.run.settings.budget, owners=OWNERS, on_alert=lambda one: _LOG.warning(one.message))
        self.roster = Roster(agent, lab.run, adapter, self.metrics)
        self._tried_s = -math.inf  # when the chain last looked whether memory has returned
        self.line = Line(self._answer, self._idle, places)
        self.metrics.queued.set_function(lambda: self.line.queued)
        self._deadline_s = deadline_s
        self._teaches_calls = lab.suite.metric == "tool_call"
        self._options = dataclasses.replace(agent.options, single_call=False)

    def completed(self, ask: Ask) -> Ask:
        """`ask` with the server's defaults. Raises Problem (400) for what the agent would refuse."""
        if ask.session_id is not None and self.agent.memory is None:
            raise Problem(400, "session_id needs a memory, and this server has none", param="session_id")
        with _refusing(None):
            checked(dataclasses.replace(self._options, **ask.options))
        with _refusing("messages"):
            check_asked(ask.task, ask.deadline_s, ask.history)
        if ask.session_id is not None:
            with _refusing("session_id"):
                check_session(ask.session_id)
        return ask if ask.deadline_s is not None else dataclasses.replace(ask, deadline_s=self._deadline_s)

    def late(self, job: Job) -> ReasoningResult:
        """The result for a job whose deadline passed in the queue."""
        return ReasoningResult(
            task_id="", prompt=job.ask.task, reasoning_steps=[], final_answer="", confidence_score=0.0,
            processing_time=job.waited_s, memory_usage=memory_stats(),
            model_info=self.agent.describe(self.agent.chain.link), state="deadline",
        )  # fmt: skip

    def exposition(self) -> bytes:
        """What is served and what the machine has, in Prometheus' text format."""
        return self.metrics.text() + self.watching.prometheus().encode()

    def ill(self) -> str:
        """Why nothing can be answered now; "" when all is well."""
        if not self.line.alive:
            return "shutting down"
        return "" if self.agent.chain.usable else "no model is left"

    def close(self) -> None:
        """End the line; the agent is its owner's to close."""
        self.line.close()

    def _idle(self) -> None:
        """Between two answers; in the line's thread. Who only looks at /health sees there that memory has returned."""
        chain = self.agent.chain
        due = not chain.usable and time.monotonic() - self._tried_s >= _AGAIN_S
        if due and chain.lock.acquire(blocking=False):  # an abandoned answer may still have it
            self._tried_s = time.monotonic()
            try:
                chain.rewind()
            finally:
                chain.lock.release()
        self.roster.refresh()

    def _answer(self, job: Job) -> None:
        """Answer one job; in the line's thread."""
        ask = job.ask
        try:
            adapter = self.roster.seat(ask.model)
        except AdapterError as error:
            job.push(Problem(404, str(error), param="model", code="model_not_found"))
            return
        except AgentlabError as error:
            job.push(Problem(500, str(error), code="adapter_failed", reason="adapter_failed"))
            return
        options = dataclasses.replace(
            self._options, **ask.options, notes=ask.session_id is not None,
            single_call=self._teaches_calls and adapter != BASE,
        )  # fmt: skip
        left_s = None if ask.deadline_s is None else job.left_s
        if left_s is not None and left_s <= 0:
            return  # the request has answered for itself
        link = self.agent.chain.links[0]
        job.push(Begun(replies.fingerprint(self.agent.describe(link))))
        steps = self.agent.run(
            ask.task, deadline_s=left_s, session_id=ask.session_id, history=ask.history, options=options,
            cancel=job.cancel,
        )  # fmt: skip
        for step in steps:
            spoken = isinstance(step, Delta) and step.part == "answer"
            if spoken or isinstance(step, Generated | Retracted | FellBack | Recovered | Answered):
                job.push(step)
            if isinstance(step, Answered):
                for text in step.result.fallbacks:
                    _LOG.warning("%s", text)
