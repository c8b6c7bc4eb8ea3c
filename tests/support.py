"""What several rooms' tests build: tiny suites and tiny experiments."""

import json


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
