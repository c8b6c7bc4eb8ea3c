"""Whether an error means that memory was lacking, by its type and by the words of the libraries that raise it."""

import errno
import re
import traceback

# Words that mean a lack of memory whoever says them, and in whatever class of error.
_CERTAIN = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|MPS backend out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"  # cuDNN 9
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"  # by name, of the runtime and of the driver
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|Error out of memory at line \d+ in file"  # bitsandbytes' kernels, before they end the process
    r"|enough GPU RAM to fit the\s+quantized model"  # transformers, before it loads through bitsandbytes
    r"|No available memory for the cache blocks"  # vLLM's start, down to the next
    r"|is less than (desired \w+ memory utilization|the engine's budget)"
    r"|larger than the available KV cache memory"
    # the operating system's, in Python, Rust and C; glibc says it also of a library that was loaded too late
    r"|cannot allocate memory(?! in static TLS)|os error 12\b"
    # torch's allocator, where it cannot ask the driver who has the memory that is lacking
    r"|NVML_SUCCESS == \w+ INTERNAL ASSERT FAILED at .{0,200}CUDACachingAllocator"
    r"|std::bad_alloc|torch\.OutOfMemoryError",
    re.IGNORECASE,
)
# Words that also appear where somebody only speaks of memory: they count in a RuntimeError and in a process's log.
# cuBLAS says that it is not initialised where no memory is left for a handle, but also after other failures.
_LIKELY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|failed to allocate memory"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    re.IGNORECASE,
)
_DISK = re.compile(r"no space left on device|disk quota exceeded|os error 28\b", re.IGNORECASE)
_OURS = "agentlab."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is a lack of memory on a device or in RAM.

    A full disk is none, nor is a prompt beyond a model's context. Imports no library: torch's and the engines' own
    OutOfMemoryError are known by their name.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if _is_one(current):
            return True
        current = current.__cause__
    return False


def let_go(error: BaseException) -> None:
    """Drop what the frames of a failed call hold: while the error lives, they keep the tensors that were too many."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        waiting += [current.__cause__, current.__context__]


def _is_one(error: BaseException) -> bool:
    if not isinstance(error, Exception):
        return False
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if type(error).__module__.startswith(_OURS):
        return False  # this program's own errors say what they are by their class; text of theirs may quote anything
    return says_out_of_memory(str(error), certain=not isinstance(error, RuntimeError | OSError))


def says_out_of_memory(text: str, *, certain: bool = False) -> bool:
    """Whether a message, or the end of a dead process's log, tells of a lack of memory.

    certain: only words that mean nothing else.
    """
    if _DISK.search(text) and not _CERTAIN.search(text):
        return False
    return bool(_CERTAIN.search(text)) or (not certain and bool(_LIKELY.search(text)))
