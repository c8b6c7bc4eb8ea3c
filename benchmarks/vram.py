"""Memory as the ledger predicts it beside what a GPU's allocator measures: serving, evaluating and QLoRA training.

For each shape a model of random weights is made from its published config, then each phase runs in a process of its
own under a cap on the allocator: serve (one long prompt, 8 adapters beside the base), evaluate (a batch of short
prompts with one adapter) and train (LoRA of rank 16 with gradient checkpointing). Measured is the peak of what torch's
allocator has handed out; what it has reserved is printed beside it, and the driver's own context is in neither.
Nothing is downloaded. Needs an NVIDIA GPU, torch, transformers, peft, trl, bitsandbytes, pydantic and PyYAML, and about
10 GB of disk; where agentlab is not installed, PYTHONPATH with its checkout.

`--traced` needs no GPU: engine and trainer do on a CPU what they do on a GPU, with two and with three layers of each
shape, and what torch's operations ask for (`allocations.py`) is continued to the whole depth. It counts no workspace of
libraries and nothing of an allocator; the weights are the ledger's. `--rehearse` runs the phases on a tiny shape
without a GPU and measures nothing.

Expected time at the defaults: four minutes on one GPU, most of it loading libraries; traced 20 minutes on two CPU
cores. Ends in one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

BAR_MIB = 150
MIB = 2**20
RANK = 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
PHASES = ("serve", "evaluate", "train")
ADAPTERS = {"serve": 8, "evaluate": 1}  # beside the base
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="Qwen2.5-1.5B,Qwen2.5-3B", help="published configs (default: %(default)s)")
    parser.add_argument("--cap-gib", type=float, default=6.0, help="limit on the allocator (default: %(default)s)")
    parser.add_argument("--serve-tokens", type=int, default=2048, help="of the served prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="prompts evaluated at once (default: %(default)s)")
    parser.add_argument("--train-tokens", type=int, default=512, help="of a trained item (default: %(default)s)")
    parser.add_argument("--phases", default=",".join(PHASES), help="which of them (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape, on any machine, measuring nothing")
    parser.add_argument("--traced", action="store_true", help="what operations ask for, counted on a CPU")
    parser.add_argument("--phase", nargs=3, metavar=("PHASE", "FOLDER", "RUNG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        one = traced_phase if options.traced else one_phase
        print(json.dumps(one(options, options.phase[0], Path(options.phase[1]), options.phase[2])))
        return
    if unknown := set(options.phases.split(",")) - set(PHASES):
        raise SystemExit(f"--phases {','.join(sorted(unknown))}; allowed: {', '.join(PHASES)}")
    if not options.rehearse and not options.traced and not has_cuda():
        raise SystemExit(
            "this measures a GPU's memory and there is none here; allowed without one: --traced, --rehearse"
        )

    found = "traced" if options.traced else "allocated"
    print(f"{'shape':<14} {'phase':<9} {'rung':<5} {'predicted':>10} {found:>10} {'off by':>8} {'reserved':>9} MiB")
    rows = []
    for shape in ["tiny"] if options.rehearse else options.shapes.split(","):
        for row in measure(options, shape):
            rows.append(row)
            show(row)
    off = [abs(row["off_by_mib"]) for row in rows if row["off_by_mib"] is not None]
    met = None if options.rehearse and not options.traced else len(off) == len(rows) and max(off) <= BAR_MIB
    if off:
        print(f"the prediction is off by {max(off):.0f} MiB at most (bar: {BAR_MIB} or less)")
    print(json.dumps({
        "benchmark": "vram", "device": device_name(), "rehearsal": options.rehearse, "traced": options.traced,
        "torch": version("torch"), "cap_gib": options.cap_gib,
        "phases": rows, "largest_error_mib": max(off) if off else None, "bar_mib": BAR_MIB, "met": met,
    }))  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line, as soon as it is known."""
    begin = f"{row['shape']:<14} {row['phase']:<9} {row['rung']:<5}"
    if row["error"]:
        print(f"{begin} {row['error']}", flush=True)
        return
    found = [
        f"{row[key]:,.0f}" if row[key] is not None else "-" for key in ("allocated_mib", "off_by_mib", "reserved_mib")
    ]
    print(f"{begin} {row['predicted_mib']:>10,.0f} {found[0]:>10} {found[1]:>8} {found[2]:>9}", flush=True)


