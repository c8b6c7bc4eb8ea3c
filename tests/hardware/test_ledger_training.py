"""The ledger's model of a training step against the tensors that autograd really keeps."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from agentlab.hardware import ledger
from agentlab.hardware.rungs import BF16, RUNGS
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
    lora = LoraConfig(r=step.rank, target_modules=list(step.modules), lora_dropout=0.1 if step.dropout else 0.0)
    peft = get_peft_model(model, lora).train()
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
        model.model(inputs_embeds=embedded, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()), ModelShape.from_config(values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("modules", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "plain"])
def test_activations_are_what_autograd_keeps(family, modules, dropout):
    step = ledger.Step(rows=2, tokens=192, rank=8, modules=modules, dropout=dropout, checkpointing=False, mask_bytes=4)
    measured, shape = kept_bytes(family, step)
    assert ledger.training(shape, BF16, step).activations == pytest.approx(measured, rel=0.05)


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
