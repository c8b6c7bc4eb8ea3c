"""What a client gets, in OpenAI's form: completions, chunks of a stream, the text of an answer as it is written."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlab.agent import ModelInfo, ReasoningResult

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": waiting\n\n"


class Content:
    """The text that a client sees of an answer while it is written; blanks around it are left out.

    A turn that proved to be no answer (a call came after some words, another model took over) cannot be taken back:
    what follows begins a paragraph of its own.
    """

    def __init__(self) -> None:
        self.text = ""  # all that was handed out
        self._turn = ""  # of it, what belongs to the turn that is being written
        self._blanks = ""
        self._over = False

    def feed(self, piece: str) -> str:
        """What may be shown now that the model wrote `piece`."""
        if self._over:
            self._turn, self._blanks, self._over = "", "", False
        piece = self._blanks + piece
        if not self._turn:
            piece = piece.lstrip()
        kept = piece.rstrip()
        self._blanks = piece[len(kept) :]
        return self._hand_out(kept)

    def turn_over(self) -> None:
        """What the model writes next is another turn."""
        self._over = True

    def finish(self, answer: str) -> str:
        """What is missing of the whole answer."""
        if answer.startswith(self._turn):
            return self._hand_out(answer[len(self._turn) :])
        self._turn = ""
        return self._hand_out(answer)

    def _hand_out(self, piece: str) -> str:
        if not piece:
            return ""
        shown = f"\n\n{piece}" if self.text and not self._turn else piece
        self.text += shown
        self._turn += piece
        return shown


@dataclasses.dataclass(frozen=True)
class Heading:
    """What all parts of one reply have in common."""

    id: str
    created: int  # seconds since the epoch
    model: str  # as the client named it

    def completion(self, result: "ReasoningResult", run: str) -> dict[str, Any]:
        """The whole answer as one object."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": result.final_answer, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason(result),
        }
        return {
            **self._common("chat.completion", fingerprint(result.model_info)),
            "choices": [choice],
            "usage": usage(result),
            "agentlab": extra(result, run),
        }

    def chunk(
        self, who: str, delta: dict[str, Any], finish: str | None = None, **fields: Any
    ) -> dict[str, Any]:  # fmt: skip
        """One piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._common("chat.completion.chunk", who), "choices": [choice], **fields}

    def usage_chunk(self, who: str, result: "ReasoningResult") -> dict[str, Any]:
        """The last piece, for a client that asked for the numbers of tokens."""
        return {**self._common("chat.completion.chunk", who), "choices": [], "usage": usage(result)}

    def _common(self, kind: str, who: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": who,
        }  # fmt: skip


def fingerprint(info: "ModelInfo") -> str:
    """Which adapter on which weights, in one word: `g001-c02-5b9c…`; the same word, the same weights."""
    sha256 = info.adapter_sha256 or info.model_sha256
    return f"{info.adapter or 'base'}-{sha256[:12] or info.model}"


def finish_reason(result: "ReasoningResult") -> str:
    """ "stop" for a whole answer, "length" for one that its limit of tokens or its deadline cut."""
    return "stop" if result.state == "answered" and not result.cut_short else "length"


def usage(result: "ReasoningResult") -> dict[str, int]:
    """Tokens read and written, those of thoughts and calls included."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }


def extra(result: "ReasoningResult", run: str, streamed: str | None = None) -> dict[str, Any]:
    """The field `agentlab` of a reply: who answered, how sure it is, and what was done on the way.

    streamed: what a stream has shown; where that is more than the answer, the answer is in it once more.
    """
    info = result.model_info
    told = {} if streamed in (None, result.final_answer) else {"answer": result.final_answer}
    return {
        "run": run,
        "adapter": info.adapter or "base",
        "answer_adapter": result.answer_adapter or "base",
        "model": info.model,
        "role": info.role,
        "state": result.state,
        "confidence": result.confidence_score,
        "seconds": result.processing_time,
        "steps": [dataclasses.asdict(step) for step in result.reasoning_steps],
        "memories": list(result.context_used),
        "warnings": list(result.warnings),
        "fallbacks": list(result.fallbacks),
        **told,
    }


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, default=str)}\n\n"
