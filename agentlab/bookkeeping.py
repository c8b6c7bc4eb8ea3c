"""What is written down of a run: its settings, each piece of news, a generation's tables and figures, MLflow's view."""

import contextlib
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentlab import config, files
from agentlab.errors import AgentlabError, EvolutionStopped, RunError
from agentlab.events import Event, GenerationFailed, Stopped, Warned
from agentlab.evolution.run import Run
from agentlab.tasks import Item, Suite

if TYPE_CHECKING:
    from agentlab.tracking import Recorder

Texts = dict[str, str]


class Books:
    """The books of one run. The journal comes first; the rest can be made anew from the run's folder."""

    def __init__(self, run: Run, suite: Suite) -> None:
        self.run = run
        self.suite = suite

    def open(self) -> None:
        """Write the resolved settings down, once."""
        path = self.run.folder / "config.yaml"
        if not path.exists():
            files.write_text(path, config.dump(self.run.settings))

    def append(self, event: Event) -> Event:
        """Put an event of the caller's own into the journal; the event."""
        self.run.journal.append(event)
        return event

    def take(self, item: Event | BaseException | None, recorder: "Recorder", generation: int) -> list[Event]:
        """Write one piece of news down; the events to show for it.

        item: an event, which is in the journal already; None: the generation is finished; or with what it ended.
        """
        shown: list[Event] = []
        if isinstance(item, Event):
            recorder.observe(item)
            shown = [item]
        elif item is None:
            self.write_generation(generation)
            recorder.reconcile()
        else:
            stopped = isinstance(item, EvolutionStopped)
            trace = "" if stopped else "".join(traceback.format_exception(item))
            try:
                recorder.interrupted("stopped" if stopped else "failed", generation, trace)
            finally:  # what ends a generation is the journal's last word, also where a second Ctrl-C came between
                shown = self._warnings(recorder)
                with contextlib.suppress(AgentlabError):  # a full disk must not hide the error that it caused
                    shown.append(self.append(_end(item, generation)))
        return [*self._warnings(recorder), *shown]

    def _warnings(self, recorder: "Recorder") -> list[Event]:
        """What MLflow could not take, as events."""
        found: list[Event] = []
        while recorder.problems:
            with contextlib.suppress(AgentlabError):
                found.append(self.append(Warned(message=recorder.problems.pop(0))))
        return found

    def write_generation(self, generation: int) -> None:
        """Lineage and errors as files in the generation's folder, from where they become artifacts."""
        from agentlab import report

        folder = self.run.generation_folder(generation)
        page = report.lineage(self.run).to_html(include_plotlyjs=True, config={"showSendToCloud": False})
        files.write_text(folder / "lineage.html", page)
        champion = self.run.champion()
        scored = champion if self.run.score(champion, "gate") else "base"
        if self.run.score(scored, "gate"):
            prompts, expected = self.texts(self.suite.split("gate"))
            table = report.error_table(self.run, scored, "gate", prompts, expected)
            files.write_text(folder / "errors.csv", table.to_csv(index=False))

    def complete(self) -> None:
        """Do what a kill right after the newest result has left undone: its culling, its table and figure."""
        from agentlab.evolution.tidying import tidy

        results = self.run.results()
        if results:
            tidy(self.run, results[-1])
            folder = self.run.generation_folder(results[-1].generation)
            if not all((folder / name).exists() for name in ("lineage.html", "errors.csv")):
                self.write_generation(results[-1].generation)

    def recorder(self) -> "Recorder":
        """What carries this run into MLflow."""
        from agentlab.tracking import Recorder, SuiteInfo

        counts = {name: len(self.suite.split(name)) for name in ("train", "fitness", "gate")}
        counts["test"] = self.suite.test_items
        folder = str(self.suite.folder) if self.suite.folder else None
        return Recorder(self.run, SuiteInfo(self.suite.name, self.suite.digest, folder, counts))

    def suite_changed(self) -> bool:
        """Whether the suite is another one than that of the run's answers: then its items do not belong to them."""
        score = self.run.score("base", "fitness")
        return score is not None and score.suite != self.suite.digest

    def shown_texts(self) -> tuple[dict[str, Texts], dict[str, Texts]]:
        """Prompts and expected answers by split, of what may be shown beside the run's answers."""
        from agentlab.evolution.seal import opened_items

        if self.suite_changed():
            return {}, {}
        splits = {"gate": self.suite.split("gate"), "test": opened_items(self.run, self.suite)}
        found = {split: self.texts(items) for split, items in splits.items()}
        return {split: texts[0] for split, texts in found.items()}, {split: texts[1] for split, texts in found.items()}

    def texts(self, items: Sequence[Item]) -> tuple[Texts, Texts]:
        """Prompts and expected answers by the items' positions."""
        prompts = {str(position): item.messages[-1]["content"] for position, item in enumerate(items)}
        return prompts, {str(position): self.suite.target(item) for position, item in enumerate(items)}


def _end(item: BaseException, generation: int) -> Event:
    if isinstance(item, EvolutionStopped):
        return Stopped(reason=str(item))
    if isinstance(item, AgentlabError):
        return GenerationFailed(generation=generation, error=str(item), exit_code=item.exit_code)
    text = f"{type(item).__name__}: {item}"
    return GenerationFailed(generation=generation, error=text, exit_code=RunError.exit_code)
