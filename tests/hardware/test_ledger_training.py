"""The ledger's model of a training step against the tensors that autograd really keeps."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.autograd import _functions as functions
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from agentlab.hardware import ledger
from agentlab.hardware.rungs import BF16, HQQ3, INT8, NF4, RUNGS
from agentlab.hardware.shape import ModelShape, published

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
VALUES = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def kept_bytes(family, step):
    """Bytes of tensors that a forward pass of the bare decoder keeps for its backward pass, in bf16 with autocast."""
    values = VALUES | {"model_type": family}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
    return sum(kept_by(model, step).values()), ModelShape.from_config(values)


def kept_by(model, step):
    """Bytes of each storage that a forward pass keeps for its backward pass, by its place in memory."""
    lora = LoraConfig(r=step.rank, target_modules=list(step.modules), lora_dropout=0.1 if step.dropout else 0.0)
    peft = get_peft_model(model, lora).train()
    if step.checkpointing:
        model.gradient_checkpointing_enable()
    own = {p.untyped_storage().data_ptr() for p in peft.parameters()} | {
        b.untyped_storage().data_ptr() for b in peft.buffers()
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    embedded = torch.randn(step.rows, step.tokens, VALUES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        found = model.model(inputs_embeds=embedded, use_cache=False)
    for tensor in held_by_the_graph(found.last_hidden_state.grad_fn):
        keep(tensor)
    return {place: storage.nbytes() for place, storage in kept.items()}


def held_by_the_graph(node):
    """The inputs that bitsandbytes' functions hold in attributes, which autograd's hooks do not see."""
    seen, following = set(), [node]
    while following:
        node = following.pop()
        if node in seen:
            continue
        seen.add(node)
        following += [other for other, _ in node.next_functions if other is not None]
        name = type(node).__name__
        if name == "MatMul8bitLtBackward":
            yield node.tensors[2]
        elif name == "MatMul8bitFpBackward":  # in its place on a CPU
            yield node.A


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("modules", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "plain"])
def test_activations_are_what_autograd_keeps(family, modules, dropout):
    step = ledger.Step(rows=2, tokens=192, rank=8, modules=modules, dropout=dropout, checkpointing=False, mask_bytes=4)
    measured, shape = kept_bytes(family, step)
    assert ledger.training(shape, BF16, step).activations == pytest.approx(measured, rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model of VALUES lies."""
    found = tmp_path_factory.mktemp("qwen2")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**VALUES, model_type="qwen2")).save_pretrained(found)
    return found


@pytest.fixture(params=["as on a GPU", "as on a CPU"])
def _product(request, monkeypatch):
    """LLM.int8's function, and beside quantized modules PEFT's conversions, of either device."""
    asked = torch.is_autocast_enabled  # PEFT asks without a device, which means a GPU
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asked(*device) if device else True)
    if request.param == "as on a GPU":
        monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)


def quantized(folder, rung):
    """The model in `folder` at a rung."""
    if rung is HQQ3:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        config = BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
        config["weight_quant_params"]["optimize"] = False  # which takes long and changes no size
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
        return model
    options = {"load_in_8bit": True} if rung is INT8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def kept_beyond_nf4(folder, rung, step):
    """(bytes, planned bytes) of what a forward pass keeps at a rung and does not on NF4, whose modules keep nothing."""
    shape = ModelShape.read(folder / "config.json")
    kept, without = (sum(kept_by(quantized(folder, one), step).values()) for one in (rung, NF4))
    planned, other = (ledger.training(shape, one, step).activations for one in (rung, NF4))
    return kept - without, planned - other


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize(
    ("modules", "dropout"),
    [(ATTENTION, True), (ATTENTION, False), (EVERYWHERE, False)],
    ids=["dropout", "plain", "all"],
)
def test_the_inputs_that_frozen_int8_modules_keep_are_counted_exactly(folder, modules, dropout):
    step = ledger.Step(rows=2, tokens=32, rank=8, modules=modules, dropout=dropout, checkpointing=False)
    measured, planned = kept_beyond_nf4(folder, INT8, step)
    assert measured == planned
    assert (planned > 0) is (modules is ATTENTION)  # LoRA reads the same tensors


@pytest.mark.usefixtures("_product")
def test_what_int8_holds_beside_autograd_is_not_given_up_by_checkpointing(folder):
    step = ledger.Step(rows=2, tokens=32, rank=8, modules=ATTENTION, dropout=False)
    measured, planned = kept_beyond_nf4(folder, INT8, step)
    assert measured == planned
    unknown = ledger.Step(rows=2, tokens=32, rank=8, modules=ATTENTION, dropout=False, checkpointing=False)
    assert planned > kept_beyond_nf4(folder, INT8, unknown)[1]  # what LoRA and attention keep too is held anew


def test_the_inputs_that_frozen_hqq_modules_keep_are_given_up_by_checkpointing(folder):
    step = ledger.Step(rows=2, tokens=32, rank=8, modules=ATTENTION, dropout=True, checkpointing=False)
    measured, planned = kept_beyond_nf4(folder, HQQ3, step)
    assert measured == pytest.approx(planned, rel=0.01)  # the biases, too
    shape, step = ModelShape.read(folder / "config.json"), ledger.Step(2, 32, 8, ATTENTION)
    hqq, nf4 = (ledger.training(shape, rung, step) for rung in (HQQ3, NF4))
    assert hqq.activations == nf4.activations
    large = published("Qwen2.5-3B")
    assert ledger.training(large, HQQ3, step).working > ledger.training(large, NF4, step).working


