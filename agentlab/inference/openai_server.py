"""One OpenAI-compatible server: requests with a time limit and retries, and what it turns out to be."""

import contextlib
import dataclasses
import email.utils
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from agentlab.errors import ConfigError, ModelError
from agentlab.inference.contract import EngineError
from agentlab.inference.openai_reading import Chunks, Leash

Kind = Literal["vllm", "ollama", "llama.cpp", "other"]
T = TypeVar("T")

_CONNECT_S = 10.0
_READ_S = 300.0  # between two pieces; the first may wait for the server to load the model
_KNOWN_S = 30.0  # for what a server knows without asking a model
_TRIES = 4
_PAUSE_S = 0.5
_MOST_PAUSE_S = 60.0  # where the server says how long to wait
_MOST_UNASKED_S = 5.0  # where nobody can end the waiting
_RETRIED = (429, 503)
_MISREAD = (TypeError, KeyError, IndexError, ValueError, AttributeError)  # raised by what is not in the known form
_PASSING = (*_RETRIED, 408, 502, 504)  # statuses that say nothing about the request: a proxy's, too


class ServerError(EngineError):
    """The server cannot be reached, or answers with an error; the message says which."""


class Unavailable(ServerError):
    """The server cannot be reached or has no time just now: what it can do, and what it would answer, stays open.

    status: what it, or a proxy before it, answered; None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(Unavailable):
    """Nobody answers there, or the connection broke."""


class UnknownForm(ServerError):
    """The server answers with something that is not in the protocol's form."""


class RefusedByServer(EngineError):
    """The server does not take what was asked: `status`, 400 to 499."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Known:
    """What a server says about a model: its kind, the context in tokens if it says so, and the model's own folder."""

    kind: Kind
    context_length: int | None = None
    folder: Path | None = None


