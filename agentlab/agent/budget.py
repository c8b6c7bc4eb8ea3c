"""How long an answer may take, and how many tokens and steps fit into what is left of it."""

import dataclasses
import math
import threading
import time

UNBOUNDED = 10**9
_WEIGHT = 0.3  # of the newest measurement; speeds change with load and length
_DOUBTED_EVERY_S = 30.0  # a machine that is too slow pays for being measured anew no more often
_LEAST_READ = 32  # tokens; the time of fewer says nothing about reading


@dataclasses.dataclass
class Speed:
    """What an engine was measured to do on this machine, tokens per second; 0 until something was measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    doubted_at: float = -math.inf  # when it was last measured anew because nothing seemed to fit

    @property
    def known(self) -> bool:
        return self.prefill_tokens_per_s > 0 and self.decode_tokens_per_s > 0

    def doubted(self) -> bool:
        """Whether it may be measured anew where nothing seems to fit: once in a while, which is noted.

        A measurement of a moment when the machine was busy would keep every answer with a deadline from being begun,
        and so from measuring anything else.
        """
        now = time.monotonic()
        if now - self.doubted_at < _DOUBTED_EVERY_S:
            return False
        self.doubted_at = now
        return True

    def observe(self, prompt_tokens: int, first_token_s: float, new_tokens: int, total_s: float) -> None:
        """Take in one generation: its first token came after `first_token_s`, its last after `total_s`.

        prompt_tokens: those that were read for it, without what an earlier generation had read.
        """
        if first_token_s > 0 and (prompt_tokens >= _LEAST_READ or (prompt_tokens and not self.prefill_tokens_per_s)):
            self.prefill_tokens_per_s = _mixed(self.prefill_tokens_per_s, prompt_tokens / first_token_s)
        if new_tokens > 1 and total_s > first_token_s:
            self.decode_tokens_per_s = _mixed(self.decode_tokens_per_s, (new_tokens - 1) / (total_s - first_token_s))

    def seconds(self, prompt_tokens: int, new_tokens: int) -> float:
        """How long such a generation should take; 0 where nothing is known."""
        if not self.known:
            return 0.0
        return prompt_tokens / self.prefill_tokens_per_s + new_tokens / self.decode_tokens_per_s


def _mixed(old: float, new: float) -> float:
    return new if old == 0 else (1 - _WEIGHT) * old + _WEIGHT * new


class Budget:
    """One answer's time: a deadline, or none, and the wish of somebody to cancel it."""

    def __init__(self, deadline_s: float | None, cancel: threading.Event | None = None) -> None:
        self.started = time.monotonic()
        self.deadline_s = deadline_s
        self.cancel = threading.Event()
        self._wish = cancel  # somebody else's: it is read, never set

    def cancelled(self) -> bool:
        """Whether somebody wants the answer to end."""
        return self.cancel.is_set() or (self._wish is not None and self._wish.is_set())

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, negative after it; infinite without one."""
        return float("inf") if self.deadline_s is None else self.deadline_s - self.elapsed_s

    @property
    def work_left_s(self) -> float:
        """Seconds for work: a margin is kept, because an engine stops only between two tokens."""
        if self.deadline_s is None:
            return float("inf")
        return self.left_s - min(0.1, 0.05 * self.deadline_s)

    def over(self) -> bool:
        """Whether nothing more may be begun; polled by engines between tokens and by tools."""
        return self.cancelled() or self.work_left_s <= 0

    def tokens(self, speed: Speed, prompt_tokens: int) -> int:
        """How many new tokens fit into the time that is left after reading so many of the prompt."""
        if self.deadline_s is None or not speed.known:
            return UNBOUNDED
        room_s = self.work_left_s - prompt_tokens / speed.prefill_tokens_per_s
        return max(0, int(room_s * speed.decode_tokens_per_s))

    def steps(self, speed: Speed, prompt_tokens: int, call_tokens: int, answer_tokens: int) -> int:
        """How many calls of `call_tokens` fit before an answer of `answer_tokens`, each reading the prompt again."""
        if self.deadline_s is None or not speed.known:
            return UNBOUNDED
        one = speed.seconds(prompt_tokens, call_tokens)
        return max(0, int((self.work_left_s - speed.seconds(prompt_tokens, answer_tokens)) / max(one, 1e-6)))
