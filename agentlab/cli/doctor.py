"""`agentlab doctor`: is this machine ready, and what to do where it is not."""

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from agentlab.errors import ConfigError

if TYPE_CHECKING:
    from agentlab.hardware.doctor import Facts

T = TypeVar("T")
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check driver, versions, memory, disk, models, store and notebook kernel; what is not ok comes with its remedy.

    The project is the working directory. Exit code 1 when something fails, 0 otherwise.
    """
    from agentlab.hardware.doctor import diagnose, exit_code

    try:
        root = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working directory is gone; go to a project's folder") from None
    findings = diagnose(facts(root))
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings]))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            remedy = f" → {finding.remedy}" if finding.remedy else ""
            status = click.style(f"{finding.status:<4}", fg=_COLOURS[finding.status])
            click.echo(f"{status}  {finding.name:<{width}}  {finding.text}{remedy}")
    sys.exit(exit_code(findings))


def facts(root: Path) -> "Facts":
    """What is true of this machine and of the project at `root`. Changes nothing but may open the store."""
    from agentlab import config, files
    from agentlab.hardware import compiler, monitor
    from agentlab.hardware.doctor import Facts
    from agentlab.hardware.lease import holder
    from agentlab.inference import vllm_build
    from agentlab.tracking import store

    stats, home = monitor.memory_stats(), config.home()
    kernel = _kernel()
    return Facts(
        gpus=monitor.gpus(),
        driver=monitor.driver_version(),
        driver_cuda=monitor.driver_cuda(),
        torch=_version("torch"),
        torch_cuda=monitor.torch_cuda(),
        compiler_missing=compiler.missing(),
        vllm=vllm_build.build(),
        packages=dict(_packages()),
        ram_total_mb=stats.cpu_total,
        ram_free_mb=stats.cpu_free,
        swap_total_mb=_swap_mb(),
        disk_free_gib={folder: free for folder in (home, root) if (free := _free_gib(folder)) is not None},
        models=_models(),
        embedded_model=_embedded_problem(),
        store=store.database(root),
        store_problem=_store_problem(root),
        kernel=kernel,
        kernel_exists=kernel is not None and shutil.which(kernel) is not None,
        python=sys.executable,
        wsl2="microsoft" in platform.uname().release.lower(),
        holder=_readable(lambda: holder(home / "accelerator.lock"), None),
        unusable={folder: why for folder in (home, root) if (why := files.obstacle(folder))},
    )


def _readable(look: Callable[[], T], otherwise: T) -> T:
    """What `look` finds; `otherwise` where it may not look."""
    try:
        return look()
    except OSError:
        return otherwise


def _swap_mb() -> float | None:
    import psutil

    with contextlib.suppress(Exception):  # a container may hide parts of /proc
        return float(psutil.swap_memory().total / 2**20)
    return None


def _models() -> list[str]:
    from agentlab import models

    return _readable(lambda: [str(row["name"]) for row in models.listed() if Path(row["folder"]).is_dir()], [])


def _embedded_problem() -> str | None:
    from agentlab import models
    from agentlab.errors import AgentlabError

    try:
        models.check(models.EMBEDDED)
    except (AgentlabError, OSError) as error:
        return str(error)
    return None


def _store_problem(root: Path) -> str | None:
    """What is wrong with the project's store; that there is none yet is nothing."""
    from agentlab import files
    from agentlab.errors import AgentlabError
    from agentlab.tracking import store

    if why := files.obstacle(store.folder(root)):
        return f"{store.folder(root)} cannot be written to: {why}"
    try:
        if store.database(root).exists():
            store.check(root)
    except (AgentlabError, OSError) as error:
        return str(error)
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[tuple[str, tuple[str | None, str, bool]]]:
    """(name, (installed, allowed, fits)) of each package that agentlab declares for every machine."""
    from packaging.requirements import Requirement

    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("agentlab") or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                installed = _version(wanted.name)
                fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
                yield wanted.name, (installed, str(wanted.specifier), fits)


def _free_gib(folder: Path) -> float | None:
    """Free space where the folder is, or will be; None where nobody may ask."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return _readable(lambda: shutil.disk_usage(folder).free / 2**30, None)


def _kernel() -> str | None:
    """The program that Jupyter starts for the kernel python3; for the bare word python it is the one that runs this."""
    from jupyter_client.kernelspec import NoSuchKernel
    from jupyter_client.manager import KernelManager

    try:
        return str(KernelManager(kernel_name="python3").format_kernel_cmd()[0])
    except (NoSuchKernel, IndexError):
        return None
