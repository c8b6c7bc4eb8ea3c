"""The errors a person can meet, one class per thing they can do about it.

Every message is one sentence (or a few lines of the same kind) that says what is wrong, where, and what is allowed.
The command line prints the message alone and exits with the class's `exit_code`; a traceback means a bug.
"""


class AgentlabError(Exception):
    """Something a person can put right; the message says how."""

    exit_code = 1


class ConfigError(AgentlabError):
    """An experiment's YAML, a `--set` or a notebook parameter is not usable as written."""

    exit_code = 2


class SuiteError(AgentlabError):
    """A suite's folder is incomplete, contradictory or leaks between its splits."""

    exit_code = 2


class ModelError(AgentlabError):
    """A model name does not resolve to weights on this machine."""

    exit_code = 3


class AdapterError(AgentlabError):
    """An adapter is missing, damaged, foreign to the base model or cannot be merged correctly."""

    exit_code = 4


class RunError(AgentlabError):
    """The run's folder does not hold what the request needs (another generation first, a changed suite, …)."""

    exit_code = 5


class LeaseHeldError(AgentlabError):
    """Another living process holds what this one needs; the message names it."""

    exit_code = 6


class StorageError(AgentlabError):
    """The disk is full or a folder may not be written."""

    exit_code = 7


class EvolutionStopped(AgentlabError):
    """Somebody asked the run to stop; what was finished is kept and can be continued."""

    exit_code = 8


class MemoryStoreError(AgentlabError):
    """The memory's file is damaged, of another embedding model, too new, or the request does not fit what it holds."""

    exit_code = 9


class ToolError(AgentlabError):
    """A function cannot become a tool, or a tool's call asks for what it cannot do."""

    exit_code = 10


class AgentError(AgentlabError):
    """An agent's option, tool or task is not usable as given."""

    exit_code = 11


class DoesNotFitError(AgentlabError):
    """A model needs more memory than the budget or the machine has; the message says how much and what would fit."""

    exit_code = 12


class ServeError(AgentlabError):
    """The server cannot be started as asked: an address in use, a host that would be open to everybody."""

    exit_code = 13


def of_exit_code(code: int) -> type[AgentlabError]:
    """The class with this exit code, to raise here what another process reported; RunError where two could be meant."""
    found = [kind for kind in AgentlabError.__subclasses__() if kind.exit_code == code]
    return found[0] if len(found) == 1 else ConfigError if code == ConfigError.exit_code else RunError


def first_line(error: BaseException) -> str:
    """What an error of a library says first, for a sentence of ours; its kind where it says nothing.

    A first line that only announces what follows comes with the next one.
    """
    said = "no memory is left" if isinstance(error, MemoryError) else type(error).__name__
    lines = [line.strip() for line in (str(error).strip() or said).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
