"""A finished tiny run, and a server of its champion that the tests share."""

import pytest
from serve_helpers import copied, serving
from support import evolved_lab, promote


@pytest.fixture(scope="session")
def evolved(tmp_path_factory, tiny_model):
    """A run with three adapters in its pool, the first of them its champion."""
    lab = evolved_lab(tmp_path_factory.mktemp("evolved"), tiny_model)
    promote(lab.run, lab.run.results()[-1].pool[0])
    return lab


@pytest.fixture
def own(evolved, tmp_path):
    """A copy of that run."""
    return copied(evolved, tmp_path / "project")


@pytest.fixture(scope="module")
def server(evolved, tmp_path_factory):
    """A server on a copy of that run, with a memory; it leaves the lease to the servers of single tests."""
    with serving(copied(evolved, tmp_path_factory.mktemp("served") / "project"), remember=True, share=True) as running:
        yield running
