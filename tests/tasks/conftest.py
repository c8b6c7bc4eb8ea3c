"""Where the real data lie."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real data to measure with; absent in a plain clone."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("AGENTLAB_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no measurement data in {folder}; set AGENTLAB_DATA to the folder that holds it")
    return folder
