"""Do the pins resolve where torch is the public index's CUDA build? A CPU's build declares less and hides conflicts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
# each extra and Python needs another one
UNPINNED = {"setuptools"}

pytestmark = pytest.mark.soak


def _resolve(extra: str, python: str) -> subprocess.CompletedProcess[str]:
    # neither settings of this machine's packages nor an index of other builds: what a stranger's machine has
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", extra, "--extra", "dev",
         "--constraints", str(CONSTRAINTS), "--python-version", python, "--python-platform", "x86_64-manylinux_2_28",
         "--no-config", "--no-header", "--no-annotate", "--no-progress", "--quiet"],
        cwd=ROOT, env=kept, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


# 3.11.2 is the Python of a Debian that many machines still run
@pytest.mark.parametrize("python", ["3.11.2", "3.12", "3.13"])
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_pins_resolve_and_nothing_is_left_to_chance(extra: str, python: str) -> None:
    done = _resolve(extra, python)
    if re.search(r"dns error|failed to (?:fetch|connect)|connection (?:refused|timed out)", done.stderr, re.IGNORECASE):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    chosen = {canonicalize_name(re.split(r"[\[= ]", line, maxsplit=1)[0]) for line in done.stdout.splitlines() if line}
    pinned = {
        canonicalize_name(line.partition("==")[0]) for line in CONSTRAINTS.read_text().splitlines() if "==" in line
    }
    assert chosen - pinned <= UNPINNED
