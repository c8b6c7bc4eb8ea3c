"""One answer of the agent as an MLflow trace: spans of the agent, its model, its tools and what it recalled.

A trace is written after the answer is out, from its steps and their times, so that the timed path pays nothing for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.agent.steps import Answered, Generated, Observed, Recalled, Step, ToolCalled
from agentlab.errors import StorageError
from agentlab.tracking import store
from agentlab.tracking.runs import experiment_of

if TYPE_CHECKING:
    from agentlab.agent.steps import ReasoningResult


def write_trace(root: Path, experiment: str, steps: Sequence[Step]) -> str:
    """The id of the trace, in the project's store; `steps` are all of one answer. Raises StorageError."""
    import mlflow
    from mlflow.entities import SpanType

    answered = next((step for step in reversed(steps) if isinstance(step, Answered)), None)
    if answered is None:
        raise StorageError("these steps have no answer at their end; allowed: all steps of one answer")
    result = answered.result
    client = store.configure(root)
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(store.uri(root))
        top = mlflow.start_span_no_context(
            "agent", SpanType.AGENT, inputs={"task": result.prompt, "session_id": result.session_id},
            tags=_tags(result), experiment_id=experiment_of(client, root, experiment),
            start_time_ns=_ns(answered.time_s - result.processing_time),
        )  # fmt: skip
        called: ToolCalled | None = None
        for step in steps:
            if isinstance(step, ToolCalled):
                called = step
            described = _described(step, called)
            if described is None:
                continue
            kind, name, inputs, outputs, attributes, seconds, ok = described
            span = mlflow.start_span_no_context(
                name, getattr(SpanType, kind), parent_span=top, inputs=inputs, attributes=attributes,
                start_time_ns=_ns(step.time_s - seconds),
            )  # fmt: skip
            span.end(outputs=outputs, status="OK" if ok else "ERROR", end_time_ns=_ns(step.time_s))
        top.end(
            outputs={"final_answer": result.final_answer, "state": result.state, "error": result.error},
            attributes={"confidence": result.confidence_score, "fallbacks": result.fallbacks},
            status="ERROR" if result.state == "failed" else "OK", end_time_ns=_ns(answered.time_s),
        )  # fmt: skip
        mlflow.flush_trace_async_logging()
        return str(top.trace_id)
    except Exception as error:
        if not store.is_store_error(error):
            raise
        raise StorageError(f"the trace cannot be written to {store.database(root)}: {error}") from error
    finally:
        mlflow.set_tracking_uri(before)


_Described = tuple[str, str, Any, Any, dict[str, Any], float, bool]


def _described(step: Step, called: ToolCalled | None) -> _Described | None:
    """(span type, name, inputs, outputs, attributes, seconds, ok) of a step that took time; None for the others."""
    if isinstance(step, Recalled):
        return "RETRIEVER", "recall", {"query": step.query}, step.memory_ids, {}, step.seconds, True
    if isinstance(step, Generated):
        attributes = {
            "model": step.model_info.model, "adapter": step.model_info.adapter or "", "confidence": step.confidence,
            "prompt_tokens": step.prompt_tokens, "completion_tokens": step.completion_tokens,
            "finish_reason": step.finish_reason,
        }  # fmt: skip
        return "CHAT_MODEL", "model", {"messages": step.messages}, step.text, attributes, step.seconds, True
    if isinstance(step, Observed):
        arguments = called.arguments if called is not None else {}
        return "TOOL", step.name, arguments, step.text, {"problem": step.problem or ""}, step.seconds, step.ok
    return None


def _tags(result: "ReasoningResult") -> dict[str, str]:
    info = result.model_info
    return {"agentlab.run": info.run, "agentlab.adapter_id": info.adapter or "", "agentlab.state": result.state}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
