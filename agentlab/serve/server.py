"""Starting and ending: the address, uvicorn, signals, the lease, and what is said at the start."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import shlex
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentlab import config
from agentlab.errors import ServeError
from agentlab.hardware import monitor
from agentlab.hardware.lease import Lease
from agentlab.serve.access import Access, is_loopback
from agentlab.serve.app import create_app
from agentlab.serve.asking import MODEL
from agentlab.serve.service import Service

if TYPE_CHECKING:
    from agentlab.agent import Options
    from agentlab.lab import Lab

_IDLE_S = 10.0  # a connection on which no request has begun is closed after one to two of these
_SPARE = 256  # connections beside those that wait in the queue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve. port 0 takes a free one. grace_s: how long an answer may go on after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8400
    queue: int = 512
    body_limit: int = 2**20  # bytes
    deadline_s: float | None = None
    grace_s: float = 10.0
    share: bool = False


def serve(
    lab: "Lab", access: Access, settings: Settings, *, adapter: str = "champion", remember: bool = True,
    python: bool = False, options: "Options | None" = None, token_shown: str = "",
    say: Callable[[str], None] = print, on_ready: "Callable[[Server], None]" = lambda server: None,
) -> None:  # fmt: skip
    """Serve the agent of a run until SIGTERM or Ctrl-C; then the running answer may end, and everything is freed.

    token_shown: what stands for the token in the example of the start message. on_ready gets the server once it
    answers. Raises ServeError for an address that cannot be had, LeaseHeldError naming who has the accelerator.
    """
    if settings.share and monitor.accelerator() == "cuda":
        raise ServeError("--share: two models do not fit the memory that one may have; allowed on a CPU alone")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(settings.host, settings.port))
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not settings.share:
            stack.enter_context(
                Lease(config.home() / "accelerator.lock", f"serving {lab.run.id} on {address}").acquire(wait_s=1.0)
            )
        stack.callback(lab.close)
        say(f"loading {lab.run.settings.model.primary} ...")
        agent = stack.enter_context(
            lab.agent(adapter, remember=remember, python=python, lease=False, options=options)
        )  # fmt: skip
        service = Service(lab, agent, adapter, settings.queue, settings.deadline_s)
        stack.callback(service.close)
        stack.enter_context(service.watching)
        app = create_app(service, access, settings.body_limit)
        info = agent.describe(agent.chain.link)
        say(f"serving {info} on http://{address}/v1")
        if not is_loopback(settings.host):
            say("this is plain HTTP, open to the network: put a proxy with TLS before it")
        say(_example(address, token_shown))
        with _quiet_signals():
            Server(app, service, settings, on_ready).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn, which on its way out first lets the running answer end and sends away what waits."""

    def __init__(
        self, app: Any, service: Service, settings: Settings, on_ready: "Callable[[Server], None]" = lambda server: None
    ) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        super().__init__(
            uvicorn.Config(
                app, http=_Protocol, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
                server_header=False, limit_concurrency=settings.queue + _SPARE,
                timeout_graceful_shutdown=int(settings.grace_s) + 5,
            )
        )  # fmt: skip
        self.service = service
        self.grace_s = settings.grace_s
        self.on_ready = on_ready
        self.port = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.port = sockets[0].getsockname()[1] if sockets else 0
        self.on_ready(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.line.drain()
        timer = asyncio.get_running_loop().call_later(self.grace_s, self.service.line.cancel_running)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


class _Protocol(H11Protocol):
    """Closes connections on which nothing is asked; uvicorn itself waits for a first request for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last_cycle: Any = None
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(_IDLE_S, self._look)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._last_cycle:
            self.transport.close()
            return
        self._last_cycle = self.cycle if idle else object()
        self._look_later()


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in it until the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is in use; choose another one with --port",
            errno.EACCES: "the port may not be used by this user; choose one above 1023",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }.get(error.errno or 0, str(error.strerror or error))
        raise ServeError(f"cannot serve on {host}:{port}: {reason}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a client whose machine is gone is noticed
    return listener


@contextlib.contextmanager
def _quiet_signals() -> Any:
    """uvicorn raises a signal that ended it once more, which would kill the process before anything is freed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _example(address: str, token: str) -> str:
    header = f' -H "Authorization: Bearer {token}"' if token else ""
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "What is 17 % of 2340?"}}]}}'
    return f"curl http://{address}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'"


def token_words(path: Path) -> str:
    """How a shell reads the token from its file."""
    return f"$(cat {shlex.quote(str(path))})"
