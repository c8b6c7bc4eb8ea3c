"""Shared fixtures: a home of their own for all tests, the embedded model, a tiny model, a tiny suite."""

import gc
import os
from pathlib import Path

import pytest
from support import write_tiny_experiment, write_tiny_model

ORDER = ("model", "notebook", "soak")


def pytest_configure(config):
    # What is tested runs on a CPU everywhere, also beside a GPU; `make gpu` is for what only a GPU can show.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not _sees_a_gpu():
        raise pytest.UsageError("torch sees no NVIDIA GPU: there is nothing to test; agentlab doctor says why")
    # The person's own home, model cache and store stay untouched; the converted model is kept between test runs.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentlab-tests"
    os.environ["AGENTLAB_HOME"] = str(cache)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def _sees_a_gpu():
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """Fast tests first: unmarked, then those with the real model, then notebooks and whole runs."""

    def cost(item):
        return max((ORDER.index(mark.name) + 1 for mark in item.iter_markers() if mark.name in ORDER), default=0)

    items.sort(key=cost)


@pytest.fixture(scope="session")
def embedded():
    """The embedded SmolLM2, converted on first use."""
    from agentlab import models

    return models.prepare()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a two-layer random Llama with a byte-level tokenizer and a chat template; loads in no time."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def larger_model(tmp_path_factory):
    """The folder of a model of 90 million random weights: small tensors do not decide what it takes."""
    return write_tiny_model(
        tmp_path_factory.mktemp("larger"), 1024, 16, intermediate_size=2816, num_hidden_layers=8,
        max_position_embeddings=16384, initializer_range=0.02,
    )  # fmt: skip


@pytest.fixture
def whole_card():
    """Give the whole card back: a limit on torch's allocator outlives the engine that set it."""
    import torch

    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def tiny_experiment(tmp_path, tiny_model):
    """`write_tiny_experiment` in a folder of the test's own."""
    return write_tiny_experiment(tmp_path, tiny_model)
