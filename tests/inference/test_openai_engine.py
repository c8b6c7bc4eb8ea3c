"""The OpenAI-compatible engine against the conformance suite, on a real `vllm serve` that loads adapters."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conformance import CHAT, EngineConformance
from engine_adapters import two_adapters
from support import has_vllm_for_cpus

from agentlab.config import ModelSettings
from agentlab.errors import ModelError
from agentlab.inference import Request
from agentlab.inference.openai_engine import OpenAIEngine, open_server
from agentlab.inference.openai_server import Server
from agentlab.inference.openai_tokens import OpenAITokenEngine

pytestmark = [
    pytest.mark.model,
    pytest.mark.soak,
    pytest.mark.skipif(not has_vllm_for_cpus(), reason="vLLM is here for CUDA, not for CPUs"),
]
NAME = "lab-model"
# The server forgets an unloaded adapter's name, not its slot, and on a CPU base rows get the last slot's adapter
# (docs/LOG.md): more slots than all tests together load adapters.
SLOTS = "64"


@pytest.fixture(scope="module")
def served(embedded, tmp_path_factory):
    """The base URL of a server with the embedded model; it is stopped with everything that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(embedded.folder), "--served-model-name", NAME,
        "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--max-num-seqs", "16", "--enable-lora", "--max-loras", SLOTS, "--max-cpu-loras", SLOTS, "--max-lora-rank", "8",
        "--generation-config", "vllm", "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj",
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="class")
def adapters(embedded, tmp_path_factory):
    return two_adapters(embedded.folder, tmp_path_factory.mktemp("adapters"), scale=0.05)


class TestInTokens(EngineConformance):
    """The server's model folder is found here, so prompts and answers are tokens."""

    @pytest.fixture(scope="class")
    def engine(self, served):
        with open_server(ModelSettings(engine="openai", base_url=served), NAME) as engine:
            assert isinstance(engine, OpenAITokenEngine)
            yield engine

    def test_context_is_the_servers(self, engine):
        assert engine.context_length() == 1023  # one is kept for scoring


class TestInChats(EngineConformance):
    """As with a server elsewhere: only the chat protocol, no structures."""

    @pytest.fixture(scope="class")
    def engine(self, served):
        server = Server(served)
        with OpenAIEngine(server, server.known(NAME), NAME, 1024) as engine:
            yield engine

    def test_what_it_can_do_is_found_out(self, engine):
        can = engine.capabilities()
        assert can.logprobs
        assert can.seeds
        assert can.adapters
        assert can.exact_tokens
        assert not can.structure
        assert not can.tools


def test_both_ways_give_the_same_answer(served):
    settings = ModelSettings(engine="openai", base_url=served)
    server = Server(served)
    with open_server(settings, NAME) as tokens, OpenAIEngine(server, server.known(NAME), NAME, 1024) as chats:
        request = Request(CHAT, max_new_tokens=16, logprobs=True)
        one, two = tokens.generate([request])[0], chats.generate([request])[0]
        assert one.token_ids == two.token_ids
        assert one.text == two.text
        assert one.prompt_tokens == two.prompt_tokens
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-3)


def test_a_model_that_is_not_served_is_refused_with_the_ones_that_are(served):
    with pytest.raises(ModelError, match=f"has no model nonsense; it has: {NAME}"):
        open_server(ModelSettings(engine="openai", base_url=served), "nonsense")
