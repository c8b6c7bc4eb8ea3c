"""The vLLM engine, in its child process, against the conformance suite and where it differs from others."""

import dataclasses
import os
import signal
from collections import deque
from types import SimpleNamespace

import pytest
from conformance import CHAT, OTHER, EngineConformance
from engine_adapters import random_lora, two_adapters
from support import has_vllm_for_cpus, write_tiny_model

from agentlab import adapters as adapter_room
from agentlab import models
from agentlab.errors import AdapterError
from agentlab.hardware import monitor
from agentlab.inference import EngineError, OutOfMemoryError, Request, vllm_worker
from agentlab.inference.contract import EngineBroken
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.inference.vllm_engine import VllmEngine, _Loaded
from agentlab.inference.vllm_process import environment, error_of
from agentlab.inference.vllm_settings import VllmSettings
from agentlab.inference.worker_process import ChildDied

SMALL = VllmSettings(
    kv_cache_memory_bytes=2**29, max_model_len=1024, max_num_seqs=16, max_loras=2, max_cpu_loras=4, max_lora_rank=8
)


# Its wheel for CUDA answers on a GPU only, and these tests run on the CPU everywhere.
needs_vllm_for_cpus = pytest.mark.skipif(not has_vllm_for_cpus(), reason="vLLM is here for CUDA, not for CPUs")


class OnVllm(EngineConformance):
    """One engine for all of it."""

    scale = 0.0  # of the adapters

    @pytest.fixture(scope="class")
    def adapters(self, engine, tmp_path_factory):
        return two_adapters(engine.model_files.folder, tmp_path_factory.mktemp("adapters"), scale=self.scale)

    def test_greedy_tokens_are_those_of_transformers(self, engine, adapters):
        adapter, folder = next(iter(adapters.items()))
        requests = [
            Request(chat, adapter=name, max_new_tokens=16, logprobs=True)
            for chat in (CHAT, OTHER)
            for name in (None, adapter)
        ]
        with TransformersEngine(engine.model_files) as other:
            other.load_adapter(adapter, folder)
            expected = other.generate(requests)
        engine.load_adapter(adapter, folder)
        found = engine.generate(requests)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.text for c in found] == [c.text for c in expected]
        for one, two in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=5e-3)

    def test_more_adapters_than_slots_answer_in_one_batch(self, engine, tmp_path):
        folder = engine.model_files.folder
        names = [f"g001-c{index:02d}" for index in range(6)]
        for seed, name in enumerate(names):
            adapter_room.save(random_lora(folder, seed, rank=4, scale=self.scale), tmp_path / name)
            engine.load_adapter(name, tmp_path / name)
        engine.pin(names[0])
        alone = [engine.generate([Request(CHAT, adapter=name, max_new_tokens=6)])[0].token_ids for name in names]
        mixed = engine.generate([Request(CHAT, adapter=name, max_new_tokens=6) for name in names])
        assert [c.token_ids for c in mixed] == alone
        assert len({tuple(tokens) for tokens in alone}) > 3
        engine.pin(names[1])
        with pytest.raises(EngineError, match="at least one slot that is not pinned"):
            engine.pin(names[2])

    def test_foreign_and_too_large_adapters_are_refused_before_vllm_sees_them(self, engine, tmp_path):
        folder = engine.model_files.folder
        wide = random_lora(folder, 1)
        name, (a, b) = next(iter(wide.modules.items()))
        wide.modules[name] = (a.repeat(1, 2), b)
        adapter_room.save(wide, tmp_path / "wide")
        adapter_room.save(random_lora(folder, 1, rank=16), tmp_path / "large")
        for which, message in (("wide", "does not fit"), ("large", "rank 16; allowed: up to 8")):
            with pytest.raises(AdapterError, match=message):
                engine.load_adapter("g000-c00", tmp_path / which)
        assert engine.adapters() == []

    def test_what_was_checked_is_what_vllm_reads(self, engine, adapters, tmp_path):
        import shutil

        adapter, folder = next(iter(adapters.items()))
        shutil.copytree(folder, tmp_path / "copy")
        engine.load_adapter(adapter, tmp_path / "copy")
        before = engine.generate([Request(CHAT, adapter=adapter, max_new_tokens=6)])[0].token_ids
        shutil.rmtree(tmp_path / "copy")  # a culled adapter may still be answering
        assert engine.generate([Request(CHAT, adapter=adapter, max_new_tokens=6)])[0].token_ids == before

    def test_a_structure_that_is_none_is_refused_and_the_engine_lives_on(self, engine):
        with pytest.raises(EngineError, match="structural tag"):
            engine.generate([Request(CHAT, max_new_tokens=4, structure={"type": "nonsense"})])
        assert engine.generate([Request(CHAT, max_new_tokens=2)])[0].completion_tokens > 0

    def test_a_refusal_of_a_request_that_was_given_up_is_not_the_next_ones(self, engine):
        refused = Request(CHAT, max_new_tokens=4, temperature=-1.0)  # the process says so
        assert [chunk.completion.finish_reason for chunk in engine.stream(refused, lambda: True)] == ["cancelled"]
        assert engine.generate([Request(CHAT, max_new_tokens=2)])[0].completion_tokens > 0
        with pytest.raises(EngineError, match="vLLM refuses the request"):
            engine.generate([refused])

    def test_it_sleeps_wakes_and_answers_as_before(self, engine, adapters):
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
        requests = [Request(CHAT, adapter=name, max_new_tokens=8) for name in (None, *adapters)]
        before = [c.token_ids for c in engine.generate(requests)]
        engine.sleep()
        with pytest.raises(EngineError, match="sleeps"):
            engine.generate(requests)
        assert engine.wake() is False
        assert [c.token_ids for c in engine.generate(requests)] == before

    def test_a_rehearsal_leaves_nothing_behind(self, engine):
        before = engine.generate([Request(CHAT, max_new_tokens=6)])[0].token_ids
        engine.rehearse()
        assert (engine.adapters(), engine.is_running) == ([], True)
        assert engine.generate([Request(CHAT, max_new_tokens=6)])[0].token_ids == before

    def test_zz_a_killed_process_is_said_to_be_gone(self, engine):
        stream = engine.stream(Request(CHAT, max_new_tokens=200))
        next(stream)
        os.killpg(engine._child.pid, signal.SIGKILL)
        with pytest.raises(OutOfMemoryError, match="the vLLM process ended with SIGKILL"):
            list(stream)
        with pytest.raises(EngineBroken, match="is gone; open the engine again"):
            engine.generate([Request(CHAT, max_new_tokens=2)])
        engine.close()


