"""What answers and what learns in a run: one object on the transformers engine, else two that take turns."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from agentlab import inference
from agentlab.config import RungName, Settings
from agentlab.errors import AgentlabError, RunError
from agentlab.events import Event, ModelLoaded, ModelLoading, Warned
from agentlab.hardware import compiler, monitor
from agentlab.inference import Engine
from agentlab.inference.opening import EngineName, beside_learner, beside_sleeping
from agentlab.models import ModelFiles

if TYPE_CHECKING:
    from agentlab.inference.templates import TemplatedEngine
    from agentlab.inference.transformers_engine import TransformersEngine
    from agentlab.inference.vllm_engine import VllmEngine


class Engines:
    """The engine that answers and the resident model that learns, of which one has the device at a time.

    Each is opened when it is first needed. On the transformers engine both are one object, which stays.
    """

    def __init__(
        self, settings: Settings, model: ModelFiles, name: EngineName, emit: Callable[[Event], None],
        rung: RungName | None = None,
    ) -> None:  # fmt: skip
        """rung: the run's, of everything that it trains and scores. Raises RunError for an engine that only answers."""
        check_learns(settings)
        self.name = name
        self.model_files = model
        self._settings = settings
        self._rung = rung
        self._emit = emit
        self._learner: TransformersEngine | None = None
        self._vllm: VllmEngine | None = None

    def answering(self) -> Engine:
        """The engine that the run's scores come from, awake."""
        if self.name == "transformers":
            return self.learning()
        if self._learner is not None:
            self._learner.close()
            self._learner = None
        if self._vllm is None:
            self._vllm = cast("VllmEngine", self._open("vllm"))
        elif self._vllm.wake():
            self._emit(
                Warned(message="vLLM was started anew: it could not sleep, or answered differently after it had slept")
            )
        return self._vllm

    def rehearse(self) -> None:
        """Have vLLM do once what this run will ask of it. Raises EngineError or ModelError where it cannot."""
        self.answering()
        assert self._vllm is not None
        self._vllm.rehearse()

    def learning(self) -> "TransformersEngine":
        """The resident model, which trains."""
        if self._vllm is not None:
            self._vllm.sleep()
        if self._learner is None:
            self._learner = cast("TransformersEngine", self._open("transformers"))
        return self._learner

    def templates(self) -> "TemplatedEngine":
        """Whichever of them is loaded, for what only needs the tokenizer."""
        return self._learner or self._vllm or self.learning()

    def _open(self, name: EngineName) -> Engine:
        self._emit(ModelLoading(model=self.model_files.name, engine=name))
        started = time.monotonic()
        settings = self._settings
        if name == "vllm":
            settings = beside_learner(settings)
        elif self._vllm is not None:
            settings = beside_sleeping(settings, self._vllm.asleep_bytes())
        engine = inference.open_engine(settings, self.model_files, name, self._rung)
        engine.tell = self._emit
        if engine.note:
            self._emit(Warned(message=engine.note))
        self._emit(
            ModelLoaded(
                model=self.model_files.name,
                engine=engine.name,
                device=engine.device,
                parameters=engine.parameters(),
                seconds=time.monotonic() - started,
            )
        )
        return engine

    def close(self) -> None:
        """Free both."""
        for engine in (self._learner, self._vllm):
            if engine is not None:
                engine.close()
        self._learner = self._vllm = None


def check_learns(settings: Settings) -> None:
    """Raise RunError for an engine whose model is not on this machine, AgentlabError where a GPU could not train."""
    if settings.model.engine == "openai":
        raise RunError(
            "model.engine: 'openai' only answers, nothing is learned on a server; allowed for an evolution: auto, "
            "transformers, vllm"
        )
    if monitor.accelerator() == "cuda" and (missing := compiler.missing()):
        raise AgentlabError(f"training on a GPU compiles kernels, for which {missing} is missing; {compiler.REMEDY}")
