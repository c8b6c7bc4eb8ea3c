"""Files of a run as MLflow artifacts: copied when they differ, deleted only below the project's own store."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OF_GENERATION = ("notebook.ipynb", "*.html", "figures/**/*", "errors.*")


def publish_folder(client: "MlflowClient", run: Any, folder: Path) -> None:
    """The lab record that lies in a generation's folder: notebook.ipynb, *.html, figures/ and errors.*."""
    publish(
        client, run, {path for pattern in _OF_GENERATION for path in folder.glob(pattern) if path.is_file()}, folder
    )


def publish_figures(client: "MlflowClient", run: Any, figures: Mapping[str, Any]) -> None:
    """Figures by name: files as they are, HTML texts and plotly figures as one HTML file each that needs no network."""
    for name, figure in figures.items():
        if isinstance(figure, Path):
            publish(client, run, [figure], figure.parent)
            continue
        html = figure if isinstance(figure, str) else figure.to_html(include_plotlyjs=True, full_html=True)
        client.log_text(run.info.run_id, html, f"{name}.html")


def publish(client: "MlflowClient", run: Any, files: Iterable[Path], base: Path) -> None:
    """Copy files into the run's artifacts at their path below `base`; what is there unchanged is left alone."""
    artifacts = local_path(run.info.artifact_uri)
    for file in files:
        place = file.relative_to(base).parent.as_posix()
        if _unlike(file, artifacts / file.relative_to(base)):
            client.log_artifact(run.info.run_id, str(file), None if place == "." else place)


def _unlike(file: Path, copy: Path) -> bool:
    return not copy.exists() or _stamp(file) != _stamp(copy)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns // 1_000_000


def local_path(artifact_uri: str) -> Path:
    """Folder of an artifact location of ours, which is a plain path or a file URI."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(local_file_uri_to_path(artifact_uri))


def remove_artifacts(root: Path, artifact_uri: str) -> bool:
    """Delete an artifact folder below the project's store; whether there was one."""
    path = local_path(artifact_uri)
    if not path.is_dir() or not path.resolve().is_relative_to(store.folder(root)):
        return False
    shutil.rmtree(path)
    return True