@needs_vllm_for_cpus
class TestOnTinyModel(OnVllm):
    scale = 0.3

    @pytest.fixture(scope="class")
    def engine(self, tmp_path_factory):
        model = write_tiny_model(tmp_path_factory.mktemp("vllm-model"), 64, 2)  # its kernels know no heads of 8
        with VllmEngine(models.resolve(str(model)), settings=dataclasses.replace(SMALL, max_model_len=512)) as engine:
            yield engine


@needs_vllm_for_cpus
@pytest.mark.soak
@pytest.mark.model
class TestOnSmolLM2(OnVllm):
    scale = 0.05

    @pytest.fixture(scope="class")
    def engine(self, embedded):
        with VllmEngine(embedded, settings=SMALL) as engine:
            yield engine


@needs_vllm_for_cpus
@pytest.mark.soak
@pytest.mark.model
def test_too_small_a_cache_is_a_lack_of_memory(embedded):
    settings = VllmSettings(kv_cache_memory_bytes=2**20, max_model_len=1024, max_lora_rank=8)
    with pytest.raises(OutOfMemoryError, match="vLLM cannot load smollm2-135m-instruct"):
        VllmEngine(embedded, settings=settings)


def test_other_errors_are_no_lack_of_memory():
    assert isinstance(error_of("CUDA error: out of memory"), OutOfMemoryError)
    assert not isinstance(error_of("ValueError: rank 7 is not allowed"), OutOfMemoryError)


class Sleeper(VllmEngine):
    """An engine whose card can sleep and whose answers are given: what `wake` decides, without a card."""

    def __init__(self, answers):
        self.model_files = models.ModelFiles("fake", None, "")
        self.device = "cuda"
        self.settings = VllmSettings(1, 1, sleep_mode=True)
        self.sizes = SimpleNamespace(weight_bytes=3 * 2**30)
        self._child = object()
        self._asleep = False
        self._threads = None
        self._loaded, self._pinned, self._canary = {}, set(), {}
        self.answers = iter(answers)
        self.did = []

    def _answer_canary(self):
        return {None: next(self.answers)}

    def _call(self, what, **values):
        self.did.append(what)

    def _kill(self):
        self.did.append("kill")
        self._child = None

    def _start(self):
        self.did.append("start")
        self._child = object()