class Server:
    """Requests to one server. Retried are only connections that failed, 429 and 503, and nothing once it has begun."""

    def __init__(self, base_url: str, api_key_env: str | None = None) -> None:
        import openai

        key = "none"  # the client insists on one
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "")
            if not key:
                raise ConfigError(
                    f"model.api_key_env: the environment has no {api_key_env}; set it to the server's key"
                )
        self.base_url = base_url.rstrip("/")
        self.root = self.base_url.removesuffix("/v1")
        timeout = openai.Timeout(_READ_S, connect=_CONNECT_S)
        self._client = openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=timeout)
        self._knowing = self._client.with_options(timeout=openai.Timeout(_KNOWN_S, connect=_CONNECT_S))
        # connections of their own, so that each can be closed from outside
        http = openai.DefaultHttpxClient(event_hooks={"request": [self._begun]})
        self._streaming = self._client.copy(http_client=http, default_headers={"Connection": "close"})
        self._current = threading.local()  # the leash of the request that a thread is about to send
        self._own = Leash()  # of all that is not streamed
        self._out: weakref.WeakSet[Leash] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        self._takes_stream_options: bool | None = None  # None: nothing was streamed yet

    def get(self, path: str) -> Any:
        """The JSON at `path`, counted from the server's root."""
        return self._tried(lambda: self._knowing.get(self.root + path, cast_to=object))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers; where it answers plain text, that."""
        return self._posted(self._client, path, body)

    def _posted(self, client: Any, path: str, body: dict[str, Any]) -> Any:
        text = self._tried(lambda: client.post(self.root + path, cast_to=str, body=body))
        try:
            return json.loads(text)
        except ValueError:
            return text

    def chunks(self, path: str, body: dict[str, Any], leash: Leash | None = None) -> Chunks:
        """A streamed answer, begun: server-sent events of `path` (`/chat/completions` or `/completions`).

        A server that does not know `stream_options` is asked without, from then on.
        """
        without = {key: value for key, value in body.items() if key != "stream_options"}
        if self._takes_stream_options is False or len(without) == len(body):
            return self._chunks(path, without, leash)
        try:
            begun = self._chunks(path, body, leash)
            self._takes_stream_options = True
        except RefusedByServer as refused:
            if self._takes_stream_options or refused.status not in (400, 422):
                raise
            try:
                begun = self._chunks(path, without, leash)
            except EngineError:
                raise refused from None  # they were not what it refused
            self._takes_stream_options = False
        return begun

    def _chunks(self, path: str, body: dict[str, Any], leash: Leash | None) -> Chunks:
        create = self._streaming.chat.completions.create if "chat" in path else self._streaming.completions.create
        known = {"model": body["model"], "stream": True}
        known |= {key: body[key] for key in ("messages", "prompt") if key in body}
        extra = {key: value for key, value in body.items() if key not in known}
        with self._held(leash):
            return Chunks(self._tried(lambda: create(**known, extra_body=extra), leash), self.error)

    @contextlib.contextmanager
    def _held(self, leash: Leash | None) -> Iterator[None]:
        """Requests that this thread begins meanwhile are ended by `leash`, or when the server is closed."""
        leash = leash or Leash()
        with self._lock:
            self._out.add(leash)
        self._current.leash = leash
        try:
            yield
        finally:
            self._current.leash = None

    def _begun(self, request: Any) -> None:
        if (leash := getattr(self._current, "leash", None)) is not None:
            request.extensions = {**request.extensions, "trace": leash.follow}

    def _tried(self, call: Callable[[], T], leash: Leash | None = None) -> T:
        import openai

        most_s = _MOST_UNASKED_S if leash is None else _MOST_PAUSE_S
        for number in range(_TRIES):
            if self._closed:
                raise ServerError(f"the connection to the server at {self.base_url} is closed; open the engine again")
            try:
                return call()
            except openai.APITimeoutError:
                raise Unavailable(f"the server at {self.base_url} has not answered in time") from None
            except openai.OpenAIError as error:
                passes = isinstance(error, openai.APIConnectionError) or getattr(error, "status_code", 0) in _RETRIED
                pause_s = max(_PAUSE_S * 2**number, min(_retry_after_s(error), most_s))
                if not passes or number + 1 == _TRIES or (leash or self._own).pause(pause_s):
                    raise self.error(error) from None
        raise AssertionError("unreachable")

    def error(self, error: Exception) -> EngineError:
        """One sentence for what the client raised, or for what broke while an answer was taken apart."""
        if isinstance(error, _MISREAD):
            what = f"{type(error).__name__}: {_first_line(error)}"
            return UnknownForm(f"the server at {self.base_url} answers in an unknown form: {what}")
        status, said = getattr(error, "status_code", None), _said(error)
        if status is None and getattr(error, "body", None):  # told in the middle of a stream
            return ServerError(f"the server at {self.base_url} failed: {said}")
        if status is None:
            return Unreachable(f"the server at {self.base_url} cannot be reached or broke off: {_first_line(error)}")
        if status in _PASSING:
            return Unavailable(f"the server at {self.base_url} failed (status {status}): {said}", status)
        if 400 <= status < 500:
            return RefusedByServer(f"the server at {self.base_url} refuses (status {status}): {said}", status)
        return ServerError(f"the server at {self.base_url} failed (status {status}): {said}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Where an answer is taken apart: what breaks there because of its form is raised as UnknownForm."""
        try:
            yield
        except _MISREAD as error:
            raise self.error(error) from None

    def broke_off(self, empty: bool = False) -> EngineError:
        """What to raise where a streamed answer ended without a finish reason, as behind a proxy that closed it.

        empty: there was nothing in it that could be read.
        """
        if empty:
            return Unavailable(
                f"the server at {self.base_url} ended its answer before there was one; is that the API's address?"
            )
        return Unavailable(f"the server at {self.base_url} broke off its answer")

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists. Raises ServerError."""
        meant = self.base_url if "/v1" in self.base_url else f"{self.base_url}/v1"
        try:
            found = self._tried(lambda: self._knowing.get("/models", cast_to=object))
        except RefusedByServer as error:
            if error.status == 404 and meant != self.base_url:
                raise RefusedByServer(f"{error}; is {meant} meant?", error.status) from None
            raise
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list):
            asked = "the API's address" if meant == self.base_url else "meant"
            raise ServerError(f"{self.base_url}/models is no list of models; is {meant} {asked}?")
        return [row for row in rows if isinstance(row, dict)]

    def known(self, model: str) -> Known:
        """What the server is and knows of `model`. Raises ModelError, with the names it has, where it lacks it."""
        rows = self.models()
        row = next((row for row in rows if row.get("id") in (model, f"{model}:latest")), None)
        if row is None:
            names = ", ".join(str(row.get("id")) for row in rows) or "none"
            raise ModelError(f"the server at {self.base_url} has no model {model}; it has: {names}")
        length = row.get("max_model_len") if isinstance(row.get("max_model_len"), int) else None
        if length is not None and self._reads_chats_as_tokens(str(row["id"])):  # others tell their length, too
            folder = Path(str(row.get("root") or ""))
            here = folder.is_absolute() and folder.is_dir()
            return Known("vllm", length, folder if here else None)
        with self._asked_beside():
            # a gateway may answer whatever is asked, with a page or with an error in a JSON object
            found = self.get("/props")
            settings = found.get("default_generation_settings") if isinstance(found, dict) else None
            if isinstance(settings, dict):
                return Known("llama.cpp", settings.get("n_ctx"))
        with self._asked_beside():
            found = self.get("/api/version")
            if isinstance(found, dict) and "version" in found:
                return Known("ollama")
        return Known("other", length)

    @contextlib.contextmanager
    def _asked_beside(self) -> Iterator[None]:
        """Where only a server of some kind answers. Raises Unavailable for one that may be it and is still loading."""
        try:
            yield
        except Unavailable as error:
            if error.status in (None, 503):
                raise
        except EngineError:
            pass

    def _reads_chats_as_tokens(self, model: str) -> bool:
        """Whether /tokenize takes messages, as vLLM's does. Raises Unavailable."""
        try:
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
            found = self._posted(self._knowing, "/tokenize", body)
        except Unavailable:
            raise
        except EngineError:
            return False
        return isinstance(found, dict) and isinstance(found.get("count"), int)

    def close(self) -> None:
        """End what is being asked; harmless when repeated."""
        self._closed = True
        with self._lock:
            out = list(self._out)
        for leash in (self._own, *out):
            leash.abandon()
        self._streaming.close()
        self._client.close()


def _retry_after_s(error: Exception) -> float:
    """For how long the server wants to be left alone, in seconds or until a date; 0 where it does not say."""
    response = getattr(error, "response", None)
    text = "" if response is None else response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    return 0.0


def _said(error: Exception) -> str:
    return " ".join((_told(getattr(error, "body", None)) or _first_line(error)).split())[:300]


def _told(body: Any) -> str:
    """The text of an error, in the form of OpenAI ({"error": {"message"}}), FastAPI ({"detail"}) or in none."""
    if isinstance(body, dict):
        named = next(filter(None, map(body.get, ("message", "error", "detail", "msg"))), None)
        where = ".".join(map(str, body["loc"])) + ": " if isinstance(body.get("loc"), list) else ""
        return where + (_told(named) if named is not None else str(body))
    if isinstance(body, list):
        return "; ".join(map(_told, body))
    return str(body or "")


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
