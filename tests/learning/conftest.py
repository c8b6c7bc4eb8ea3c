import gc

import pytest
from support import write_suite


@pytest.fixture(scope="module")
def engine(tiny_model):
    """The tiny model, loaded once per module: training has to leave it as it was."""
    import trl  # noqa: F401

    from agentlab import models
    from agentlab.inference.transformers_engine import TransformersEngine

    gc.collect()
    gc.freeze()  # each garbage collection would walk through the imported libraries
    with TransformersEngine(models.resolve(str(tiny_model))) as engine:
        yield engine
    gc.unfreeze()


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    from agentlab import tasks

    folder = tmp_path_factory.mktemp("suites") / "letters"
    write_suite(folder, {"train": 24, "fitness": 4, "gate": 4, "test": 4}, labels=("yes", "no"))
    return tasks.load(str(folder), folder.parent)


@pytest.fixture
def examples(engine, suite):
    """Eight encoded items, of unequal length."""
    from agentlab.learning import encode

    return [encode(engine, suite, item) for item in suite.split("train")[4:12]]
