"""`agentlab suite …`: look at suites and make them from data."""

import json
from pathlib import Path

import click


@click.group()
def suite() -> None:
    """Suites of verifiable work: show, make from data, export."""


@suite.command("list")
def list_() -> None:
    """The built-in suites."""
    from agentlab.cli.options import table
    from agentlab.tasks import BUILT_IN, load

    rows = []
    for name in BUILT_IN:
        found = load(name, Path.cwd()).summary()
        rows.append({"suite": name, "metric": found["metric"], **found["splits"]})
    table(rows)


@suite.command()
@click.argument("name")
@click.option(
    "--items", default=0, type=click.IntRange(min=0), help="Also print so many training items as the model sees them."
)
def show(name: str, items: int) -> None:
    """Check a suite (a built-in name or a folder) and print what it holds; no item of `test` is shown."""
    from agentlab.tasks import load

    found = load(name, Path.cwd())
    click.echo(json.dumps(found.summary(), indent=1, ensure_ascii=False))
    for item in found.split("train")[:items]:
        click.echo("-" * 40)
        for message in found.chat(item):
            click.echo(f"[{message['role']}] {message['content']}")
        click.echo(f"[answer] {found.target(item)}")


@suite.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder for the suite.")
@click.option(
    "--format",
    "form",
    default="auto",
    show_default=True,
    help="auto, jsonl, csv, gsm8k, clinc150, bfcl, or hub (a data set name; the only one that uses the network).",
)
@click.option("--metric", help="exact, number, label, json, tool_call or package.module:function. Default: guessed.")
@click.option("--prompt-column", help="Default: prompt, question, text, … whichever is there.")
@click.option("--answer-column", help="Default: answer, label, target, … whichever is there.")
@click.option("--labels", help="Comma-separated; chooses the intents of CLINC150. Default: those in the data.")
@click.option("--system", help="System prompt.")
@click.option("--license", "license_name", help="License of the data, kept in suite.yaml.")
@click.option("--sizes", help="Like train=400,fitness=64,gate=100,test=200. Default: from what there is.")
@click.option("--seed", default=7, type=click.IntRange(min=0), show_default=True, help="Decides the split.")
@click.option("--test-source", help="A separate file that becomes the test split.")
def make(
    source: str,
    out: Path,
    form: str,
    metric: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    labels: str | None,
    system: str | None,
    license_name: str | None,
    sizes: str | None,
    seed: int,
    test_source: str | None,
) -> None:
    """Turn a JSONL or CSV file, or a data set, into a suite folder with four splits."""
    from agentlab.tasks import make_suite

    made = make_suite(
        source,
        out,
        format=form,  # type: ignore[arg-type]
        metric=metric,
        prompt_column=prompt_column,
        answer_column=answer_column,
        labels=[label.strip() for label in labels.split(",")] if labels else None,
        system=system,
        license=license_name,
        sizes=_sizes(sizes) if sizes else None,
        seed=seed,
        test_source=test_source,
    )
    for warning in made.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(json.dumps(made.summary(), indent=1, ensure_ascii=False))


@suite.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
def export(name: str, out: Path) -> None:
    """Write a built-in suite as a folder, to look at or to change."""
    from agentlab.tasks import export_built_in

    export_built_in(name, out)
    click.echo(str(out))


def _sizes(text: str) -> dict[str, int]:
    from agentlab.errors import SuiteError

    sizes = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if not (value.strip().isascii() and value.strip().isdigit()):  # "²" is a digit, too
            raise SuiteError(f"--sizes {text}: write it like train=400,fitness=64,gate=100,test=200")
        sizes[key.strip()] = int(value)
    return sizes
