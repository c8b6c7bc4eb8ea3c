"""The routes: chat completions, whole and streamed, models, health and metrics."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from agentlab.agent.steps import Answered, Delta, ReasoningResult, Step
from agentlab.errors import AgentlabError
from agentlab.serve import replies
from agentlab.serve.access import Access
from agentlab.serve.asking import parse
from agentlab.serve.guard import Innermost, Inside, Outside
from agentlab.serve.line import Job
from agentlab.serve.metrics import CONTENT_TYPE
from agentlab.serve.problems import Problem, failed, shutting_down
from agentlab.serve.service import Begun, Service

KEEP_ALIVE_S = 5.0  # between two comments in a stream that waits
_BODY_S = 20.0  # how long a client may take to send its request


def create_app(service: Service, access: Access, body_limit: int) -> FastAPI:
    """The application; `body_limit` is in bytes."""
    # its own documentation pages would load scripts from elsewhere
    app = FastAPI(title="agentlab", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Innermost, metrics=service.metrics)
    app.add_middleware(Inside, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"],
            allow_headers=["*"],  # a page that may ask may ask with the client of its choice
        )  # fmt: skip
    app.add_middleware(Outside, access=access, metrics=service.metrics)

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        if error.reason:
            service.metrics.failures.labels(error.reason).inc()
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(AgentlabError)
    async def known(request: Request, error: AgentlabError) -> JSONResponse:
        return await problem(request, failed(str(error)))

    @app.exception_handler(HTTPException)
    async def elsewhere(_: Request, error: HTTPException) -> JSONResponse:
        message = "there is no such path; allowed: /v1/chat/completions, /v1/models, /health, /metrics"
        text = message if error.status_code == 404 else str(error.detail)
        return JSONResponse(Problem(error.status_code, text).body(), error.status_code, headers=error.headers)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        ill = service.ill()
        return JSONResponse({"status": ill or "ok"}, 503 if ill else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.exposition(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": service.roster.models()}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        return service.roster.entry(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        ask = service.completed(parse(await _body(request, body_limit)))
        await run_in_threadpool(service.roster.check, ask.model)
        job = Job(ask)
        service.line.submit(job)
        service.metrics.in_flight.inc()
        return await Reply(service, job).response(request)

    return app


async def _body(request: Request, limit: int) -> bytes:
    """The request's body. Raises Problem for another type, for one that is too long, and for one that does not end."""
    # also what makes a browser ask before it sends another page's request
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _last(415, "the content type is not application/json", "content_type")
    too_long = _last(413, f"the request is longer than {limit} bytes", "request_too_large")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise _last(408, f"the request did not end within {_BODY_S:.0f} s", "request_timeout") from None
    except ClientDisconnect:
        raise _last(400, "the request broke off", "broken_off") from None
    return bytes(body)


def _last(status: int, message: str, code: str) -> Problem:
    """A refusal before the body is read: what comes after it on the connection is not looked at."""
    return Problem(status, message, code=code, headers={"Connection": "close"})


