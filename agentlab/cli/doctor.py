"""`agentlab doctor`: is this machine ready, and what to do where it is not."""

import contextlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from agentlab.hardware.doctor import Facts

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check driver, versions, memory, disk, models, store and notebook kernel; what is not ok comes with its remedy.

    The project is the working directory. Exit code 1 when something fails, 0 otherwise.
    """
    from agentlab.hardware.doctor import diagnose, exit_code

    findings = diagnose(facts(Path.cwd()))
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
    import psutil

    from agentlab import config, models
    from agentlab.errors import AgentlabError
    from agentlab.hardware import monitor
    from agentlab.hardware.doctor import Facts
    from agentlab.hardware.lease import holder
    from agentlab.tracking import store

    stats = monitor.memory_stats()
    embedded = store_problem = None
    try:
        models.check(models.EMBEDDED)
    except AgentlabError as error:
        embedded = str(error)
    try:
        if store.database(root).exists():
            store.check(root)
    except AgentlabError as error:
        store_problem = str(error)
    kernel = _kernel()
    return Facts(
        gpus=monitor.gpus(),
        driver=monitor.driver_version(),
        torch=_version("torch"),
        packages=dict(_packages()),
        ram_total_mb=stats.cpu_total,
        ram_free_mb=stats.cpu_free,
        swap_total_mb=psutil.swap_memory().total / 2**20,
        disk_free_gib={folder: _free_gib(folder) for folder in (config.home(), root)},
        models=[str(row["name"]) for row in models.listed() if Path(row["folder"]).is_dir()],
        embedded_model=embedded,
        store=store.database(root),
        store_problem=store_problem,
        kernel=kernel,
        kernel_exists=kernel is not None and shutil.which(kernel) is not None,
        python=sys.executable,
        wsl2="microsoft" in platform.uname().release.lower(),
        holder=holder(config.home() / "accelerator.lock"),
    )


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


def _free_gib(folder: Path) -> float:
    """Free space where the folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def _kernel() -> str | None:
    """The program that Jupyter's kernel python3 starts."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        return str(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except (NoSuchKernel, IndexError):
        return None
