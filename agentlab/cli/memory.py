"""`agentlab memory …`: add, search, show, forget, move, check and re-embed what is remembered."""

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentlab.errors import MemoryStoreError, StorageError

if TYPE_CHECKING:
    from agentlab.memory import Memory

where = click.option(
    "--file", "file", type=click.Path(path_type=Path), help="The memory's file. Default: your own, under AGENTLAB_HOME."
)
TYPES = ("conversation", "knowledge", "pattern", "preference")


@contextmanager
def _open(file: Path | None, *, create: bool = False, model: str | None = None) -> "Iterator[Memory]":
    from agentlab.memory import Memory

    memory = Memory.open(file, create=create, embedding_model=model)
    try:
        yield memory
        for problem in memory.damage():
            click.echo(f"agentlab: {memory.path} is damaged: {problem}; see: agentlab memory doctor", err=True)
        if memory.only_read():
            click.echo(f"agentlab: {memory.path} can only be read: nothing can be written there", err=True)
    finally:
        memory.close()


def _one_of(path: Path | None, file: Path | None) -> Path | None:
    if path is not None and file is not None:
        raise MemoryStoreError("the memory's file was given twice; give PATH or --file")
    return path or file


@click.group()
def memory() -> None:
    """Add to the memory, search it, forget, export, import, check it."""


@memory.command()
@click.argument("text")
@where
@click.option("--type", "kind", type=click.Choice(TYPES), default="knowledge", show_default=True)
@click.option("--session", help="The session that it belongs to.")
@click.option("--tag", "tags", multiple=True, help="May be given several times.")
@click.option("--importance", type=click.FloatRange(0, 1), help="Default: judged by novelty.")
@click.option("--model", help="Embedding model of a new memory. Default: all-MiniLM-L6-v2, which comes along.")
def add(
    text: str, file: Path | None, kind: str, session: str | None, tags: tuple[str, ...], importance: float | None,
    model: str | None,
) -> None:  # fmt: skip
    """Remember TEXT; prints its id. The same words again count as a confirmation of the old id."""
    if model is not None and file is not None and not file.exists():
        from agentlab.memory.embedding import SentenceEmbedder

        SentenceEmbedder(model)  # one that is not to be had leaves no file behind
    with _open(file, create=True, model=model) as memory:
        click.echo(memory.remember(text, memory_type=kind, session_id=session, tags=list(tags), importance=importance))


