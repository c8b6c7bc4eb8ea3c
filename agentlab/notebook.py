"""What the generation notebook needs beside `Lab`: parameters that are checked by name, and live progress."""

import difflib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.errors import ConfigError
from agentlab.events import Event, TrainingStep
from agentlab.lab import Lab
from agentlab.report.describe import describe
from agentlab.report.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

PARAMETERS: dict[str, type] = {"experiment": str, "generation": int, "overrides": list}
# names that IPython itself puts into a notebook
_IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}


def open_lab(names: Mapping[str, Any]) -> Lab:
    """The lab of a notebook's parameters; call it with `globals()` right after the parameters.

    A relative experiment counts from the working directory or, because JupyterLab and papermill disagree on that one,
    from the folder above it. Raises ConfigError for a parameter that does not exist or has the wrong type.
    """
    for name in names:
        if name not in PARAMETERS and not name.startswith("_") and name not in _IPYTHON and not _is_import(names[name]):
            close = difflib.get_close_matches(name, PARAMETERS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown notebook parameter {name}{hint} (allowed: {', '.join(PARAMETERS)})")
    for name, kind in PARAMETERS.items():
        if not isinstance(names.get(name), kind) or isinstance(names.get(name), bool):
            raise ConfigError(
                f"notebook parameter {name}: {names.get(name)!r}; allowed: a value of type {kind.__name__}"
            )
    path = Path(names["experiment"]).expanduser()
    if not path.is_absolute() and not path.exists() and (Path("..") / path).exists():
        path = Path("..") / path
    return Lab.open(path, names["overrides"])


def _is_import(value: Any) -> bool:
    return callable(value) or type(value).__name__ == "module"


class Ticker:
    """Shows events under a cell: one line for what matters, one updated line for progress and the time left."""

    def __init__(self, lab: Lab) -> None:
        from IPython.display import display

        self.progress = Progress.of(lab.run.settings)
        for event in lab.run.journal.replay():
            self.progress.update(event)
        self._handle = display({"text/plain": "starting …"}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self._shown_s = 0.0

    def show(self, event: Event) -> None:
        """Take in one event."""
        self.progress.update(event)
        text = describe(event)
        if text and not isinstance(event, TrainingStep):
            print(text, flush=True)
        if time.monotonic() - self._shown_s > 1.0:
            self._shown_s = time.monotonic()
            self._update()

    def _update(self) -> None:
        left = self.progress.eta_s()
        eta = f", about {left / 60:.0f} min left in the whole run" if left is not None else ""
        share = self.progress.fraction()
        done = f"{share:.0%} " if share is not None else ""
        self._handle.update({"text/plain": f"{done}{self.progress.stage()}{eta}"}, raw=True)


def parents_table(lab: Lab, generation: int) -> "pd.DataFrame":
    """The pool that this generation is bred from, best first; empty for founders."""
    table = lab.results()
    before = lab.run.result(generation - 1) if generation else None
    names = before.pool if before else []
    columns = ["candidate", "operator", "parents", "fitness", "accuracy", "ci_low", "ci_high", "learning_rate", "rank"]
    chosen = table[table["candidate"].isin(names)] if len(table) else table
    if not len(chosen):
        return chosen
    return chosen.sort_values("fitness", ascending=False)[columns].reset_index(drop=True)


def genomes_table(lab: Lab, generation: int) -> "pd.DataFrame":
    """The genomes of this generation, one row per candidate."""
    import pandas as pd

    rows = []
    for genome in (c.genome for c in lab.run.candidates() if c.genome.generation == generation):
        rows.append(
            {
                "candidate": genome.candidate,
                "operator": genome.operator,
                "parents": ", ".join(
                    f"{parent} × {weight:.2f}"
                    for parent, weight in zip(genome.parents, genome.merge_weights, strict=True)
                ),
                "learning rate": genome.learning_rate,
                "steps": genome.steps,
                "rank": genome.rank,
                "dropout": genome.dropout,
                "weight noise": genome.weight_noise,
                "data mix": ", ".join(f"{group} × {weight:g}" for group, weight in genome.data_mix.items()) or "even",
                "mutated": ", ".join(genome.mutated),
            }
        )
    return pd.DataFrame(rows)
