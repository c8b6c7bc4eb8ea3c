"""`agentlab serve`: the agent of an experiment behind an OpenAI-compatible endpoint."""

import json
from pathlib import Path

import click

from agentlab.cli.agent import _chosen
from agentlab.cli.options import SECONDS, overrides


@click.command()
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@overrides
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8400, show_default=True, help="0: any free one.")
@click.option(
    "--token",
    envvar="AGENTLAB_TOKEN",
    show_envvar=True,
    help="What clients send as bearer token. Default: kept in AGENTLAB_HOME/serve-token, made when first needed. "
    "Other users of this machine can see a command line; the variable is better.",
)
@click.option("--no-token", is_flag=True, help="Let everybody on this machine ask; on a loopback host alone.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let web pages of this origin ask; may be repeated.")
@click.option("--adapter", default="champion", show_default=True, help="champion, base, or an id of the pool.")
@click.option("--queue", type=click.IntRange(min=1), default=512, show_default=True, help="Requests that may wait.")
@click.option("--deadline", type=SECONDS, help="Seconds for requests that name none.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="New tokens for requests that name no number.",
)
@click.option("--max-request-kib", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest request.")
@click.option("--thinking", is_flag=True, help="Let it reason in words first.")
@click.option("--python-tool", "--python", "python", is_flag=True, help="Let it run Python in a sandbox.")
@click.option("--no-memory", is_flag=True, help="Neither recall nor remember.")
@click.option(
    "--share", is_flag=True, help="On a CPU: leave the accelerator to an evolution beside it; both get slower."
)
@click.option("--grafana", is_flag=True, help="Print a Grafana dashboard for /metrics and end.")
@click.pass_context
def serve(
    context: click.Context, experiment: Path | None, overrides: tuple[str, ...], host: str, port: int,
    token: str | None, no_token: bool, cors: tuple[str, ...], adapter: str, queue: int, deadline: float | None,
    max_tokens: int, max_request_kib: int, thinking: bool, python: bool, no_memory: bool, share: bool, grafana: bool,
) -> None:  # fmt: skip
    """Serve the champion of EXPERIMENT, its tools and the memory, to clients of OpenAI's chat completions.

    Default: the newest champion in this project. Ctrl-C or SIGTERM ends it after the running answer.
    A champion promoted meanwhile takes over between two answers.
    """
    if grafana:
        from agentlab.serve.grafana import dashboard

        click.echo(json.dumps(dashboard(), indent=2))
        return
    if token and no_token:
        raise click.UsageError("--no-token and --token (or AGENTLAB_TOKEN) exclude each other")
    import logging

    from agentlab.agent import Options
    from agentlab.config import home
    from agentlab.serve.access import access, token_file
    from agentlab.serve.server import Settings, token_words
    from agentlab.serve.server import serve as run_server

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given = context.get_parameter_source("token")
    shown = "$AGENTLAB_TOKEN" if given is click.core.ParameterSource.ENVIRONMENT else "<token>"
    if no_token:
        token, shown = None, ""
        access(host, None, cors)
    elif token is None:
        path = home() / "serve-token"
        token, new = token_file(path)
        shown = token if new else token_words(path)
    rules = access(host, token, cors)
    lab = _chosen(experiment, overrides)
    settings = Settings(
        host=host, port=port, queue=queue, body_limit=max_request_kib * 1024, deadline_s=deadline, share=share
    )
    run_server(
        lab, rules, settings, adapter=adapter, remember=not no_memory, python=python,
        options=Options(thinking=thinking, max_new_tokens=max_tokens), token_shown=shown,
        say=lambda text: click.echo(text, err=True),
    )  # fmt: skip
