"""A run in the terminal while it happens: a live panel for a person, plain lines for a log."""

import datetime
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from agentlab.events import Event
from agentlab.report import words
from agentlab.report.describe import describe, is_notice, model_name
from agentlab.report.progress import Progress, Row

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table

NOTICES = 4  # last verdicts and warnings kept in sight
ROWS = 12  # candidates shown at once
COLOURS = {"kept": "green", "evaluated": "green", "training": "cyan", "failed": "red", "culled": "dim", "bred": "dim"}


class Display:
    """Shows events: `with Display(Progress.of(settings), history=journal.replay()) as display: display.show(event)`.

    `history` are the run's events so far; they count for progress and are not shown again.
    """

    def __init__(
        self, progress: Progress | None = None, *, console: "Console | None" = None, history: Iterable[Event] = ()
    ) -> None:
        from rich.console import Console

        self.console = console or Console()
        self.progress = progress or Progress()
        self._notices: list[tuple[str, bool]] = []
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._began_s = time.monotonic()
        # a dumb terminal or one without UTF-8 cannot draw a panel
        utf8 = self.console.encoding.lower().startswith("utf")
        self._interactive = self.console.is_terminal and not self.console.is_dumb_terminal and utf8
        for event in history:
            self.progress.update(event)

    def __enter__(self) -> Self:
        if self._interactive:
            from rich.live import Live

            self._live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def show(self, event: Event) -> None:
        """Take in one event and show what it changes."""
        with self._lock:
            self.progress.update(event)
            text = describe(event)
            if text and is_notice(event):
                self._notices = [*self._notices, (text, _is_trouble(event))][-NOTICES:]
        if not self._live and text:
            self._print(event, text)

    def _print(self, event: Event, text: str) -> None:
        clock = datetime.datetime.fromtimestamp(event.time_s).strftime("%H:%M:%S")
        share, left = self.progress.fraction(), self.progress.eta_s()
        where = "" if share is None or self.progress.ended else f" [{100 * share:.0f} %{_left(left)}]"
        line = f"{clock} {text}{where}"
        encoding = self.console.encoding
        line = line.encode(encoding, "replace").decode(encoding)
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    # -- the panel ----------------------------------------------------------------------------------------------

    def _panel(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        with self._lock:
            progress = self.progress
            parts: list[object] = [self._bar(), Text(words.clean(progress.stage()), style="cyan", no_wrap=True)]
            if row := progress.current():
                parts.append(_training(row))
            # while the next generation loads, the last one stays in sight
            if rows := progress.rows() or progress.rows((progress.generation or 0) - 1):
                parts.append(self._table(rows))
            parts.append(Text(f"champion: {model_name(progress.champion)}"))
            for text, trouble in self._notices:
                parts.append(Text(f"· {text}", style="yellow" if trouble else "green", overflow="fold"))
            title = progress.run or "agentlab"
            if progress.generation is not None and progress.generations is not None:
                title += f" · generation {progress.generation} (the last is {progress.generations - 1})"
        panel = Panel(Group(*parts), title=Text(title), title_align="left", box=box.ROUNDED, padding=(0, 1))  # type: ignore[arg-type]
        return Group(panel)

    def _bar(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        share = self.progress.fraction()
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        waited = words.duration(time.monotonic() - self._began_s)
        if self.progress.ended:
            left = self.progress.stage()
        else:
            left = "measuring speed" if share is None else f"{100 * share:.0f} %{_left(self.progress.eta_s())}"
        bar = ProgressBar(total=1.0, completed=share or 0.0, pulse=share is None and not self.progress.ended)
        grid.add_row(bar, f"{left} · {waited} so far")
        return grid

    def _table(self, rows: list[Row]) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
        table.add_column("candidate", no_wrap=True)
        table.add_column("bred by", overflow="fold")
        table.add_column("state", no_wrap=True)
        table.add_column("accuracy (95 %)", justify="right", no_wrap=True)
        table.add_column("fitness", justify="right", no_wrap=True)
        busy = next((index for index, row in enumerate(rows) if not row.settled), len(rows))
        first = max(0, min(busy - ROWS // 2, len(rows) - ROWS))
        for row in rows[first : first + ROWS]:
            star = " ★" if row.candidate == self.progress.champion else ""
            state = f"step {row.step}/{row.steps}" if row.state == "training" else row.state
            accuracy = "" if row.accuracy is None else words.percent(row.accuracy)
            if row.ci_low is not None and row.ci_high is not None:
                accuracy += f" ({words.interval(row.ci_low, row.ci_high)})"
            table.add_row(
                Text(row.candidate + star), Text(_origin(row)), Text(state, style=COLOURS.get(row.state, "")),
                Text(accuracy), Text("" if row.fitness is None else f"{row.fitness:.3f}"),
            )  # fmt: skip
        if len(rows) > ROWS:
            table.add_row(Text(f"… {len(rows) - ROWS} more", style="dim"))
        return table


def _training(row: Row) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=24)
    grid.add_column(no_wrap=True)
    loss = "" if row.loss is None else f"loss {row.loss:.3f}"
    remedies = f", {words.counted(row.remedies, 'remedy', 'remedies')}" if row.remedies else ""
    grid.add_row(ProgressBar(total=row.steps or 1, completed=row.step, width=24), loss + remedies)
    return grid


def _origin(row: Row) -> str:
    if len(row.parents) > 1:
        return " × ".join(row.parents)
    return f"{row.operator} of {row.parents[0]}" if row.parents else row.operator


def _left(eta_s: float | None) -> str:
    if eta_s is not None and eta_s < 1:
        return ", almost done"
    return "" if eta_s is None else f", about {words.duration(eta_s)} left"


def _is_trouble(event: Event) -> bool:
    return event.kind in ("warned", "remedy_applied", "candidate_failed", "generation_failed", "stopped") or (
        event.kind == "gate_decided" and not getattr(event, "passed", True)
    )
