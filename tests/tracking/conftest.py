import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentlab import events
from agentlab.tracking import configure

from .helpers import Shown, Story


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once: the migrations take seconds."""
    root = tmp_path_factory.mktemp("prepared")
    configure(root)
    return root / "mlruns" / "mlflow.db"


def project(folder: Path, prepared: Path) -> Path:
    """A project whose path has what paths can have."""
    root = folder / "日本 #1 project"
    (root / "mlruns").mkdir(parents=True)
    shutil.copy(prepared, root / "mlruns" / "mlflow.db")
    return root


@pytest.fixture
def root(tmp_path: Path, prepared: Path) -> Path:
    return project(tmp_path, prepared)


@pytest.fixture
def story(root: Path) -> Iterator[Story]:
    """A run that is recorded as it happens; nothing may go wrong on the way unless the test clears the problems."""
    story = Story(root)
    yield story
    assert story.recorder is not None
    story.recorder.close()
    assert story.recorder.problems == []


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Story:
    """A whole run, recorded as it happened, for tests that only look."""
    story = Story(project(tmp_path_factory.mktemp("finished"), prepared))
    story.two_generations()
    story.seal("g001-c00")
    story.emit(events.EvolutionFinished(champion="g001-c00", seconds=20.0))
    assert story.recorder is not None
    assert story.recorder.problems == []
    return story


@pytest.fixture(scope="session")
def shown(finished: Story) -> Shown:
    """What MLflow shows of it."""
    return Shown(finished.run)
