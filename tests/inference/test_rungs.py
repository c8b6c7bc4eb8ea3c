"""The rungs of the ladder for real on the CPU: what they hold, how they answer, and changing them under way."""

import importlib.util
import json
import shutil

import pytest
import torch
from conformance import CHAT, EngineConformance
from engine_adapters import two_adapters
from peft.tuners.lora.layer import LoraLayer
from support import write_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from agentlab import files, models
from agentlab.errors import ModelError
from agentlab.hardware import ledger
from agentlab.hardware.rungs import RUNGS
from agentlab.hardware.shape import ModelShape
from agentlab.inference import EngineError, OutOfMemoryError, Request, loading
from agentlab.inference.contract import EngineBroken
from agentlab.inference.transformers_engine import TransformersEngine


def held_bytes(base):
    """Bytes of a base model's tensors, those that a quantizer hides in its modules included, each storage once."""
    tensors = [*base.parameters(), *base.buffers()]
    for module in base.modules():
        meta, weight = getattr(module, "meta", None), getattr(module, "weight", None)
        tensors += [value for value in (meta or {}).values() if isinstance(value, torch.Tensor)]
        state = getattr(weight, "quant_state", None)
        tensors += [t for t in (getattr(weight, "SCB", None),) if t is not None]
        if state is not None:
            tensors += [state.absmax, state.offset, state.state2.absmax]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    return two_adapters(tiny_model, tmp_path_factory.mktemp("adapters"), scale=0.3)


@pytest.fixture
def opened(tiny_model):
    def open_at(rung):
        return TransformersEngine(models.resolve(str(tiny_model)), rung=rung)

    return open_at


class OnARung(EngineConformance):
    """Every engine at every rung: the same suite."""

    rung = ""

    @pytest.fixture(scope="class")
    def engine(self, tiny_model):
        with TransformersEngine(models.resolve(str(tiny_model)), rung=self.rung) as engine:
            assert engine.rung == self.rung
            yield engine

    @pytest.fixture(scope="class")
    def adapters(self, folders):
        return folders


class TestNF4(OnARung):
    rung = "nf4"


class Subset:
    """What depends on how weights are kept: adapters beside them, streaming, cancelling. The rest is the engine's own
    code, which NF4 runs whole."""

    _clean = EngineConformance._clean
    engine, adapters = OnARung.engine, OnARung.adapters
    test_adapters_per_request = EngineConformance.test_adapters_per_request
    test_unloading_gives_the_base_back = EngineConformance.test_unloading_gives_the_base_back
    test_loading_an_id_again_replaces_it = EngineConformance.test_loading_an_id_again_replaces_it
    test_unknown_adapter_is_refused_by_name = EngineConformance.test_unknown_adapter_is_refused_by_name
    test_abandoned_stream_leaves_the_engine_usable = EngineConformance.test_abandoned_stream_leaves_the_engine_usable


class TestBF16(Subset):
    rung = "bf16"


class TestInt8(Subset):
    rung = "int8"


class TestHQQ3(Subset):
    rung = "hqq3"


@pytest.mark.parametrize("rung", RUNGS)
def test_the_base_holds_what_the_ledger_says(tiny_model, opened, rung):
    with opened(rung) as engine:
        shape = ModelShape.read(tiny_model / "config.json")
        planned = ledger.weights(shape, RUNGS[rung], engine.element_bytes)
        assert engine.rung_bytes()[rung] == planned.total
        # the tables of codes that bitsandbytes keeps per module are no weights, and weigh on a model this small
        assert held_bytes(engine.base) == pytest.approx(planned.total, rel=0.02)
        assert engine.parameters() == shape.parameters


def test_changing_the_rung_saves_what_the_ledger_says_and_keeps_the_adapters(opened, folders):
    first, second = folders
    with opened("fp32") as engine:
        for adapter, folder in folders.items():
            engine.load_adapter(adapter, folder)
        asked = [Request(CHAT, adapter=adapter, max_new_tokens=8) for adapter in (None, first, second)]
        before = [completion.token_ids for completion in engine.generate(asked)]
        for rungs in (("bf16", "nf4"), ("int8",)):  # embeddings are in fp32 beside int8: on a model this small too much
            held = held_bytes(engine.base)
            for rung in rungs:
                saved = engine.change_rung(rung)
                assert (engine.rung, engine.adapters()) == (rung, sorted(folders))
                assert saved > 0
                assert held - held_bytes(engine.base) == pytest.approx(saved, rel=0.05)
                held = held_bytes(engine.base)
                lower = [completion.token_ids for completion in engine.generate(asked)]
                assert len({tuple(tokens) for tokens in lower}) == 3, "each adapter still answers in its own way"
                engine.offload_adapters()
            engine.change_rung("fp32", room_bytes=2**30)
            assert [completion.token_ids for completion in engine.generate(asked)] == before
            engine.offload_adapters()


