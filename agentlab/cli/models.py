"""`agentlab models …`: what is on this machine, and downloads that were asked for."""

import click

from agentlab import models as model_files
from agentlab.errors import ModelError


@click.group()
def models() -> None:
    """Models on this machine; nothing is downloaded unless `get` is called."""


@models.command("list")
def list_() -> None:
    """The embedded model and every converted one."""
    from agentlab.cli.options import table

    table(model_files.listed())


@models.command()
@click.argument("name", default=model_files.EMBEDDED)
def prepare(name: str) -> None:
    """Convert the embedded model (or a GGUF file) now instead of on first use."""
    click.echo(f"preparing {name}; the first time it is converted, which takes about half a minute", err=True)
    found = model_files.resolve(name)
    click.echo(f"{found.name}: {found.folder} (sha256 {found.sha256[:12]})")


@models.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def get(name: str, yes: bool) -> None:
    """Download a model from the hub, after showing its size and license."""
    if name.count("/") != 1:
        raise ModelError(f"{name!r} is no hub id; write it like org/name")
    details = model_files.hub_details(name)
    click.echo(f"{name}: {details['size_mb']} MB, license {details['license']}, {len(details['files'])} files")
    if yes or click.confirm("download?"):
        click.echo(str(model_files.get(name)))
