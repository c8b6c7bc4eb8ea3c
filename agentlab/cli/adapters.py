"""`agentlab adapters …`: look at the pool of a run, merge, export and prune."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentlab.cli.options import existing, experiment, overrides, table
from agentlab.errors import AdapterError, RunError

if TYPE_CHECKING:
    from agentlab.adapters import Card


def _pool(experiment: Path, overrides: tuple[str, ...]):  # type: ignore[no-untyped-def]
    from agentlab.adapters import Pool

    lab = existing(experiment, overrides)
    return lab, Pool(lab.run.folder / "adapters", lab.run.settings.population.pool)


def _measured(card: "Card", name: str) -> str:
    value = card.performance_metrics.get(name)
    return "–" if value is None else f"{value:.3f}"


@click.group()
def adapters() -> None:
    """Look at the adapters of a run; merge, export and prune them."""


@adapters.command("list")
@experiment
@overrides
@click.option("--all", "everything", is_flag=True, help="Also those that were culled.")
def list_(experiment: Path, overrides: tuple[str, ...], everything: bool) -> None:
    """The pool, best first."""
    lab, pool = _pool(experiment, overrides)
    champion = lab.run.champion()
    cards = pool.members()
    if everything:
        cards = cards + [card for card in pool.cards() if card.weights is None]
    table(
        [
            {
                "adapter": card.adapter_id + (" ★" if card.adapter_id == champion else ""),
                "state": "culled" if card.weights is None else "kept",
                **{name: _measured(card, name) for name in ("fitness", "accuracy")},
                "operator": card.operator,
                "parents": " ".join(card.parent_ids),
                "rank": card.rank,
                "uses": card.usage_count,
            }
            for card in cards
        ]
    )


@adapters.command()
@experiment
@overrides
@click.argument("adapter")
def show(experiment: Path, overrides: tuple[str, ...], adapter: str) -> None:
    """An adapter's card as JSON; `champion` names the champion, `best` the pool's fittest on the run's suite."""
    lab, pool = _pool(experiment, overrides)
    click.echo(json.dumps(pool.card(_named(lab, pool, adapter)).model_dump(mode="json"), indent=1))


@adapters.command()
@experiment
@overrides
@click.argument("parents", nargs=-1, required=True)
@click.option("--weights", help="One number per parent, comma-separated. Default: equal.")
@click.option("--rank", type=click.IntRange(1, 256), help="Rank of the result. Default: the first parent's.")
@click.option("--method", default="exact", show_default=True, help="exact, or one of PEFT's: linear, svd, ties, …")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder for the merged adapter.")
def merge(
    experiment: Path,
    overrides: tuple[str, ...],
    parents: tuple[str, ...],
    weights: str | None,
    rank: int | None,
    method: str,
    out: Path,
) -> None:
    """Merge adapters of the pool into a new PEFT folder; the pool is not changed."""
    from typing import get_args

    from agentlab.adapters import crossover, load, save
    from agentlab.config import MergeMethod

    if method not in get_args(MergeMethod):
        raise AdapterError(f"--method {method}; allowed: {', '.join(get_args(MergeMethod))}")
    if out.exists():
        raise AdapterError(f"{out} exists already; choose a new folder")
    lab, pool = _pool(experiment, overrides)
    loras = [load(pool.verify(_named(lab, pool, parent))) for parent in parents]
    try:
        shares = [float(text) for text in weights.split(",")] if weights else [1 / len(loras)] * len(loras)
    except ValueError:
        raise AdapterError(f"--weights {weights}: write numbers with commas between, like 0.7,0.3") from None
    if len(shares) != len(loras):
        raise AdapterError(f"--weights names {len(shares)} numbers for {len(loras)} adapters")
    if not any(shares):
        raise AdapterError(f"--weights {weights}: nothing would be left; allowed: numbers that are not all 0")
    merged = crossover(loras, shares, rank or loras[0].rank, method=method)  # type: ignore[arg-type]
    save(dataclasses.replace(merged, base_model=loras[0].base_model), out)
    click.echo(str(out))


@adapters.command()
@experiment
@overrides
@click.argument("adapter")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--merged", is_flag=True, help="Write the whole model with the adapter merged in, not the adapter alone.")
def export(experiment: Path, overrides: tuple[str, ...], adapter: str, out: Path, merged: bool) -> None:
    """Copy an adapter as a plain PEFT folder, or a merged transformers model.

    `champion` names the champion, `best` the pool's fittest on the run's suite, which the gate may have refused.
    """
    from agentlab import models

    lab, pool = _pool(experiment, overrides)
    base = None
    if merged:
        files = models.resolve(lab.run.settings.model.primary, lab.run.root)
        base, pool.base_sha256 = (
            files.folder,
            files.sha256,
        )  # merged into other weights it would be wrong without a word
    click.echo(str(pool.export(_named(lab, pool, adapter), out, base)))


@adapters.command()
@experiment
@overrides
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many adapters keep their weights.")
def prune(experiment: Path, overrides: tuple[str, ...], keep: int) -> None:
    """Delete the weights of all but the best adapters of a finished run; cards and the champion stay."""
    lab, pool = _pool(experiment, overrides)
    if lab.is_running() or not lab.is_finished():
        raise RunError(f"{lab.run.id} is not finished: the next generation is bred from its pool, so nothing is pruned")
    culled = pool.prune(keep, {lab.run.champion()})
    for card in pool.cards():  # also those whose records a kill left behind
        candidate = lab.run.candidate(card.adapter_id)
        if card.weights is None and candidate is not None and candidate.state != "culled":
            lab.run.save_candidate(candidate.model_copy(update={"state": "culled"}))
    lab.reconcile()  # the copies in MLflow go too
    click.echo(f"culled: {', '.join(culled) or 'none'}")


def _named(lab, pool, adapter: str) -> str:  # type: ignore[no-untyped-def]
    if adapter == "best":
        if (best := pool.best(lab.suite.name)) is None:
            raise AdapterError(f"{lab.run.id} has no adapter yet that was measured on {lab.suite.name}")
        return str(best.adapter_id)
    if adapter != "champion":
        return adapter
    champion = lab.run.champion()
    if champion == "base":
        raise AdapterError(f"{lab.run.id} has no champion yet: no candidate has passed the gate")
    return str(champion)