class Reply:
    """What one client gets for its job, and what is counted of it. A client that goes away takes its job along."""

    def __init__(self, service: Service, job: Job) -> None:
        self.service = service
        self.job = job
        self.heading = replies.Heading(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), job.ask.model)
        self.begun: Begun | None = None
        self.spoke = False
        self.ended = False  # with an answer or with the reason why there is none
        self._closed = False

    async def response(self, request: Request) -> Response:
        """A stream, or the whole answer. What fails before the first piece is refused with its own status."""
        gone = asyncio.create_task(_gone(request))
        whole = not self.job.ask.stream
        try:
            first = await self._first(gone, None if whole else KEEP_ALIVE_S)
            while whole and not isinstance(first, ReasoningResult):
                first = await self._first(gone, None)
            if isinstance(first, ReasoningResult):
                self._check(first)
            if whole and isinstance(first, ReasoningResult):
                self._count(first)
                return JSONResponse(self.heading.completion(first, self.service.roster.run.id))
        except BaseException:
            self.close()
            raise
        finally:
            gone.cancel()
            if whole:
                self.close()
        return _Stream(self, first)

    async def _first(self, gone: "asyncio.Task[None]", wait_s: float | None) -> "Step | ReasoningResult | None":
        """The next piece or the result; None after `wait_s`. Raises Problem, also when the client has gone."""
        news = asyncio.ensure_future(self.next())
        try:
            await asyncio.wait({news, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if news.done():
                return news.result()
            if gone.done():
                raise Problem(499, "the client went away", code="client_gone", reason="client_gone")
            return None
        finally:
            news.cancel()

    async def next(self) -> "Step | ReasoningResult":
        """The next piece of the answer, or its result; a deadline that passes in the queue ends the waiting."""
        while True:
            left_s = None if self.begun or self.job.left_s == float("inf") else max(0.0, self.job.left_s)
            try:
                async with asyncio.timeout(left_s):
                    item = await self.job.news.get()
            except TimeoutError:
                self.service.line.withdraw(self.job)
                return self.service.late(self.job)
            if isinstance(item, Problem):
                raise item
            if isinstance(item, Begun):
                self.begun = item
                self.service.metrics.waiting.observe(self.job.waited_s)
            elif isinstance(item, Answered):
                return item.result
            else:
                if isinstance(item, Delta) and not self.spoke:
                    self.spoke = True
                    self.service.metrics.first_token.observe(self.job.waited_s)
                assert isinstance(item, Step)
                return item

    async def pieces(self, first: "Step | ReasoningResult | None") -> AsyncIterator[str]:
        """The events of the stream."""
        include = {"usage": None} if self.job.ask.include_usage else {}
        content = replies.Content()
        item = first
        opened = False
        try:
            while True:
                if item is None:
                    item = await self._or_none()
                    if item is None:
                        yield replies.KEEP_ALIVE
                        continue
                if not opened:
                    opened = True
                    yield self._chunk({"role": "assistant", "content": ""}, **include)
                if isinstance(item, ReasoningResult):
                    break
                if not isinstance(item, Delta):
                    content.turn_over()
                elif text := content.feed(item.text):
                    yield self._chunk({"content": text}, **include)
                item = None
            self._check(item)
            if rest := content.finish(item.final_answer):
                yield self._chunk({"content": rest}, **include)
            told = replies.extra(item, self.service.roster.run.id, content.text)
            yield self._chunk({}, replies.finish_reason(item), result=item, **include, agentlab=told)
            if self.job.ask.include_usage:
                yield replies.event(self.heading.usage_chunk(self._who(item), item))
            yield replies.DONE
            self._count(item)
        except Problem as problem:  # the status has been sent: the client is told in the stream
            self.ended = True
            self.service.metrics.failures.labels(problem.reason or "refused").inc()
            yield replies.event(problem.body())

    async def _or_none(self) -> "Step | ReasoningResult | None":
        news = asyncio.ensure_future(self.next())
        try:
            await asyncio.wait({news}, timeout=KEEP_ALIVE_S)
            return news.result() if news.done() else None
        finally:
            news.cancel()

    def _who(self, result: ReasoningResult | None) -> str:
        if result is not None:
            return replies.fingerprint(result.model_info)
        return self.begun.fingerprint if self.begun else ""

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, result: ReasoningResult | None = None, **fields: Any
    ) -> str:
        return replies.event(self.heading.chunk(self._who(result), delta, finish, **fields))

    def _check(self, result: ReasoningResult) -> None:
        """Raise Problem for a result that is no answer."""
        if result.state == "cancelled":
            raise shutting_down()
        if result.refused == "task":
            raise Problem(400, result.error, param="messages", code="context_length_exceeded")
        if result.refused == "limit":
            said = result.error.replace("max_new_tokens", "max_tokens")  # as it is called here
            raise Problem(400, said, param="max_tokens", code="invalid_value")
        if result.state == "failed" and not self.service.agent.chain.usable:
            raise Problem(503, result.error, code="no_model", reason="no_model")
        if result.state == "failed":
            raise Problem(500, result.error, code="answer_failed", reason="failed")

    def _count(self, result: ReasoningResult) -> None:
        self.ended = True
        self.service.metrics.ended(result)
        self.service.metrics.latency.observe(self.job.waited_s)

    def close(self) -> None:
        """The client has what it gets, or has gone; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self.service.line.withdraw(self.job)
        self.service.metrics.in_flight.dec()


class _Stream(StreamingResponse):
    """A stream whose job ends with it, also when it never began."""

    def __init__(self, reply: Reply, first: "Step | ReasoningResult | None") -> None:
        super().__init__(
            reply.pieces(first), media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )  # fmt: skip
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.reply.ended:
                self.reply.service.metrics.failures.labels("client_gone").inc()
            self.reply.close()


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
