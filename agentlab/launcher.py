"""One kernel per generation: papermill executes the generation notebook, this process follows the journal."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab import errors
from agentlab.errors import AgentlabError, EvolutionStopped, RunError
from agentlab.events import Event, GenerationFailed, GenerationFinished, Stopped

if TYPE_CHECKING:
    from agentlab.lab import Lab

NOTEBOOK = "generation.ipynb"


def notebook_path(root: Path) -> Path:
    """The project's own generation notebook, or the one this program came with."""
    places = [root / "notebooks" / NOTEBOOK, Path(__file__).resolve().parent.parent / "notebooks" / NOTEBOOK]
    for place in places:
        if place.is_file():
            return place
    raise RunError(f"no {NOTEBOOK} in {places[0].parent}; copy it there from agentlab's notebooks folder")


def run_notebook(lab: "Lab", generation: int) -> Iterator[Event]:
    """Execute the notebook for one generation in a kernel of its own and yield the journal's new events.

    The executed copy lies in the generation's folder. Raises RunError when the kernel failed or died.
    """
    template = notebook_path(lab.run.root)
    out = lab.run.generation_folder(generation) / "notebook.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    offset = lab.run.journal.size()
    failure: list[BaseException] = []

    def execute() -> None:
        try:
            _execute(template, out, lab, generation)
        except BaseException as error:  # looked at by the consumer below
            failure.append(error)

    worker = threading.Thread(target=execute, name="papermill", daemon=True)
    worker.start()
    last: Event | None = None
    while True:
        try:
            last_round = not worker.is_alive()
            for event, end in lab.run.journal.read(offset):
                last, offset = event, end
                yield event
            if last_round:
                break
            time.sleep(0.2)
        except KeyboardInterrupt:  # the first one asks the kernel to stop, a second one ends this process too
            if lab.run.stop_file.exists() or not lab.stop():
                raise
    worker.join()
    if failure and not isinstance(last, GenerationFailed | Stopped):
        # the kernel could not say it itself: it was killed, or never came up
        event = GenerationFailed(generation=generation, error=_reason(failure[0]))
        lab.run.journal.append(event)
        lab.was_killed(generation)
        yield event
        last = event
    if isinstance(last, GenerationFailed):
        failed = errors.of_exit_code(last.exit_code)
        raise failed(
            f"generation {generation} of {lab.run.id} failed: {last.error} (the executed notebook: {out}; what is "
            "finished is kept, and the same command continues)"
        )
    if not isinstance(last, GenerationFinished | Stopped) and lab.run.result(generation) is None:
        raise RunError(f"the notebook for generation {generation} ended without finishing it; see {out}")


def _execute(template: Path, out: Path, lab: "Lab", generation: int) -> None:
    import papermill

    for name in ("papermill", "nbclient", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parameters: dict[str, Any] = {
        "experiment": str(lab.experiment),
        "generation": generation,
        "overrides": list(lab.overrides),
    }
    with _environment(AGENTLAB_LAUNCHER_PID=str(os.getpid()), PYDEVD_DISABLE_FILE_VALIDATION="1"):
        papermill.execute_notebook(
            str(template),
            str(out),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(lab.run.root),
            progress_bar=False,
            log_output=False,
            request_save_on_cell_execute=True,
            # it warns about TCP on the loopback interface, once per generation, and calls the interrupt by which it is
            # shut down an error; what fails in a cell is in the notebook
            extra_arguments=["--IPKernelApp.log_level=50"],
            autosave_cell_every=30,
        )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for the kernel to inherit, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reason(error: BaseException) -> str:
    if isinstance(error, AgentlabError):
        return str(error)
    if hasattr(error, "evalue"):  # papermill's error for a cell that raised
        return str(error.evalue)
    if type(error).__name__ == "DeadKernelError":
        return "its kernel died (killed, or out of memory)"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def die_with_launcher() -> None:
    """Under a launcher: have Linux kill this kernel when the launcher dies, so that no orphan goes on working."""
    launcher = os.environ.get("AGENTLAB_LAUNCHER_PID")
    if launcher is None:
        return
    import ctypes
    import signal

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):
        raise EvolutionStopped("the launcher of this kernel is gone")
