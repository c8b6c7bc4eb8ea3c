"""vLLM in a process of its own: takes requests as messages, steps the engine, sends each step's tokens.

From the parent: {"start": engine arguments, "allowed": share of the GPU's memory or null}; then any of {"answer": key,
"prompt", …}, {"abort": [keys]} and {"call": id, "what", …}. To the parent: {"ready": {}} or {"failed": text};
{"step": [[key, tokens, logprobs, finish, cached tokens]], "at": monotonic seconds}, after a long step also where it
brought no tokens; {"refused": key, "why": text}, {"result": id, "value"} and {"error": id, "why": text}.
"""

import json
import queue
import threading
import time
from typing import Any

from agentlab.inference.vllm_settings import SCORED_TOKENS
from agentlab.inference.worker_process import Channel, Message, die_with_parent, end_group, parents_channel

LONG_STEP_S = 1.0


def main() -> None:
    """Serve until the parent closes the conversation."""
    die_with_parent()
    channel = parents_channel()
    first = channel.receive()
    assert first is not None
    try:
        if first["allowed"] is not None:
            _limit_memory(first["allowed"])
        worker = Worker(channel, first["start"])
    except BaseException as error:  # whatever stops vLLM is for the parent to say
        channel.send({"failed": _text(error)})
        raise
    channel.send({"ready": {}})
    threading.Thread(target=_read, args=(channel, worker.inbox), daemon=True).start()
    worker.run()


def _limit_memory(share: float) -> None:
    """Have the allocator refuse more than this share of the GPU: what was planned wrongly must not cost the others."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))


def _limit_logits() -> None:
    """Have vLLM compute the logits of a scored prompt in smaller parts than its own, which are planned for."""
    from vllm.v1.worker.gpu.sample import prompt_logprob

    prompt_logprob.CHUNK_SIZE = SCORED_TOKENS


def _read(channel: Channel, inbox: "queue.Queue[Message]") -> None:
    try:
        while (message := channel.receive()) is not None:
            inbox.put(message)
    except (EOFError, OSError):
        end_group()  # a step may be running on the main thread: nobody waits for it


class Worker:
    """The engine and the conversation about it."""

    def __init__(self, channel: Channel, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        _limit_logits()
        self.channel = channel
        self.inbox: queue.Queue[Message] = queue.Queue()
        self.scoring: dict[str, Message] = {}
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def run(self) -> None:
        """Never returns: messages while there are any, steps while there are requests."""
        while True:
            busy = self.engine.has_unfinished_requests()
            while not (busy and self.inbox.empty()):
                self._take(self.inbox.get())
                busy = self.engine.has_unfinished_requests()
            self._step()

    def _take(self, message: Message) -> None:
        if "answer" in message:
            try:
                self._add(message)
            except Exception as error:  # vLLM refuses requests with many kinds
                self.channel.send({"refused": message["answer"], "why": _text(error)})
        elif "abort" in message:
            self.engine.abort_request([str(key) for key in message["abort"]])
        else:
            try:
                value = getattr(self, f"do_{message['what']}")(message)
            except Exception as error:
                self.channel.send({"error": message["call"], "why": _text(error)})
            else:
                if message["what"] != "score":  # that one is answered by a later step
                    self.channel.send({"result": message["call"], "value": value})

    def _step(self) -> None:
        rows = []
        started = time.monotonic()
        for output in self.engine.step():
            if output.request_id in self.scoring:
                self._scored(output)
                continue
            (new,) = output.outputs
            logprobs = None
            if new.logprobs is not None:
                logprobs = [one[token].logprob for token, one in zip(new.token_ids, new.logprobs, strict=True)]
            cached = output.num_cached_tokens or 0
            rows.append([int(output.request_id), list(new.token_ids), logprobs, new.finish_reason, cached])
        now = time.monotonic()
        if rows or now - started > LONG_STEP_S:  # a part of a long prompt was read: the parent takes silence for death
            self.channel.send({"step": rows, "at": now})

    def _add(self, message: Message) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        tag = message["structure"]
        params = SamplingParams(
            temperature=message["temperature"],
            seed=message["seed"],
            max_tokens=message["max_tokens"],
            stop=message["stop"],
            stop_token_ids=message["stop_ids"],
            logprobs=0 if message["logprobs"] else None,
            detokenize=bool(message["stop"]),
            skip_special_tokens=False,
            skip_reading_prefix_cache=not message["reuse_prompt"],
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=None if tag is None else StructuredOutputsParams(structural_tag=json.dumps(tag)),
        )
        self.engine.add_request(
            str(message["answer"]),
            {"prompt_token_ids": message["prompt"]},
            params,
            lora_request=_lora(message["adapter"]),
        )

    # -- calls --------------------------------------------------------------------------------------------------------

    def do_load(self, message: Message) -> bool:
        return bool(self.engine.add_lora(_lora(message["adapter"])))

    def do_unload(self, message: Message) -> bool:
        return bool(self.engine.remove_lora(message["number"]))

    def do_pin(self, message: Message) -> bool:
        self.engine.add_lora(_lora(message["adapter"]))  # it may be on disk alone by now
        return bool(self.engine.pin_lora(message["adapter"][1]))

    def do_measure(self, message: Message) -> float:
        """Peak MiB that the allocator has reserved."""
        import torch

        return float(torch.cuda.max_memory_reserved()) / 2**20

    def do_sleep(self, message: Message) -> None:
        self.engine.reset_prefix_cache()
        self.engine.sleep(level=1)

    def do_wake(self, message: Message) -> None:
        self.engine.wake_up()

    def do_score(self, message: Message) -> None:
        """Log-probabilities of the prompt's tokens from `start` on, each given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        name = f"score-{message['call']}"
        self.engine.add_request(
            name, {"prompt_token_ids": message["prompt"]}, params, lora_request=_lora(message["adapter"])
        )
        self.scoring[name] = message

    def _scored(self, output: Any) -> None:
        if not output.finished:
            return
        message = self.scoring.pop(output.request_id)
        rows, prompt = output.prompt_logprobs, message["prompt"]
        found = [float(rows[at][prompt[at]].logprob) for at in range(message["start"], len(prompt))]
        self.channel.send({"result": message["call"], "value": found})


def _lora(adapter: list[Any] | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    name, number, folder = adapter
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=folder)


def _text(error: BaseException) -> str:
    """The error's causes in one line, the first one first: vLLM wraps what went wrong in what it was doing."""
    causes: list[str] = []
    found: BaseException | None = error
    while found is not None:
        causes.append(" ".join(str(found).split()) or type(found).__name__)
        found = found.__cause__ or found.__context__
    return "; ".join(dict.fromkeys(reversed(causes)))[:2000]


if __name__ == "__main__":
    main()
