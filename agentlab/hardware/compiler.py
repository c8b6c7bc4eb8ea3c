"""What Triton, with which TRL, xgrammar and vLLM compute on a GPU, needs of the machine to compile with at run time."""

import os
import shutil
import sysconfig
from pathlib import Path

REMEDY = "install it (on Debian and Ubuntu: apt install gcc python3-dev)"


def missing() -> str:
    """What is missing to compile kernels for a GPU, as Triton 3.7 looks for it; "" where nothing is."""
    if not os.environ.get("CC") and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    header = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"], "Python.h")
    return "" if header.is_file() else f"Python's C headers ({header})"
