"""A real server on a free port, in a thread of the test's process."""

import contextlib
import shutil
import threading

import httpx

from agentlab.agent import Options
from agentlab.lab import Lab
from agentlab.serve.access import access
from agentlab.serve.server import Settings
from agentlab.serve.server import serve as run_server

TOKEN = "a-token-for-the-tests"


class Running:
    """A server that answers; `url` ends in /v1."""

    def __init__(self, server):
        self.server = server
        self.service = server.service
        self.root = f"http://127.0.0.1:{server.port}"
        self.url = f"{self.root}/v1"
        self.headers = {"Authorization": f"Bearer {TOKEN}"}

    def post(self, timeout=60, headers=(), **fields):
        body = {"model": "agentlab", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 8, **fields}
        return httpx.post(
            f"{self.url}/chat/completions", json=body, headers={**self.headers, **dict(headers)}, timeout=timeout
        )

    def get(self, path, **headers):
        return httpx.get(f"{self.root}{path}", headers={**self.headers, **headers}, timeout=30)

    def series(self):
        """Metric name with labels → value."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@contextlib.contextmanager
def serving(lab, *, token=TOKEN, cors=(), options=None, remember=False, adapter="champion", **settings):
    """`agentlab serve` as the command starts it; it is shut down at the end, and must have freed everything."""
    ready, found, broke = threading.Event(), [], []

    def started(server):
        found.append(server)
        ready.set()

    def work():
        try:
            run_server(
                lab, access("127.0.0.1", token, cors), Settings(port=0, **settings), adapter=adapter,
                remember=remember, options=options or Options(max_new_tokens=8), say=lambda text: None,
                on_ready=started,
            )  # fmt: skip
        except BaseException as error:
            broke.append(error)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(120)
    if broke:
        thread.join()
        raise broke[0]
    try:
        yield Running(found[0])
    finally:
        found[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not broke


def copied(lab, folder):
    """The same run in a project of its own, so that a test may promote and damage what it likes."""
    shutil.copytree(lab.run.root, folder, dirs_exist_ok=True)
    copy = Lab.open(folder / "experiments" / lab.experiment.name, lab.overrides)
    assert copy.run.id == lab.run.id
    return copy
