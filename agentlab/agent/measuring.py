"""How fast an engine is just now, found out by asking it something short."""

from collections.abc import Callable

from agentlab.agent.budget import Budget, Speed
from agentlab.inference.contract import Engine, Request

_MESSAGES = [{"role": "user", "content": "Hello, say a few words about the weather of the four seasons, please."}]
_TOKENS = 8


def measure(engine: Engine, adapter: str | None, speed: Speed, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Put what is measured now in the place of what `speed` knew."""
    found, budget, first_s = Speed(), Budget(None), 0.0
    request = Request(_MESSAGES, adapter=adapter, max_new_tokens=_TOKENS, reuse_prompt=False)
    for chunk in engine.stream(request, should_stop):
        first_s = first_s or budget.elapsed_s
        if (done := chunk.completion) is not None and done.completion_tokens:
            found.observe(done.prompt_tokens, first_s, max(done.completion_tokens, 2), budget.elapsed_s)
    if found.known:
        speed.prefill_tokens_per_s, speed.decode_tokens_per_s = found.prefill_tokens_per_s, found.decode_tokens_per_s
