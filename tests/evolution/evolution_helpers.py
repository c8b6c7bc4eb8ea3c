"""A tiny run in this process, and what of its outcome must not depend on the machine's clock."""

from agentlab.evolution.generation import run_generation
from agentlab.lab import Lab

# Enough training for the tiny model to write labels at all, so that fitness differs and somebody passes the gate.
LEARNING = [
    "population.size=4",
    "population.mutation_rate=0.3",
    "training.steps=12",
    "training.founder_share=0.5",
    "lora.dropout=0.0",
]


class Crash(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def evolve(lab, emit=lambda event: None, generations=None):
    for generation in range(lab.run.settings.population.generations) if generations is None else generations:
        run_generation(lab.run, lab.suite, generation, emit)


def flip_bytes(path):
    data = bytearray(path.read_bytes())
    for position in range(len(data) - 64, len(data)):
        data[position] ^= 0xFF
    path.write_bytes(bytes(data))


def open_copy(experiment, folder, overrides=()):
    """The same experiment (same run hash: its suite and model are absolute paths) in a project of its own."""
    copy = folder / "experiments" / experiment.name
    copy.parent.mkdir(parents=True)
    copy.write_text(experiment.read_text())
    return Lab.open(copy, overrides)


def number(value):
    """Six significant digits."""
    return float(f"{value:.6g}")


def genome_summary(genome):
    return {
        "candidate": genome.candidate,
        "operator": genome.operator,
        "parents": genome.parents,
        "merge_weights": [number(weight) for weight in genome.merge_weights],
        "rank": genome.rank,
        "alpha": number(genome.alpha),
        "dropout": number(genome.dropout),
        "learning_rate": number(genome.learning_rate),
        "steps": genome.steps,
        "data_mix": {group: number(weight) for group, weight in genome.data_mix.items()},
        "weight_noise": number(genome.weight_noise),
        "mutated": genome.mutated,
        "seed": genome.seed,
    }


def lineage(run):
    """Everything that was decided in a run, without anything that was timed."""
    candidates = []
    for candidate in run.candidates():
        summary = genome_summary(candidate.genome)
        summary["state"] = candidate.state
        summary["fitness"] = None if candidate.score is None else round(candidate.fitness, 6)
        candidates.append(summary)
    generations = [
        {
            "members": result.members,
            "pool": result.pool,
            "culled": result.culled,
            "champion": result.champion,
            "verdict": result.verdict and [result.verdict.wins, result.verdict.losses, result.verdict.passed],
        }
        for result in run.results()
    ]
    return {"candidates": candidates, "generations": generations}


def weight_hashes(run):
    """sha256 of each candidate's weights as trained, those of culled ones included."""
    return {candidate.genome.candidate: candidate.weights_sha256 for candidate in run.candidates()}
