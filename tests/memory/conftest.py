import pytest

from agentlab.memory.embedding import SentenceEmbedder

from .helpers import open_memory


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


@pytest.fixture
def memory(path):
    with open_memory(path) as opened:
        yield opened


@pytest.fixture(scope="session")
def minilm():
    """The embedded all-MiniLM-L6-v2, loaded once."""
    return SentenceEmbedder()