def test_a_rung_that_saves_nothing_is_refused_before_anything_is_freed(opened):
    with opened("nf4") as engine:
        base = engine.base
        # scales and zeros of groups of 64 are in fp32 on a CPU: more than NF4's, which are quantized themselves
        for rung in ("hqq3", "bf16"):
            with pytest.raises(EngineError, match=rf"rung {rung} saves nothing: .*MiB at it, .* at nf4; allowed: "):
                engine.change_rung(rung)
        with pytest.raises(EngineError, match="saves nothing"):
            engine.change_rung("fp32", room_bytes=1)
        assert engine.change_rung("nf4") == 0
        assert engine.base is base


def test_a_base_that_cannot_be_loaded_lower_is_what_it_was(opened, folders, monkeypatch):
    real = loading.load_base

    def scarce(model, rung, device):
        if rung == "nf4":
            raise OutOfMemoryError("no room to quantize")
        return real(model, rung, device)

    with opened("bf16") as engine:
        adapter, folder = next(iter(folders.items()))
        engine.load_adapter(adapter, folder)
        request = Request(CHAT, adapter=adapter, max_new_tokens=8)
        before = engine.generate([request])[0].token_ids
        monkeypatch.setattr(loading, "load_base", scarce)
        with pytest.raises(OutOfMemoryError, match="no room to quantize"):
            engine.change_rung("nf4")
        assert (engine.rung, engine.adapters()) == ("bf16", [adapter])
        assert engine.generate([request])[0].token_ids == before


@pytest.mark.parametrize("beside", [0, 1])
def test_an_adapter_that_finds_no_memory_leaves_the_others_and_the_base(opened, folders, monkeypatch, beside):
    first, second = folders
    with opened("nf4") as engine:
        for adapter in (first, second)[: beside + 1]:
            engine.load_adapter(adapter, folders[adapter])
        asked = [Request(CHAT, adapter=adapter, max_new_tokens=8) for adapter in (None, *engine.adapters())]
        before = [completion.token_ids for completion in engine.generate(asked)]
        real, placed = LoraLayer.update_layer, []

        def scarce(layer, *args, **kwargs):
            placed.append(layer)
            if len(placed) == 3:  # in the middle of it
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(layer, *args, **kwargs)

        monkeypatch.setattr(LoraLayer, "update_layer", scarce)
        for adapter, folder in ((first, folders[second]), ("g009-c09", folders[second])):
            placed.clear()
            with pytest.raises(torch.OutOfMemoryError):
                engine.load_adapter(adapter, folder)
        monkeypatch.undo()
        assert engine.adapters() == sorted([first, second][: beside + 1])
        assert [completion.token_ids for completion in engine.generate(asked)] == before
        assert engine.read_adapter(first).rank == 4
        engine.load_adapter("g009-c09", folders[second])  # now there is room
        answers = [
            engine.generate([Request(CHAT, adapter=name, max_new_tokens=8)])[0].token_ids for name in ("g009-c09", None)
        ]
        assert answers[1] == before[0] != answers[0]


@pytest.mark.parametrize("rung", ["fp32", "nf4"])
def test_adapters_in_ram_take_no_memory_beside_the_base_and_come_back_when_asked_for(opened, folders, rung):
    first, second = folders
    with opened(rung) as engine:
        for adapter, folder in folders.items():
            engine.load_adapter(adapter, folder)
        asked = [Request(CHAT, adapter=adapter, max_new_tokens=8) for adapter in (first, second)]
        before = [completion.token_ids for completion in engine.generate(asked)]
        held = engine.footprint(first)
        assert held.idle_adapters == 1  # in fp32 the second one's weights, summed up with the base's
        freed = engine.offload_adapters(keep=first)
        assert freed == held.idle_adapter_bytes > 0
        assert engine.footprint(first).idle_adapters == 0
        assert engine.adapters() == sorted(folders)
        assert [completion.token_ids for completion in engine.generate(asked)] == before


