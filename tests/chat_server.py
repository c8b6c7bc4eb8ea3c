"""A small HTTP server that speaks as Ollama, llama.cpp and others do, their oddities included."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """`kind`: "ollama", "llama.cpp", "vllm", "sglang" or "other". `answer(body)` gives an answer's text pieces; a dict
    is a whole delta, or with "error" how the stream ends.

    statuses: given, one after another, to chats before the first is answered, and at the addresses in `busy`; each may
    be (status, body). headers: sent with these. posted, times_s: the bodies of all chats and when they came.
    strict: whether stream_options are refused. raw: bytes that are sent instead of an answer.
    silent: "at once" or "later", where nothing or no more than the head of an answer is sent, and it is then waited for
    the client to close the connection (broken_off).
    finish: whether the end of an answer is said, as by every server, or the stream just ends, as behind some proxies.
    elsewhere: what is answered, with status 200, at addresses that it does not know. prompt(body): what llama.cpp's
    template makes of messages. usage, logprobs: whether they are told, or what is in their place.
    """

    def __init__(
        self, kind, answer, *, statuses=(), usage=True, logprobs=False, calls=None, pause_s=0.0, models=("m",),
        elsewhere=None, prompt=None, finish=True, busy=(), headers=(), silent=None, strict=False,
        raw=None,
    ):  # fmt: skip
        self.kind, self.answer, self.usage, self.logprobs, self.calls = kind, answer, usage, logprobs, calls
        self.statuses, self.pause_s, self.models = list(statuses), pause_s, models
        self.elsewhere, self.prompt, self.finish, self.busy = elsewhere, prompt, finish, busy
        self.headers, self.silent, self.strict, self.raw = headers, silent, strict, raw
        self.posted, self.times_s, self.keys, self.running, self.most = [], [], [], 0, 0
        self.broken_off = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer._get(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._post(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _get(self, handler):
        self.keys.append(handler.headers["Authorization"])
        if handler.path == "/v1/models":
            length = {"max_model_len": 512} if self.kind in ("vllm", "sglang") else {}
            self._json(handler, 200, {"data": [{"id": name, "object": "model", **length} for name in self.models]})
        elif handler.path in self.busy and self.statuses:
            self._json(handler, self.statuses.pop(0), {"error": {"message": "busy on purpose"}})
        elif handler.path == "/api/version" and self.kind == "ollama":
            self._json(handler, 200, {"version": "0.13.0"})
        elif handler.path == "/props" and self.kind == "llama.cpp":
            self._json(handler, 200, {"default_generation_settings": {"n_ctx": 640}})
        elif self.elsewhere is not None:
            self._json(handler, 200, self.elsewhere)
        else:
            self._json(handler, 404, {"error": {"message": "File Not Found", "code": 404}})

    def _post(self, handler, body):
        if handler.path != "/v1/chat/completions":
            self._json(handler, *self._elsewhere(handler.path, body))
            return
        self.posted.append(body)
        self.times_s.append(time.monotonic())
        if (refusal := self._refusal(body)) is not None:
            self._json(handler, *refusal)
            return
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self._stream(handler, body)
        except (BrokenPipeError, ConnectionResetError):
            self.broken_off.set()
        finally:
            with self._lock:
                self.running -= 1

    def _elsewhere(self, path, body):
        if path in self.busy and self.statuses:
            return self.statuses.pop(0), {"error": {"message": "busy on purpose"}}
        if path == "/api/show" and self.kind == "ollama":
            return 200, {"capabilities": ["completion"] + (["tools"] if self.calls else [])}
        if path == "/tokenize" and self.kind == "vllm":
            return 200, {"count": 9, "max_model_len": 512, "tokens": [1] * 9}
        if path == "/tokenize" and self.kind == "sglang":
            return 400, {"object": "error", "message": "prompt: Field required"}
        if path == "/apply-template" and self.prompt is not None:
            return 200, {"prompt": self.prompt(body)}
        return 404, {"error": "404 page not found"}

    def _refusal(self, body):
        if self.statuses:
            status = self.statuses.pop(0)
            if isinstance(status, tuple):
                return *status, self.headers
            return status, {"error": {"message": f"status {status} on purpose"}}, self.headers
        if self.strict and "stream_options" in body:
            return 422, {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]}
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"model '{body['model']}' not found"}}
        if body.get("tools") and self.calls is None and self.kind != "other":
            return 400, {"error": {"message": "does not support tools"}}
        return None

    def _stream(self, handler, body):
        handler.close_connection = True
        if self.silent == "at once":
            self._wait_for_the_end(handler)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()

        def send(choice=None, **more):
            choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
            chunk = {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": choices,
                **more,
            }
            handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            handler.wfile.flush()

        if self.raw is not None:
            handler.wfile.write(self.raw)
            return
        if self.silent:
            send({"delta": {"role": "assistant"}})
            self._wait_for_the_end(handler)
            return
        count = 0
        finish = "stop"
        for piece in self.answer(body):
            if count >= body["max_tokens"]:
                finish = "length"
                break
            count += 1
            delta = piece if isinstance(piece, dict) else {"content": piece}
            if "error" in delta:
                handler.wfile.write(f"data: {json.dumps(delta)}\n\n".encode())
                return
            choice = {"delta": delta}
            if self.logprobs and body.get("logprobs"):
                row = {"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}
                choice["logprobs"] = {"content": [row if self.logprobs is True else self.logprobs]}
            send(choice)
            time.sleep(self.pause_s)
        if body.get("tools") and self.calls and body["messages"][-1]["role"] != "tool":  # it has seen the result
            for index, (name, arguments) in enumerate(self.calls):
                call = {"index": index, "id": f"call_{index}", "type": "function"}
                send({"delta": {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}})
            finish = "tool_calls"
        if self.finish:
            send({"delta": {}, "finish_reason": finish})
        if self.usage:
            shown = 11 + 30 * len(body.get("tools") or () if self.calls else ())
            usage = {"prompt_tokens": shown, "completion_tokens": count, "total_tokens": shown + count}
            send(usage=usage if self.usage is True else self.usage)
        handler.wfile.write(b"data: [DONE]\n\n")

    def _wait_for_the_end(self, handler):
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":
            self.broken_off.set()

    @staticmethod
    def _json(handler, status, value, headers=()):
        data = json.dumps(value).encode()
        with contextlib.suppress(BrokenPipeError):
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            for name, text in dict(headers).items():
                handler.send_header(name, text)
            handler.end_headers()
            handler.wfile.write(data)
