"""What several commands share: the experiment's argument, `--set`, the run they mean, and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from agentlab.lab import Lab


class _Seconds(click.ParamType):  # type: ignore[type-arg]
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        try:
            found = float(value)
        except ValueError:
            found = 0.0
        if not 0 < found < 1e6:  # nan neither
            self.fail(f"{value!r}; allowed: seconds above 0, below a million", param, context)
        return found


SECONDS = _Seconds()
experiment = click.argument("experiment", type=click.Path(path_type=Path))
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set training.steps=12."
)


def existing(experiment: Path, overrides: tuple[str, ...]) -> "Lab":
    """The run that these settings name or, said on stderr, the newest one of the experiment."""
    from agentlab.lab import Lab

    lab = Lab.open_existing(experiment, overrides)
    wanted = Lab.open(experiment, overrides)
    if lab.run.id != wanted.run.id:
        click.echo(f"({wanted.run.id} was never started; showing the newest run, {lab.run.id})", err=True)
    return lab


def running(experiment: Path, overrides: tuple[str, ...]) -> "Lab":
    """What `existing` finds or, said on stderr, another run of the experiment that somebody works on."""
    from agentlab.lab import Lab

    lab, found = existing(experiment, overrides), Lab.open_running(experiment, overrides)
    if found.run.id != lab.run.id:
        click.echo(f"({lab.run.id} is not running, but {found.run.id}, with other settings, is)", err=True)
    return found


def table(rows: list[dict[str, Any]]) -> None:
    """Print dictionaries with the same keys as aligned columns."""
    if not rows:
        click.echo("none yet")
        return
    cells = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
