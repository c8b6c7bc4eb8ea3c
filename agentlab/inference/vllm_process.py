"""vLLM's process: the environment that it is started in, and what its words and its end mean."""

import os
import signal

from agentlab.hardware.oom import says_out_of_memory
from agentlab.inference.contract import EngineBroken, EngineError, OutOfMemoryError
from agentlab.inference.worker_process import ChildDied


def environment(device: str, threads: int | None) -> dict[str, str]:
    """This process's environment, but for what would overrule what vLLM is told and what was planned."""
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is process enough
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule kv_cache_memory_bytes
    env.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # the old one computes all logits of a scored prompt at once
    if device == "cpu":  # vLLM pins threads to cores, where spinning ones keep everybody else waiting
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if threads is not None and threads < len(os.sched_getaffinity(0)):
            env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    elif "PYTORCH_CUDA_ALLOC_CONF" not in env:  # weights that sleep in pinned RAM take no more than they are
        env.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_round_threshold_mb:1")
    return env


def error_of(text: str) -> EngineError:
    """OutOfMemoryError where vLLM or CUDA says that memory was lacking."""
    return OutOfMemoryError(text) if says_out_of_memory(text) else EngineError(text)


def not_started(text: str, died: ChildDied) -> EngineError:
    """What it means that the process ended before it was ready."""
    return OutOfMemoryError(text) if _lacked_memory(died) else EngineError(text)


def broken(died: ChildDied) -> EngineError:
    """What a dead process means to whoever waits for its answer."""
    text = f"the vLLM process {died}"
    return OutOfMemoryError(text) if _lacked_memory(died) else EngineBroken(text)


def _lacked_memory(died: ChildDied) -> bool:
    """Whether the process, its log or the kernel says so: SIGKILL is the kernel's way where RAM is lacking, which no
    log tells of. A person's is not told apart, and costs a step down that is undone."""
    return died.code == -signal.SIGKILL or says_out_of_memory(f"{died}\n{died.log}")