def has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def measure(options: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """One row per phase of a shape, each from a fresh process, so that none inherits another's fragments."""
    from agentlab.hardware.shape import PUBLISHED

    config = TINY if shape == "tiny" else json.loads((PUBLISHED / f"{shape}.json").read_text(encoding="utf-8"))
    small = config["hidden_size"] < 2000
    untraced = options.rehearse and not options.traced and not has_cuda()
    rungs = ("fp32",) * 3 if untraced else ("bf16" if small else "nf4",) * 2 + ("nf4",)
    with tempfile.TemporaryDirectory() as scratch:
        # of one layer alone the peak is elsewhere
        depths = {2: Path(scratch) / "2", 3: Path(scratch) / "3"} if options.traced else {0: Path(scratch) / shape}
        for layers, folder in depths.items():
            make_model(folder, config if not layers else cut(config, layers))
        for phase, rung in zip(PHASES, rungs, strict=True):
            if phase not in options.phases.split(","):
                continue
            row: dict[str, Any] = {"shape": shape, "phase": phase, "rung": rung, "error": "", "off_by_mib": None}
            found = [in_a_process(options, phase, folder, rung) for folder in depths.values()]
            if errors := [one["error"] for one in found if "error" in one]:
                row["error"] = errors[0]
            elif options.traced:
                row |= continued(config, phase, rung, *found)
            else:
                row |= found[0]
            yield row


def in_a_process(options: argparse.Namespace, phase: str, folder: Path, rung: str) -> dict[str, Any]:
    """What a fresh process measures of one phase, or {"error"}."""
    command = [sys.executable, __file__, "--phase", phase, str(folder), rung, "--cap-gib", str(options.cap_gib)]
    command += ["--serve-tokens", str(options.serve_tokens), "--batch", str(options.batch)]
    command += ["--train-tokens", str(options.train_tokens)] + ["--traced"] * options.traced
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with so many layers."""
    short = {"num_hidden_layers": layers, "max_window_layers": layers}
    return {key: value for key, value in config.items() if key != "layer_types"} | short


def continued(
    config: dict[str, Any], phase: str, rung: str, two: dict[str, Any], three: dict[str, Any]
) -> dict[str, Any]:
    """The row of the whole depth, from what two layers and three were seen to take."""
    from agentlab.hardware import ledger
    from agentlab.hardware.rungs import RUNGS
    from agentlab.hardware.shape import ModelShape

    shape = ModelShape.from_config(config)
    weights = ledger.weights(shape, RUNGS[rung]).total
    layer = three["traced_mib"] - two["traced_mib"]
    traced = weights / MIB + two["traced_mib"] + (shape.layers - 2) * layer
    predicted = planned(shape, phase, rung, two["rows"], two["tokens"], weights) / MIB
    return {
        "rows": two["rows"], "tokens": two["tokens"], "weights_mib": weights / MIB,
        "predicted_mib": predicted, "allocated_mib": traced,
        "reserved_mib": None, "off_by_mib": predicted - traced,
    }  # fmt: skip


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A model of random weights in 16 bits, and a tokenizer of bytes with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    words = {token: number for number, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = TEMPLATE
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"} | ends)
    torch.manual_seed(0)
    # on the CPU: what this process held on the GPU would be missing to the phases, which run in others
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def planned(
    shape: Any, phase: str, rung: str, rows: int, tokens: int, weights: int, element: int = 2,
    checkpointing: bool = True, workspace: tuple[int, int] = (0, 0), sums: int = 0,
) -> int:  # fmt: skip
    """The ledger's bytes of a phase. workspace: of one thread that multiplies and of two, as in training."""
    from agentlab.hardware import ledger
    from agentlab.hardware.rungs import RUNGS

    if phase == "train":
        step = ledger.Step(
            rows,
            tokens,
            RANK,
            MODULES,
            dropout=False,
            checkpointing=checkpointing,
            mask_bytes=1 if checkpointing else 4,
        )
        return ledger.training(
            shape, RUNGS[rung], step, weight_bytes=weights, element_bytes=element, workspace_bytes=workspace[1]
        ).total
    adapters = ADAPTERS[phase] * ledger.adapter_bytes(shape, RANK, MODULES)
    return ledger.serving(
        shape, rows, tokens, weight_bytes=weights, rung=RUNGS[rung], adapter_bytes=adapters + sums,
        element_bytes=element, workspace_bytes=workspace[0],
    ).total  # fmt: skip


def run_phase(engine: Any, options: argparse.Namespace, phase: str) -> tuple[int, int]:
    """(rows, tokens) of what the phase does on a loaded engine."""
    if phase == "train":
        return train(engine, options.train_tokens)
    return serve(engine, options, ADAPTERS[phase]) if phase == "serve" else evaluate(engine, options)


def traced_phase(options: argparse.Namespace, phase: str, folder: Path, rung: str) -> dict[str, Any]:
    """What torch's operations ask for in one phase beside the weights, as they would on a GPU, counted here."""
    from allocations import Allocations, as_on_a_gpu

    from agentlab import models
    from agentlab.inference.transformers_engine import TransformersEngine

    counted = Allocations()
    with as_on_a_gpu(counted, phase == "train"):
        engine = TransformersEngine(models.resolve(str(folder)), rung=rung, device="cpu")
        counted.begin()
        with engine, counted:
            rows, tokens = run_phase(engine, options, phase)
    return {"rows": rows, "tokens": tokens, "traced_mib": counted.peak / MIB}


def one_phase(options: argparse.Namespace, phase: str, folder: Path, rung: str) -> dict[str, Any]:
    """Predicted and measured peak of one phase, run here."""
    import torch

    from agentlab import models
    from agentlab.hardware import ledger
    from agentlab.hardware.rungs import RUNGS, element_bytes
    from agentlab.hardware.shape import ModelShape
    from agentlab.inference.transformers_engine import TransformersEngine

    shape = ModelShape.read(folder / "config.json")
    cuda = torch.cuda.is_available()
    element = element_bytes(rung, "cuda" if cuda else "cpu")
    weights = ledger.weights(shape, RUNGS[rung], element).total
    sums = ledger.sum_bytes(shape, MODULES) if rung == "fp32" else 0
    capability = torch.cuda.get_device_capability() if cuda else None
    one, two = (ledger.blas_bytes(threads, capability) if cuda else 0 for threads in (1, 2))
    with TransformersEngine(models.resolve(str(folder)), options.cap_gib, rung=rung) as engine:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        rows, tokens = run_phase(engine, options, phase)
        predicted = planned(shape, phase, rung, rows, tokens, weights, element, cuda, (one, two), sums)
        peaks = (
            [torch.cuda.max_memory_allocated() / MIB, torch.cuda.max_memory_reserved() / MIB] if cuda else [None] * 2
        )
    return {
        "rows": rows, "tokens": tokens, "predicted_mib": predicted / MIB, "allocated_mib": peaks[0],
        "reserved_mib": peaks[1], "off_by_mib": None if peaks[0] is None else predicted / MIB - peaks[0],
    }  # fmt: skip


def serve(engine: Any, options: argparse.Namespace, adapters: int) -> tuple[int, int]:
    """(rows, tokens) of one long prompt that is answered with one of several adapters."""
    from agentlab.inference import Request

    names = [load_random(engine, number) for number in range(adapters)]
    chat = [
        {
            "role": "user",
            "content": "x" * (options.serve_tokens - engine.count_tokens([{"role": "user", "content": ""}])),
        }
    ]
    (done,) = engine.generate([Request(chat, adapter=names[0], max_new_tokens=32)])
    return 1, done.prompt_tokens + 32


def evaluate(engine: Any, options: argparse.Namespace) -> tuple[int, int]:
    """(rows, tokens) of a batch of prompts that share nothing, answered with one adapter."""
    from agentlab.inference import Request

    def refuse(step: Any) -> None:
        raise RuntimeError(f"it did not fit: {step.action} from {step.source} to {step.target}")

    engine.tell = refuse  # a smaller batch is not what was planned
    name = load_random(engine, 0)
    chats = [[{"role": "user", "content": chr(97 + number % 26) * 120}] for number in range(options.batch)]
    done = engine.generate([Request(chat, adapter=name, max_new_tokens=32) for chat in chats], options.batch)
    return len(chats), max(one.prompt_tokens for one in done) + 32


def train(engine: Any, tokens: int) -> tuple[int, int]:
    """(rows, tokens) of the micro-batches of three training steps."""
    from agentlab.learning.dataset import Example
    from agentlab.learning.sft import train as fine_tune
    from agentlab.records import Genome

    rows, steps = 2, 3
    genome = Genome(
        candidate="g000-c00", generation=0, operator="founder", parents=[], merge_weights=[], merge_method="exact",
        rank=RANK, alpha=2.0 * RANK, dropout=0.0, target_modules=list(MODULES), learning_rate=1e-4, steps=steps,
        batch_size=rows, data_mix={}, weight_noise=0.0, mutated=[], seed=0,
    )  # fmt: skip
    examples = [
        Example([3 + (7 * row + at) % 250 for at in range(tokens)], [0] + [1] * (tokens - 1))
        for row in range(rows * steps)
    ]
    _, training = fine_tune(engine, genome, None, examples, max_length=tokens)
    if training.remedies:
        raise RuntimeError(f"it did not fit: {training.remedies[0]['action']}")
    return rows, tokens


def load_random(engine: Any, number: int) -> str:
    """The id of a random adapter of RANK, loaded."""
    from population import random_lora

    from agentlab.adapters import save

    name = f"g000-c{number:02d}"
    with tempfile.TemporaryDirectory() as scratch:
        save(random_lora(engine, RANK, number), Path(scratch) / name)
        engine.load_adapter(name, Path(scratch) / name)
    return name


if __name__ == "__main__":
    main()