@memory.command()
@click.argument("query")
@where
@click.option("-k", "count", type=click.IntRange(min=1), default=5, show_default=True, help="How many at most.")
@click.option("--type", "kind", type=click.Choice(TYPES))
@click.option("--session", help="Only of this session.")
@click.option("--tag", "tags", multiple=True, help="Only with this tag; several: with all of them.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="Only what was told on this day or later.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Only what was told on this day or before.")
@click.option("--words", is_flag=True, help="By its words alone: quick, without the embedding model.")
@click.option("--explain", is_flag=True, help="What made each score.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def search(
    query: str, file: Path | None, count: int, kind: str | None, session: str | None, tags: tuple[str, ...],
    since: datetime.datetime | None, until: datetime.datetime | None, words: bool, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Recall what answers QUERY best."""
    told_after = _seconds(since) if since else None
    told_before = _seconds(until, 1) if until else None
    with _open(file) as memory:
        hits = memory.recall(
            query, count, memory_type=kind, session_id=session, tags=list(tags), words_only=words, explain=explain,
            since=told_after, until=told_before,
        )  # fmt: skip
    for hit in hits:
        if as_json:
            click.echo(json.dumps(hit.__dict__, ensure_ascii=False))
            continue
        told = datetime.datetime.fromtimestamp(hit.created_at).strftime("%Y-%m-%d")
        click.echo(f"{hit.score:.3f}  {hit.memory_id}  {told}  {_one_line(hit.content)}")
        if explain:
            click.echo("       " + "  ".join(f"{name} {value:.3f}" for name, value in hit.parts.items()))
    if not hits and not as_json:
        click.echo("nothing found")


def _one_line(text: str) -> str:
    """`text` without line ends and without what steers a terminal."""
    from agentlab.agent.tools.rendering import visible

    return visible(" ".join(text.split()))


def _seconds(day: datetime.datetime, days: int = 0) -> float:
    """When the local day begins, or one so many days later, which may be an hour off 24 apart."""
    try:
        return (day + datetime.timedelta(days=days)).timestamp()
    except (ValueError, OverflowError):
        raise MemoryStoreError(
            f"{day.date()} is no day that this machine can count; allowed: the years 2 to 9998"
        ) from None


@memory.command()
@click.argument("memory_id")
@where
def show(memory_id: str, file: Path | None) -> None:
    """A memory with its related ones, as JSON without the vectors."""
    with _open(file) as memory:
        item = memory.get(memory_id)
    values = {key: value for key, value in item.__dict__.items() if key != "embedding"}
    click.echo(json.dumps(values, ensure_ascii=False, indent=1))


@memory.command()
@click.argument("memory_ids", nargs=-1)
@where
@click.option(
    "--session", help="Forget a whole session with its turns and summary; what another one told, too, stays there."
)
@click.option("--reason", default="", help="Kept with the tombstone, without words of what is forgotten.")
def forget(memory_ids: tuple[str, ...], file: Path | None, session: str | None, reason: str) -> None:
    """Forget memories, and what was derived from them, in every byte of the file.

    The typed lines of chats are dropped with them. Exports, traces in MLflow, data sets and adapters are not reached.
    """
    from agentlab.cli.lines import drop, history_path, say_what_stays

    if not memory_ids and session is None:
        raise MemoryStoreError("nothing to forget was named; give ids or --session")
    with _open(file) as memory:
        named = {known.session_id for known in memory.sessions()}
        if session is not None and session not in named and next(memory.items(session_id=session), None) is None:
            raise MemoryStoreError(f"no session {session!r:.80} in {memory.path}; nothing was forgotten")
        try:
            gone = memory.forget(*memory_ids, session_id=session, reason=reason)
        except StorageError:  # it may be forgotten already, and the file not rewritten
            drop(history_path())
            raise
        traces, kept = memory.traces(), memory.kept_files()
    click.echo(f"forgotten: {' '.join(gone) or 'no memory that was told nowhere else'}")
    drop(history_path())
    say_what_stays()
    for trace in traces:
        click.echo(f"agentlab: not everywhere: {trace}", err=True)
    if kept:
        click.echo("agentlab: delete kept files with: agentlab memory doctor --drop-kept", err=True)


@memory.command()
@click.argument("out", type=click.Path(path_type=Path))
@where
def export(out: Path, file: Path | None) -> None:
    """Write everything to OUT as JSON lines, vectors included."""
    with _open(file) as memory:
        click.echo(f"{memory.export(out)} memories written to {out}")


@memory.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@where
def import_(source: Path, file: Path | None) -> None:
    """Take in an export, all of it or nothing. What was forgotten here stays forgotten.

    A new memory gets the export's embedding model and its vectors; a memory of another model makes the vectors anew.
    """
    from agentlab.memory.transfer import model_of

    theirs = model_of(source)
    with _open(file, create=True) as memory:
        count = memory.import_(source)
        made = "" if theirs in (None, memory.embedding_model) else f", made anew: the export has those of {theirs}"
        click.echo(f"{count} new memories, with vectors of {memory.embedding_model}{made}")


@memory.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@where
@click.option("--repair", is_flag=True, help="Make it anew of what is intact; the damaged file is kept beside it.")
@click.option("--model", help="With --repair: whose vectors they are, where the file no longer says.")
@click.option("--drop-kept", is_flag=True, help="Delete the damaged files that repairs kept.")
def doctor(path: Path | None, file: Path | None, repair: bool, model: str | None, drop_kept: bool) -> None:
    """Read and check every row; exit code 9 when something is wrong or lost. PATH is the same as --file."""
    from agentlab.config import home
    from agentlab.memory import Memory

    path = _one_of(path, file) or home() / "memory.db"
    if repair and drop_kept:
        raise MemoryStoreError("--drop-kept deletes what --repair keeps; look at what was repaired first")
    if repair:
        report = Memory.repair(path, embedding_model=model)
    else:
        with Memory.open(path, create=False) as memory:
            report = memory.doctor()
            gone = memory.drop_kept() if drop_kept and report.clean else []
        for kept in gone:
            click.echo(f"deleted: {kept}")
    for line in report.repaired:
        click.echo(f"repaired: {line}")
    if report.problems:
        left = f"; {path} now holds the rest: {report.memories} memories" if repair and report.repaired else ""
        raise MemoryStoreError("; ".join(report.problems) + left)
    click.echo(f"{path} is whole: {report.memories} memories, {report.chunks} vectors")


@memory.command()
@where
def consolidate(file: Path | None) -> None:
    """Make knowledge of what you told more than once; prints what is new or surer."""
    with _open(file) as memory:
        made = memory.consolidate()
    for item in made:
        click.echo(f"{item.knowledge_id}  {item.confidence:.2f}  {_one_line(item.content)}")
    click.echo(f"{len(made)} facts that were told more than once")


@memory.command()
@where
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def stats(file: Path | None, as_json: bool) -> None:
    """How much is remembered, of what kind, in how many MB."""
    with _open(file) as memory:
        values = memory.stats()
    if as_json:
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    for name, value in values.items():
        shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name.replace('_', ' '):16} {shown}")


@memory.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@where
@click.option("--model", required=True, help="A sentence-transformers name or folder that is on this machine.")
def reembed(path: Path | None, file: Path | None, model: str) -> None:
    """Change all vectors to another embedding model's. PATH is the same as --file."""
    with _open(_one_of(path, file)) as memory:
        click.echo(f"{memory.reembed(model)} memories now have vectors of {memory.embedding_model}")
