"""The recogniser against errors that libraries raise here for real, and the words in their installed sources."""

import errno
import importlib.util
import json
import mmap
import os
import re
import struct
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from agentlab.errors import AgentlabError, ModelError, StorageError
from agentlab.hardware.oom import is_out_of_memory, let_go, says_out_of_memory
from agentlab.inference import EngineError, OutOfMemoryError

HUGE = 2**50  # bytes; no machine grants them


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(HUGE, dtype=torch.uint8),
        lambda: np.empty(HUGE, dtype=np.uint8),
        lambda: bytearray(HUGE),
        lambda: mmap.mmap(-1, 2**46),
    ],
    ids=["torch", "numpy", "python", "mmap"],
)
def test_what_is_raised_here_when_more_is_asked_for_than_there_is(ask):
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        ask()
    assert is_out_of_memory(caught.value)


def test_safetensors_that_cannot_be_mapped(tmp_path):
    size = 8 * 2**30
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # sparse: it takes no room on the disk
    script = (
        "import resource, sys\n"
        "from safetensors import safe_open\n"
        "from agentlab.hardware.oom import is_out_of_memory\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**30, resource.RLIM_INFINITY))\n"
        "try:\n    safe_open(sys.argv[1], 'np')\n"
        "except Exception as error:\n    print(is_out_of_memory(error))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (ValueError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (ValueError("cudaErrorMemoryAllocation: the API call failed"), True),
        (ValueError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, opa, opb)`"), False),
        (ValueError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("Failed to allocate memory for the workspace"), True),
        (ValueError("failed to allocate memory"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError("Cannot allocate memory (os error 12)"), True),
        (OutOfMemoryError("not even one request fits into the device's memory"), True),
        (ValueError("Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the "
                    "quantized model. If you want"), True),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), True),
        (ValueError("Free memory on device cuda:0 (3.1/6.0 GiB) on startup is less than desired GPU memory "
                    "utilization (0.9, 5.4 GiB)"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1131, please '
                      "report a bug to PyTorch."), True),  # where torch asks the driver, in vain, who has the memory
        (RuntimeError('r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":9, please'), False),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), False),  # glibc's, of a few bytes
        (OSError("libgomp.so.1: cannot allocate memory in static TLS block"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("No space left on device (os error 28)"), False),
        (RuntimeError("unable to write file: No space left on device, out of memory map"), False),
        (StorageError("the disk is full"), False),
        (EngineError("a prompt of 9 tokens and 8 new ones exceed the model's context of 16 tokens"), False),
        (EngineError("the person wrote: CUDA out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (KeyError("memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_out_of_memory_is_recognised_by_type_and_message(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_cause_counts_and_a_circle_of_causes_ends():
    wrapped = ModelError("the model cannot be loaded")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    first, second = AgentlabError("one"), AgentlabError("two")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


@pytest.mark.parametrize(
    ("package", "file", "words"),
    [
        ("vllm", "v1/core/kv_cache_utils.py", "No available memory for the cache blocks"),
        ("vllm", "v1/core/kv_cache_utils.py", "cache is needed, which is larger than the available KV cache memory"),
        ("vllm", "v1/worker/utils.py", "is less than desired GPU memory utilization"),
        ("vllm", "v1/worker/utils.py", "is less than the engine's budget"),
        ("transformers", "quantizers/quantizer_bnb_4bit.py", "enough GPU RAM to fit the quantized model"),
        ("transformers", "quantizers/quantizer_bnb_8bit.py", "enough GPU RAM to fit the quantized model"),
        ("accelerate", "utils/memory.py", "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_the_words_are_those_in_the_installed_sources(package, file, words):
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    source = re.sub(r'"\s*\n\s*f?"', "", (Path(folder) / file).read_text())  # literals that are broken over lines
    assert words in source, f"{package} says it in other words now"
    assert says_out_of_memory(f"ValueError: {words}", certain=True)


def test_the_allocators_words_are_those_in_torchs_own_library():
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    assert b"DefaultCPUAllocator: can't allocate memory" in library.read_bytes()


def test_a_dead_processs_log_tells():
    assert says_out_of_memory("went silent; its log ends: torch.OutOfMemoryError: CUDA out of memory.")
    assert says_out_of_memory(f"terminate called after throwing; {os.strerror(errno.ENOMEM)}")
    assert not says_out_of_memory("ended with SIGTERM; its log ends: EngineCore encountered an issue")


def test_what_a_failed_call_held_is_free_while_its_error_lives():
    class Large:
        pass

    held = []

    def work():
        tensor = Large()
        held.append(weakref.ref(tensor))
        raise RuntimeError("CUDA out of memory")

    try:
        try:
            work()
        except RuntimeError as error:
            raise OutOfMemoryError("not even one request fits") from error
    except OutOfMemoryError as error:
        assert held[0]() is not None
        let_go(error)
        assert held[0]() is None
