"""Tiny runs in this process."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Closing an engine collects garbage; without the imported libraries in it that is 20 times as fast."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