def test_vllms_process_is_told_how_many_threads_and_how_much_of_the_card(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for threads, told in ((None, None), (4, None), (16, None), (3, "3"), (1, "1")):
        env = environment("cpu", threads)
        assert env.get("OMP_NUM_THREADS") == told
        assert (env.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind") is (told is not None)  # else it takes a core each
    shares = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", shares.append)
    for share in (0.75, 1.2, -0.1):
        vllm_worker._limit_memory(share)
    assert shares == [0.75, 1.0, 0.0]


def test_asleep_it_keeps_what_its_process_takes_outside_of_weights_and_cache():
    engine = Sleeper(())
    assert engine.asleep_bytes() == engine.settings.outside_bytes > 0
    engine.settings = dataclasses.replace(engine.settings, sleep_mode=False)  # its process ends instead
    assert engine.asleep_bytes() == 0


@pytest.mark.parametrize(
    ("answers", "restarted", "did"),
    [
        ([[1, 2], [1, 2]], False, ["sleep", "wake"]),
        ([[1, 2], [1, 3], [1, 2]], False, ["sleep", "wake"]),  # a tie that fell the other way
        ([[1, 2], [1, 3], [1, 3], [1, 2]], True, ["sleep", "wake", "kill", "start"]),
    ],
)
def test_a_canary_that_answers_differently_has_the_process_started_anew(answers, restarted, did):
    engine = Sleeper(answers)
    engine.sleep()
    assert engine.wake() is restarted
    assert engine.did == did


def test_one_that_cannot_go_to_sleep_whole_is_started_anew_when_it_wakes():
    engine = Sleeper([[1, 2], [1, 2]])

    def call(what, **values):
        engine.did.append(what)
        raise EngineError("CUDA error: out of memory")

    engine._call = call
    engine.sleep()
    assert engine.did == ["sleep", "kill"]
    assert engine.wake() is True
    assert engine.did == ["sleep", "kill", "kill", "start"]


def test_weights_that_the_ram_cannot_take_do_not_go_to_sleep_there(monkeypatch):
    for free_mib, did in ((4096, ["sleep"]), (2048, ["kill"]), (0, ["sleep"])):  # 0: nobody can read it
        monkeypatch.setattr(monitor, "memory_stats", lambda free_mib=free_mib: SimpleNamespace(cpu_free=free_mib))
        engine = Sleeper([[1, 2]])
        engine.sleep()
        assert engine.did == did


def test_where_a_rehearsal_shows_that_it_cannot_sleep_its_process_ends_instead():
    engine = Sleeper([[1, 2], [1, 2]])
    engine._call = lambda what, **values: (_ for _ in ()).throw(EngineError("CUDA error: out of memory"))
    engine._modules = SimpleNamespace(without_effect=lambda: None)
    engine.rehearse()
    assert engine.settings.sleep_mode is False
    assert (engine.is_running, engine.asleep_bytes()) == (True, 0)


def test_what_the_processs_allocator_and_environment_are_told_on_a_card(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    env = environment("cuda", None)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in env
    assert env["PYTORCH_ALLOC_CONF"] == "pinned_max_round_threshold_mb:1"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the person's own stays alone
    assert "PYTORCH_ALLOC_CONF" not in environment("cuda", None)


class Holder(Sleeper):
    """One that holds two adapters; whoever it holds answers the same at all times."""

    def __init__(self, folder):
        super().__init__(())
        self._loaded = {name: _Loaded(number, folder / name) for number, name in enumerate(("one", "two"))}
        self._modules = SimpleNamespace(check=lambda adapter, lora, rank: None)

    def _answer_canary(self):
        return {name: [1] for name in (None, *self.adapters())}


def test_an_adapter_that_is_unloaded_while_it_sleeps_is_not_asked_when_it_wakes(tmp_path):
    engine = Holder(tmp_path)
    engine.sleep()
    engine.unload_adapter("one")
    assert engine.wake() is False
    assert engine.did == ["sleep", "wake"]
    assert engine.adapters() == ["two"]


def test_a_canary_does_not_depend_on_who_else_is_there(tmp_path):
    asked = []

    class Alone(Holder):
        _answer_canary = VllmEngine._answer_canary

        def generate(self, requests, batch_size=32):
            asked.append([(request.adapter, request.reuse_prompt) for request in requests])
            return [SimpleNamespace(token_ids=[1]) for _ in requests]

    engine = Alone(tmp_path)
    engine.sleep()
    engine.unload_adapter("one")
    assert engine.wake() is False
    alone = [[(name, False)] for name in (None, "one", "two", None, "two")]
    assert asked == alone  # sums in 16 bits depend on the batch, and on what was read before


def test_an_adapter_that_cannot_be_replaced_in_sleep_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_room, "load", lambda folder: object())
    engine = Holder(tmp_path)
    engine.sleep()
    with pytest.raises(EngineError, match="the engine sleeps; wake it first"):
        engine.load_adapter("one", tmp_path)
    assert engine.adapters() == ["one", "two"]
    assert engine.wake() is False


@pytest.mark.parametrize(("how", "expected"), [(signal.SIGKILL, OutOfMemoryError), (signal.SIGTERM, EngineError)])
def test_a_process_that_the_kernel_kills_while_it_starts_lacked_memory(monkeypatch, how, expected):
    class Killed:
        def __init__(self, module, env):
            pass

        def send(self, message):
            pass

        def receive(self, wait_s):
            raise ChildDied(f"ended with {how.name}", "loading weights", -how)

        def kill(self):
            pass

    monkeypatch.setattr("agentlab.inference.vllm_engine.ChildProcess", Killed)
    engine = Sleeper(())
    engine._arguments = dict
    engine._pending = deque()
    with pytest.raises(EngineError, match=f"vLLM cannot load fake: the process ended with {how.name}") as caught:
        VllmEngine._start(engine)
    assert type(caught.value) is expected


def test_an_engine_that_never_answers_as_before_is_broken():
    engine = Sleeper([[1, 2], [1, 3], [1, 3], [1, 3], [1, 3]])
    engine.sleep()
    with pytest.raises(EngineBroken, match="answers differently"):
        engine.wake()
    assert engine.did == ["sleep", "wake", "kill", "start", "kill"]
