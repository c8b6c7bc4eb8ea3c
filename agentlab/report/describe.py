"""An event in one line of plain words, for terminals and logs."""

from agentlab import events
from agentlab.events import Event
from agentlab.records import BASE
from agentlab.report import words

_PROBLEMS = {"nan": "the loss is not a number", "divergence": "the loss diverged"}
_GIVEN_UP = {
    "shrink_context": "context", "offload_adapters": "adapters beside it", "lower_rung": "rung",
    "close_idle": "models kept for later", "shrink_batch": "batch",
}  # fmt: skip


def describe(event: Event) -> str | None:
    """One line about an event worth a line; None for progress ticks. Text from outside comes without control codes."""
    text = _line(event)
    return words.clean(text) if text is not None else None


def is_notice(event: Event) -> bool:
    """Whether the event is one to keep in sight: a verdict, a promotion, a failure, a warning."""
    return isinstance(
        event,
        events.Warned | events.RemedyApplied | events.RecoveryStep | events.CandidateFailed | events.GateDecided
        | events.Promoted | events.GenerationFailed | events.SealedComparison | events.Stopped,
    )  # fmt: skip


def model_name(adapter: str) -> str:
    """ "the base model" or the adapter's id."""
    return "the base model" if adapter == BASE else adapter


def _line(event: Event) -> str | None:  # noqa: PLR0911, PLR0912 - one case per kind of event reads best as one table
    match event:
        case events.EvolutionStarted():
            verb = "continuing" if event.continued else "starting"
            each = words.counted(event.population, "candidate")
            return f"{verb} {event.run}: {words.counted(event.generations, 'generation')} of {each} each"
        case events.GenerationStarted():
            return f"generation {event.generation} {'continues' if event.continued else 'starts'} (pid {event.pid})"
        case events.ModelLoaded():
            size = f"{event.parameters / 1e6:,.0f} M parameters"
            where = f"{event.engine}, {event.device}," if event.engine == "vllm" else event.device
            return f"loaded {event.model} ({size}) on {where} in {event.seconds:.1f} s"
        case events.Calibrated():
            return (f"this machine reads {event.prefill_tokens_per_s:,.0f} and writes "
                    f"{event.decode_tokens_per_s:,.0f} tokens/s")  # fmt: skip
        case events.RemedyApplied():
            change = f"learning rate {event.learning_rate:.2g}, batch {event.batch_size} × {event.accumulation}"
            problem = _PROBLEMS.get(event.problem, event.problem)
            return f"{event.candidate}: {problem}; {event.action} ({change})".replace("_", " ")
        case events.RecoveryStep():
            why = event.reason if event.undone else "memory is short"
            return f"{event.model}: {why}; {_GIVEN_UP.get(event.action, 'model')} {event.source} → {event.target}"
        case events.Focused():
            return (f"{event.candidate} learns first what it would get wrong: {event.doubted} of "
                    f"{words.counted(event.items, 'item')} that it looked at")  # fmt: skip
        case events.Trained() if event.loss is None:
            return f"{event.candidate} merged, without training"
        case events.Trained():
            return (f"{event.candidate} trained in {words.duration(event.train_seconds)}, "
                    f"{event.train_tokens:,} tokens, loss {event.loss:.3f}")  # fmt: skip
        case events.Evaluated():
            interval = words.interval(event.accuracy_ci_low, event.accuracy_ci_high)
            fitness = "" if event.fitness is None else f", fitness {event.fitness:.3f}"
            return (f"{model_name(event.candidate)} on {event.split}: {words.percent(event.accuracy)} ({interval}) of "
                    f"{words.counted(event.items, 'item')}{fitness}")  # fmt: skip
        case events.CandidateFailed():
            return f"{event.candidate} failed: {event.reason}"
        case events.Selected():
            left = f"; culled: {', '.join(event.culled)}" if event.culled else ""
            return f"pool after generation {event.generation}: {', '.join(event.pool) or 'empty'}{left}"
        case events.GateDecided():
            return f"gate {'passed' if event.passed else 'not passed'}: {event.verdict}"
        case events.Promoted():
            low = ", below the accuracy threshold" if event.below_threshold else ""
            return f"★ {event.adapter} is champion instead of {model_name(event.previous)}{low}"
        case events.Warned():
            return f"! {event.message}"
        case events.Waiting():
            return f"waiting: {event.reason}"
        case events.GenerationFinished():
            return (f"generation {event.generation} finished in {words.duration(event.seconds)}; champion: "
                    f"{model_name(event.champion)}")  # fmt: skip
        case events.GenerationFailed():
            reason = event.error.strip().splitlines()[-1] if event.error.strip() else "no reason given"
            return f"generation {event.generation} failed: {reason}"
        case events.SealOpened():
            return f"sealed test opened (opening {event.opening})"
        case events.SealedComparison():
            interval = f"{100 * event.gain_ci_low:+.1f} to {100 * event.gain_ci_high:+.1f}"
            base, champion = words.percent(event.base_accuracy), words.percent(event.champion_accuracy)
            gain = f"gain {words.points(event.gain)} ({interval})"
            return f"sealed test: base {base}, {model_name(event.champion)} {champion}, {gain}"
        case events.EvolutionFinished():
            return f"finished in {words.duration(event.seconds)}; champion: {model_name(event.champion)}"
        case events.Stopped():
            return f"stopped: {event.reason}"
    return None
