"""One OpenAI-compatible server: requests with a time limit and retries, and what it turns out to be."""

import contextlib
import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from agentlab.errors import ConfigError, ModelError
from agentlab.inference.contract import EngineError

Kind = Literal["vllm", "ollama", "llama.cpp", "other"]
T = TypeVar("T")

_CONNECT_S = 10.0
_READ_S = 300.0  # between two pieces; the first may wait for the server to load the model
_TRIES = 4
_PAUSE_S = 0.5
_RETRIED = (429, 503)


class ServerError(EngineError):
    """The server cannot be reached, or answers with an error; the message says which."""


class RefusedByServer(EngineError):
    """The server does not take what was asked (a status of 400 to 499)."""


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

    def get(self, path: str) -> Any:
        """The JSON at `path`, counted from the server's root."""
        return self._tried(lambda: self._client.get(self.root + path, cast_to=object))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers; where it answers plain text, that."""

        text = self._tried(lambda: self._client.post(self.root + path, cast_to=str, body=body))
        try:
            return json.loads(text)
        except ValueError:
            return text

    def chunks(self, path: str, body: dict[str, Any]) -> "Chunks":
        """A streamed answer, begun: server-sent events of `path` (`/chat/completions` or `/completions`)."""
        create = self._client.chat.completions.create if "chat" in path else self._client.completions.create
        known = {"model": body["model"], "stream": True}
        known |= {key: body[key] for key in ("messages", "prompt") if key in body}
        extra = {key: value for key, value in body.items() if key not in known}
        return Chunks(self, self._tried(lambda: create(**known, extra_body=extra)))

    def _tried(self, call: Callable[[], T]) -> T:
        import openai

        for number in range(_TRIES):
            try:
                return call()
            except openai.APITimeoutError:
                raise ServerError(f"the server at {self.base_url} has not answered in time") from None
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                status = getattr(error, "status_code", None)
                if number + 1 < _TRIES and (status is None or status in _RETRIED):
                    time.sleep(_PAUSE_S * 2**number)
                    continue
                raise self.error(error) from None
            except openai.OpenAIError as error:
                raise self.error(error) from None
        raise AssertionError("unreachable")

    def error(self, error: Exception) -> EngineError:
        """One sentence for what the client raised."""
        status = getattr(error, "status_code", None)
        if status is None:
            return ServerError(f"the server at {self.base_url} cannot be reached or broke off: {_first_line(error)}")
        said = _said(error)
        if 400 <= status < 500 and status not in (408, 429):
            return RefusedByServer(f"the server at {self.base_url} refuses (status {status}): {said}")
        return ServerError(f"the server at {self.base_url} failed (status {status}): {said}")

    def broke_off(self) -> EngineError:
        """What to raise where a streamed answer ended without a finish reason, as behind a proxy that closed it."""
        return ServerError(f"the server at {self.base_url} broke off its answer")

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists. Raises ServerError."""
        found = self._tried(lambda: self._client.get("/models", cast_to=object))
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list):
            raise ServerError(f"{self.base_url}/models is no list of models; is {self.base_url} the API's address?")
        return [row for row in rows if isinstance(row, dict)]

    def known(self, model: str) -> Known:
        """What the server is and knows of `model`. Raises ModelError, with the names it has, where it lacks it."""
        rows = self.models()
        row = next((row for row in rows if row.get("id") in (model, f"{model}:latest")), None)
        if row is None:
            names = ", ".join(str(row.get("id")) for row in rows) or "none"
            raise ModelError(f"the server at {self.base_url} has no model {model}; it has: {names}")
        length = row.get("max_model_len")
        if isinstance(length, int):
            folder = Path(str(row.get("root") or ""))
            here = folder.is_absolute() and folder.is_dir()
            return Known("vllm", length, folder if here else None)
        with contextlib.suppress(EngineError):
            # a gateway may answer whatever is asked, with a page or with an error in a JSON object
            found = self.get("/props")
            settings = found.get("default_generation_settings") if isinstance(found, dict) else None
            if isinstance(settings, dict):
                return Known("llama.cpp", settings.get("n_ctx"))
        with contextlib.suppress(EngineError):
            found = self.get("/api/version")
            if isinstance(found, dict) and "version" in found:
                return Known("ollama")
        return Known("other")

    def close(self) -> None:
        self._client.close()


class Chunks:
    """The pieces of one streamed answer as dicts; `close` lets the server stop writing it."""

    def __init__(self, server: Server, stream: Any) -> None:
        self._server = server
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for chunk in self._stream:
                yield chunk.to_dict()
        except Exception as error:  # the client's HTTP library raises its own kinds while a stream is read
            raise self._server.error(error) from None
        finally:
            self.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it may be closed at the other end
            self._stream.close()


class Reading:
    """A streamed answer read on a thread of its own, so that whoever waits for it can stop waiting at any time."""

    def __init__(self, begin: Callable[[], Chunks]) -> None:
        self.ended = False
        self._arrived: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        self._abandoned = threading.Event()
        threading.Thread(target=self._read, args=(begin,), daemon=True).start()

    def _read(self, begin: Callable[[], Chunks]) -> None:
        try:
            with contextlib.closing(begin()) as chunks:
                for chunk in chunks:
                    if self._abandoned.is_set():
                        return
                    self._arrived.put(chunk)
            self._arrived.put(None)
        except Exception as error:  # handed to whoever takes
            self._arrived.put(error)

    def take(self, wait_s: float) -> dict[str, Any] | None:
        """The next piece; None where none has come within `wait_s`, or none will (`ended`). Raises what broke."""
        try:
            found = self._arrived.get(timeout=wait_s)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        self.ended = found is None
        return found

    def abandon(self) -> None:
        """Want no more of it; the connection is closed at the next piece that comes."""
        self._abandoned.set()


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.get("message") or body.get("error") if isinstance(body, dict) else body
    return " ".join(str(text or _first_line(error)).split())[:300]


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