def test_int8_restores_a_matrix_on_the_way_back_alone():
    shape = published("Qwen2.5-3B")
    largest = max(n_in * n_out for n_in, n_out in shape.linears.values())
    # so few tokens that their gradients are small beside it
    assert ledger.training(shape, INT8, ledger.Step(1, 128, 1, ATTENTION)).working > 2 * largest
    assert ledger.prefill_bytes(shape, 1, 128, rung=INT8) < largest


MEASURED = json.loads((Path(__file__).parent / "measured_on_a_gpu.json").read_text())


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: "-".join(str(value) for value in row.values()))
def test_what_a_gpu_was_seen_to_need(row):
    """Within 50 MiB of every peak; the allocator's own slack was about 10."""
    shape, rung, capability = published(row["shape"]), RUNGS[row["rung"]], tuple(MEASURED["capability"])
    if row["phase"] == "load":
        planned = ledger.weights(shape, rung).total
    elif row["phase"] == "train":
        step = ledger.Step(row["rows"], row["tokens"], 16, ATTENTION, dropout=row["dropout"])
        planned = ledger.training(shape, rung, step, workspace_bytes=ledger.blas_bytes(2, capability)).total
    else:
        planned = ledger.serving(
            shape, row["rows"], row["tokens"], weight_bytes=ledger.weights(shape, rung).total, rung=rung,
            adapter_bytes=row["adapters"] * ledger.adapter_bytes(shape, 16, ATTENTION),
            workspace_bytes=ledger.blas_bytes(row["threads"], capability),
        ).total  # fmt: skip
    assert planned / ledger.MIB == pytest.approx(row["mib"], abs=50)


def test_a_beginning_that_all_prompts_share_is_read_once():
    shape = published("Qwen2.5-1.5B")
    apart, alike = (ledger.prefill_bytes(shape, 32, 200, shared=shared) for shared in (0, 150))
    assert alike == ledger.prefill_bytes(shape, 32, 50) + 32 * 50 * 150
    assert alike < apart / 3
    assert ledger.prefill_bytes(shape, 2, 1000, shared=990) >= ledger.prefill_bytes(shape, 1, 990)


def test_a_beginning_is_shared_as_the_engine_shares_it():
    shape = published("Qwen2.5-3B")
    for rows, shared in ((3, 1400), (1, 1400), (4, 15)):  # too few rows, too short a beginning
        assert ledger.prefill_bytes(shape, rows, 1500, shared=shared) == ledger.prefill_bytes(shape, rows, 1500)
    assert ledger.prefill_bytes(shape, 4, 1500, shared=16) < ledger.prefill_bytes(shape, 4, 1500)
    assert ledger.prefill_bytes(shape, 3, 1500, shared=1400) > 3 * ledger.prefill_bytes(shape, 4, 1500, shared=1400)


@pytest.mark.parametrize("shared", [0, 100, 1400])
def test_the_largest_batch_is_found_where_fewer_rows_may_take_more(shared):
    shape = published("Qwen2.5-3B")

    def needed(rows):
        cache = ledger.kv_cache_bytes(shape, rows, 1500 + ledger.KV_ROOM_TOKENS)
        return cache + ledger.prefill_bytes(shape, rows, 1500, shared=shared)

    for free in range(0, 2000 * ledger.MIB, 20 * ledger.MIB):
        for limit in (2, 3, 4, 8):
            fitting = [rows for rows in range(1, limit + 1) if needed(rows) <= free]
            assert ledger.largest_batch(shape, 1500, free, limit, shared=shared) == max(fitting, default=0)


def test_a_large_adapter_and_few_tokens_peak_where_the_optimiser_works():
    shape = published("Qwen2.5-0.5B")
    few, many = (ledger.training(shape, BF16, ledger.Step(1, tokens, 32, EVERYWHERE)) for tokens in (32, 2048))
    adapter = ledger.adapter_bytes(shape, 32, EVERYWHERE)
    assert (few.gradients, few.activations, few.working) == (adapter, 0, 0)
    assert many.gradients == 0
    assert many.activations + many.working > adapter
    waiting = ledger.training(shape, BF16, ledger.Step(1, 2048, 32, EVERYWHERE, accumulated=True))
    assert waiting.total == many.total + adapter


def test_checkpointing_and_smaller_batches_save_what_they_should():
    shape = published("Qwen2.5-1.5B")
    plain = ledger.training(shape, BF16, ledger.Step(4, 512, 16, ATTENTION, checkpointing=False))
    checked = ledger.training(shape, BF16, ledger.Step(4, 512, 16, ATTENTION))
    half = ledger.training(shape, BF16, ledger.Step(2, 512, 16, ATTENTION, checkpointing=False))
    assert checked.activations < plain.activations / 5
    assert half.activations == plain.activations / 2
    padded = ledger.training(shape, BF16, ledger.Step(4, 512, 16, ATTENTION, checkpointing=False, padded=True))
    assert padded.activations > plain.activations
    assert (half.optimiser, half.weights) == (plain.optimiser, plain.weights)
    assert plain.optimiser == 8 * ledger.lora_parameters(shape, 16, ATTENTION)
