"""What stands before the routes: foreign hosts, foreign web pages and requests without the token go no further.

What breaks in the routes comes no further out.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from agentlab.serve.access import Access
from agentlab.serve.metrics import Metrics
from agentlab.serve.problems import Problem, failed

_LOG = logging.getLogger("agentlab.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = "/health"  # needs no token, tells nothing
_PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")
_SEND_S = 60.0  # how long a client may leave its answer unread


class Outside:
    """Checks the Host and Origin of a request, counts responses, and gives up clients that no longer read."""

    def __init__(self, app: App, access: Access, metrics: Metrics) -> None:
        self.app = app
        self.access = access
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses.labels(path, str(message["status"])).inc()
            async with asyncio.timeout(_SEND_S):
                await send(message)

        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        problem = None
        if len(hosts) != 1 or not self.access.allows_host(hosts[0]):
            problem = Problem(403, "this server is not known under that host name", code="host_not_allowed")
        elif not all(map(self.access.allows_origin, origins)):
            problem = Problem(403, "web pages of this origin may not ask; see --cors", code="origin_not_allowed")
        await (_refused(problem) if problem else self.app)(scope, receive, counted)


class Inside:
    """Checks the token. Behind CORS, so that a page that may ask can read why it was refused."""

    def __init__(self, app: App, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _OPEN:
            given = _values(scope, b"authorization")
            if not (self.access.token is None or (len(given) == 1 and self.access.allows_token(given[0]))):
                problem = Problem(
                    401, "the bearer token is missing or wrong", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await _refused(problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Innermost:
    """Answers where a route broke in a way that nobody foresaw: the log gets the error, the client that there was one.

    Before the routes and not outside of everything, where the framework would do it: so the response is counted, and a
    page that may ask can read it.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noticed(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noticed)
        except Exception:
            if scope["type"] != "http" or begun:  # the connection ends in the middle of its response
                raise
            _LOG.exception("%s %r broke", scope["method"], scope["path"])
            problem = failed("the server failed; its log says why")
            self.metrics.failures.labels(problem.reason).inc()
            await _refused(problem)(scope, receive, send)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _refused(problem: Problem) -> App:
    # the body is not read: the connection ends with the response
    return JSONResponse(problem.body(), problem.status, headers={**problem.headers, "Connection": "close"})