def test_four_bit_weights_are_the_same_on_every_cpu(tiny_model, monkeypatch):
    # bitsandbytes would pack them anew, rounded, and cannot for widths like the tiny model's
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    with TransformersEngine(models.resolve(str(tiny_model)), rung="nf4") as engine:
        assert engine.generate([Request(CHAT, max_new_tokens=2)])[0].completion_tokens > 0
        states = [m.weight.quant_state for m in engine.base.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
        assert states
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


def test_a_closed_engine_stays_closed(opened):
    with opened("nf4") as engine:
        assert engine.change_rung("nf4") == 0
    for act in (lambda: engine.generate([Request(CHAT, max_new_tokens=2)]), lambda: engine.change_rung("nf4")):
        with pytest.raises(EngineBroken, match="is gone, or was closed; open the engine again"):
            act()
    assert engine.base is None


def test_room_that_is_too_small_is_said_to_be(opened):
    with opened("nf4") as engine:
        sizes = engine.rung_bytes()
        needed = sizes["fp32"] - sizes["nf4"]
        with pytest.raises(EngineError, match=f"allowed: a rung that takes fewer bytes, or room_bytes of {needed} or"):
            engine.change_rung("fp32", room_bytes=needed - 1)
        assert engine.change_rung("fp32", room_bytes=needed) == -needed


def test_a_shorter_context_is_refused_beyond_and_given_back(opened):
    with opened("fp32") as engine:
        engine.limit_context(64)
        assert engine.context_length() == 64
        with pytest.raises(EngineError, match="64 tokens"):
            engine.generate([Request(CHAT, max_new_tokens=60)])
        engine.limit_context(None)
        assert engine.context_length() == 512


_MORE = r"has layers that its config does not know: model\.layers\.1\.\S+ and \d+ more"
_FEWER = r"lacks weights that its config asks for: model\.layers\.2\.\S+ and \d+ more"


@pytest.mark.parametrize(
    ("changed", "rung", "said"),
    [
        ({"num_hidden_layers": 1}, "fp32", _MORE),
        ({"num_hidden_layers": 1}, "nf4", _MORE),
        ({"num_hidden_layers": 3}, "fp32", _FEWER),
        ({"num_hidden_layers": 3}, "nf4", _FEWER),
        # where it quantizes, transformers takes the sizes of the files, and answers right
        ({"vocab_size": 96}, "fp32", r"cannot be loaded: its weights have other sizes than its config\.json says"),
        ({"num_attention_heads": 7}, "nf4", r"cannot be loaded: config\.json: .*not a multiple of .* heads \(7\)"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(tiny_model, tmp_path, changed, rung, said):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ModelError, match=said) as caught:
        TransformersEngine(models.resolve(str(folder)), rung=rung)
    assert "\n" not in str(caught.value)


def test_a_broken_tokenizer_is_named(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.json").write_text("{oops")
    with pytest.raises(ModelError, match=r"the tokenizer of .*model cannot be loaded: "):
        TransformersEngine(models.resolve(str(folder)))


def test_memory_that_does_not_suffice_to_load_is_said_as_such(opened, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(OutOfMemoryError, match="at nf4 does not fit into memory: CUDA out of memory"):
        opened("nf4")


def test_a_model_that_is_stored_quantized_is_loaded_as_it_is(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=options, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    stored = models.resolve(str(tmp_path))
    with TransformersEngine(stored) as engine:
        assert engine.rung is None
        assert engine.generate([Request(CHAT, max_new_tokens=4)])[0].prompt_tokens > 0
        assert engine.footprint().rung is None
        with pytest.raises(EngineError, match="cannot be loaded at rung int8; allowed: as stored"):
            engine.change_rung("int8")
    with pytest.raises(ModelError, match="is stored in bitsandbytes and loaded as it is: rung int8; allowed: model"):
        TransformersEngine(stored, rung="int8")


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="the library that is missed is there")
@pytest.mark.parametrize(
    ("method", "more"),
    [("awq", {"bits": 4, "group_size": 32, "zero_point": True}), ("gptq", {"bits": 4, "group_size": 32})],
)
def test_a_stored_quantization_whose_library_is_missing_is_refused_in_one_sentence(tiny_model, tmp_path, method, more):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = files.read_json(tmp_path / "config.json")
    files.write_json(tmp_path / "config.json", config | {"quantization_config": {"quant_method": method, **more}})
    with pytest.raises(ModelError, match=f"is stored in {method} and cannot be loaded here: .*requires") as caught:
        TransformersEngine(models.resolve(str(tmp_path)))
    assert "\n" not in str(caught.value)


# relative errors of Gaussian weights: rounding to 8 bits of mantissa, to 1/127 of a row's maximum, to NF4's quantiles
# in blocks of 64 (about 0.09), to 8 steps over a group of 64 that spans about 4.8 standard deviations (about 0.2)
@pytest.mark.parametrize(("rung", "most"), [("bf16", 0.004), ("int8", 0.02), ("nf4", 0.13), ("hqq3", 0.3)])
def test_restored_weights_are_as_far_from_the_stored_ones_as_the_rung_allows(tmp_path, rung, most):
    # as wide as a block: of shorter rows bitsandbytes' AVX-512 code restores only a part
    files_of = models.resolve(str(write_tiny_model(tmp_path, 64)))
    whole, lower = TransformersEngine(files_of), TransformersEngine(files_of, rung=rung)
    with whole, lower, torch.inference_mode():
        wanted = whole.base.get_submodule("model.layers.0.mlp.up_proj").weight
        module = lower.base.get_submodule("model.layers.0.mlp.up_proj")
        unit = torch.eye(wanted.shape[1], dtype=lower.base.dtype)
        found = module(unit).float().T
    assert 0 < torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted) < most


@pytest.mark.model
def test_smollm2_still_knows_the_capital_of_france_at_four_bits(embedded):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with TransformersEngine(embedded, rung="nf4") as engine:
        assert "Paris" in engine.generate([Request(question, max_new_tokens=12)])[0].text
