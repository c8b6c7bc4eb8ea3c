"""Who may ask: the bearer token, the host names under which a loopback server answers, the origins of web pages."""

import contextlib
import dataclasses
import hmac
import ipaddress
import os
import re
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

from agentlab.errors import ServeError
from agentlab.files import disk_errors

_LEAST = 16  # characters of a token


@dataclasses.dataclass(frozen=True)
class Access:
    """What a request has to bring.

    token: None where none is needed. hosts: the names that may stand in its Host header, None for any. origins: the web
    pages that may ask ("*": all); a browser says which page it is, programs say nothing.
    """

    token: str | None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()

    def allows_token(self, authorization: str) -> bool:
        """Whether an Authorization header carries the token; takes the same time wherever they differ."""
        if self.token is None:
            return True
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(given.strip().encode(), self.token.encode()) and scheme.lower() == "bearer"

    def allows_host(self, host: str) -> bool:
        """Whether a Host header names this server: a page whose own name was rebound to loopback sends its own name."""
        return self.hosts is None or _host_name(host) in self.hosts

    def allows_origin(self, origin: str) -> bool:
        """Whether a web page of this origin may ask."""
        return "*" in self.origins or origin in self.origins


def access(host: str, token: str | None, origins: tuple[str, ...] = ()) -> Access:
    """The rules for a server on `host`. Raises ServeError for what would be open to everybody."""
    if token is None and not is_loopback(host):
        raise ServeError(f"host {host} without a token would be open to everybody; allowed: 127.0.0.1, ::1, localhost")
    if token is None and "*" in origins:
        raise ServeError("--cors * without a token would let every web page ask; name the page's origin")
    if token is not None and not re.fullmatch(rf"[!-~]{{{_LEAST},}}", token):
        raise ServeError(f"the token is too short or has blanks; allowed: {_LEAST} or more visible ASCII characters")
    for origin in origins:
        parts = urlsplit(origin)
        whole = f"{parts.scheme}://{parts.netloc}"
        if origin != "*" and (origin != whole or not parts.netloc or origin != origin.lower()):
            raise ServeError(f"--cors {origin}: no origin; allowed: like http://localhost:3000, without a path, or *")
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None
    return Access(token, hosts, origins)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def token_file(path: Path) -> tuple[str, bool]:
    """(the token kept in `path`, whether it was made just now). Made with mode 0600 where there is none.

    Raises ServeError for a file that others may read, or that holds no token.
    """
    new = f"al-{secrets.token_urlsafe(32)}"
    if _made(path, new):
        return new, True
    with disk_errors(path, resumes=False):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            mode = os.fstat(handle).st_mode
            text = os.read(handle, 4096).decode("ascii", "replace").strip()
        finally:
            os.close(handle)
    if stat.S_IMODE(mode) & 0o077:
        raise ServeError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}")
    if not re.fullmatch(rf"[!-~]{{{_LEAST},}}", text):
        raise ServeError(f"{path} holds no token; delete it, and another one is made")
    return text, False


def _made(path: Path, text: str) -> bool:
    """Write a file that nobody else may read, whole or not at all; False when there is one already."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with disk_errors(path, resumes=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            return False
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)  # fails where another process was first
            except FileExistsError:
                return False
        finally:
            os.unlink(draft)
    return True


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]
