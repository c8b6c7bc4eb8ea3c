"""A real server of a tiny run, asked with OpenAI's own client and with plain HTTP."""

import asyncio
import contextlib
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from serve_helpers import TOKEN, serving

from agentlab import config
from agentlab.errors import LeaseHeldError, StorageError
from agentlab.hardware.lease import holder
from agentlab.inference.contract import OutOfMemoryError
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.memory import Memory
from agentlab.serve import app as serve_app
from agentlab.serve import server as serve_server
from agentlab.serve import service as serve_service
from agentlab.serve.grafana import dashboard

HELLO = [{"role": "user", "content": "Hello?"}]
LONG = {"model": "base", "max_tokens": 400}  # some hundreds of milliseconds: the tiny model never ends by itself


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0) as found:
        yield found


def until(true, seconds=30):
    """Wait for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(response):
    """What a stream's lines carry, comments left out."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


# -- OpenAI's client --------------------------------------------------------------------------------------------------


def test_models_are_the_champion_the_pool_and_the_base(server, client):
    ids = [model.id for model in client.models.list()]
    pool = [card.adapter_id for card in server.service.roster._pool.members()]
    assert ids == ["agentlab", *pool, "base"]
    assert client.models.retrieve("agentlab").agentlab["adapter"] == server.service.roster.served == pool[0]


@pytest.mark.parametrize("model", ["agentlab", "base", "second"])
def test_a_stream_is_the_whole_answer_in_pieces(server, client, model):
    if model == "second":
        model = client.models.list().data[2].id
    whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12)
    text, finish, last = "", None, None
    for chunk in client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, stream=True):
        last = chunk
        text += chunk.choices[0].delta.content or ""
        finish = finish or chunk.choices[0].finish_reason
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert last.system_fingerprint == whole.system_fingerprint
    adapter = server.service.roster.served if model == "agentlab" else model
    assert whole.agentlab["adapter"] == last.agentlab["adapter"] == adapter
    assert whole.system_fingerprint.startswith(f"{adapter}-")
    assert whole.agentlab["run"] == server.service.roster.run.id
    assert whole.agentlab["state"] == "answered"
    assert [step["step_number"] for step in whole.agentlab["steps"]] == [1]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0


def test_the_async_client_and_many_at_once(server):
    async def work():
        async with openai.AsyncOpenAI(base_url=server.url, api_key=TOKEN, max_retries=0) as client:
            asked = [client.chat.completions.create(model="base", messages=HELLO, max_tokens=6) for _ in range(8)]
            stream = await client.chat.completions.create(
                model="base", messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            return await asyncio.gather(*asked), chunks

    answers, chunks = asyncio.run(work())
    (text,) = {answer.choices[0].message.content for answer in answers}
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == answers[0].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="allowed: agentlab, ") as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="one answer is given"):
        client.chat.completions.create(model="agentlab", messages=HELLO, n=2)
    with pytest.raises(openai.BadRequestError, match="shorten it") as caught:
        client.chat.completions.create(model="agentlab", messages=[{"role": "user", "content": "word " * 300}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        client.chat.completions.create(
            model="agentlab", messages=[{"role": "user", "content": "word " * 300}], stream=True
        )
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_talk_and_the_sampling_reach_the_model(client):
    def ask(**fields):  # without tools: in the tiny model's window they leave no room for a talk
        fields = {"messages": HELLO, "max_tokens": 12, **fields, "extra_body": {"tool_choice": "none"}}
        return client.chat.completions.create(model="base", **fields)

    def said(**fields):
        return ask(**fields).choices[0].message.content

    plain, alone = said(), ask().usage.prompt_tokens
    talk = [{"role": "user", "content": "I am Tomas."}, {"role": "assistant", "content": "Hello."}, *HELLO]
    assert ask(messages=talk).usage.prompt_tokens > alone + len("I am Tomas.Hello.")  # a byte is a token
    assert ask(messages=[{"role": "system", "content": "Be brief."}, *HELLO]).usage.prompt_tokens > alone + 9
    assert said(temperature=2, seed=1) == said(temperature=2, seed=1) != said(temperature=2, seed=2)
    assert said(stop=[plain[1:3]]) == plain[: plain.find(plain[1:3])].strip()


def test_the_stream_is_what_the_interface_describes(server):
    response = server.post(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in chunks[1:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert json.loads(usage)["choices"] == []
    assert server.post(stream=True).text.count('"usage"') == 0


# -- the memory -------------------------------------------------------------------------------------------------------


def test_only_a_session_is_remembered(server):
    assert server.post().status_code == 200
    assert server.post(user="tomas").status_code == 200
    path = server.service.roster.run.root / "memory.db"
    with Memory.open(path) as memory:
        assert len(memory.sessions()) == 0
    asked = [{"role": "user", "content": "My cat is called Miezi."}]
    assert server.post(messages=asked, session_id="s1").status_code == 200
    with Memory.open(path) as memory:
        (turn,) = memory.conversation("s1").turns()
        assert turn.user_input == "My cat is called Miezi."


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_metrics_say_what_the_machine_has_and_who_holds_it(server):
    series = server.series()
    names = {name.partition("{")[0] for name in series}
    assert {"agentlab_memory_total_bytes", "agentlab_memory_used_bytes", "agentlab_swap_used_bytes"} <= names
    owners = {name.split('owner="')[1].split('"')[0] for name in series if 'owner="' in name}
    assert {"base", "other_processes"} <= owners
    assert {value for name, value in series.items() if name.startswith("agentlab_alert_active")} <= {0.0, 1.0}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing"])
def test_nothing_is_told_without_the_token(server, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        response = httpx.get(server.root + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    twice = httpx.get(server.root + path, headers=[("Authorization", "Bearer x"), ("Authorization", f"Bearer {TOKEN}")])
    assert twice.status_code == 401
    assert server.get(path).status_code == (200 if path in ("/v1/models", "/metrics") else 404)


def test_health_is_open_and_says_nothing(server):
    response = httpx.get(f"{server.root}/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    response = httpx.head(f"{server.root}/health")  # as `wget --spider` asks
    assert (response.status_code, response.content) == (200, b"")


def test_health_is_right_again_when_memory_is_though_nobody_asks(own, monkeypatch):
    monkeypatch.setattr(serve_service, "_AGAIN_S", 3600.0, raising=False)
    stream, short = TransformersEngine.stream, threading.Event()

    def streamed(self, *args, **kwargs):
        if short.is_set():
            raise OutOfMemoryError("not even one request fits into the device's memory")
        return stream(self, *args, **kwargs)

    with serving(own) as server:
        monkeypatch.setattr(TransformersEngine, "stream", streamed)
        short.set()
        assert server.post().status_code == 503
        assert server.get("/health").json() == {"status": "no model is left"}
        short.clear()
        monkeypatch.setattr(serve_service, "_AGAIN_S", 0.0, raising=False)
        until(lambda: server.get("/health").status_code == 200)
        assert server.post().status_code == 200


def test_web_pages_may_not_ask(server):
    before = server.series()['agentlab_tokens_total{kind="prompt"}']
    assert server.get("/v1/models", Host="evil.example").status_code == 403  # a name rebound to loopback
    assert server.get("/v1/models", Origin="http://evil.example").status_code == 403
    assert server.get("/v1/models", Origin="null").status_code == 403
    # what a form of another page can send without asking first
    body = b'{"model": "agentlab", "messages": [{"role": "user", "content": "Hello?"}]}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(
            f"{server.url}/chat/completions", content=body, headers={**server.headers, "Content-Type": kind}
        )
        assert response.status_code == 415
    preflight = httpx.options(
        f"{server.url}/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in preflight.headers
    assert server.series()['agentlab_tokens_total{kind="prompt"}'] == before


def test_without_a_token_programs_on_this_machine_may_ask_and_pages_may_not(own):
    with serving(own, token=None) as server:
        url = f"{server.url}/models"
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(url, headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_named_page_may_ask(own):
    with serving(own, cors=("http://localhost:3000",)) as server:
        page = {"Origin": "http://localhost:3000"}
        # OpenAI's own client for browsers sends headers of its own
        for names in ("authorization", "authorization,content-type,user-agent,x-stainless-arch,x-stainless-os"):
            preflight = httpx.options(
                f"{server.url}/chat/completions",
                headers={
                    **page,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": names,
                },
            )
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert server.post(headers=page).headers["access-control-allow-origin"] == "http://localhost:3000"
        assert httpx.get(f"{server.url}/models", headers=page).status_code == 401
        assert server.get("/v1/models", Origin="http://localhost:3001").status_code == 403


def test_a_long_request_is_not_read(server):
    body = b'{"messages": [{"role": "user", "content": "' + b"x" * 10 * 2**20 + b'"}]}'
    headers = {**server.headers, "Content-Type": "application/json"}
    url = f"{server.url}/chat/completions"
    for content in (body, iter([body[at : at + 65536] for at in range(0, len(body), 65536)])):  # also in chunks
        try:
            response = httpx.post(url, content=content, headers=headers)
        except httpx.TransportError:  # the connection was closed while it was still being sent
            continue
        assert response.status_code == 413
    assert server.post().status_code == 200


def test_what_is_no_request_is_refused_in_the_same_form(server):
    headers = {**server.headers, "Content-Type": "application/json"}
    broken = httpx.post(f"{server.url}/chat/completions", content=b"{", headers=headers)
    assert broken.status_code == 400
    assert broken.json()["error"]["code"] == "invalid_json"
    assert server.get("/v1/chat/completions").status_code == 405
    assert "error" in server.get("/v1/chat/completions").json()
    assert "allowed: /v1/chat/completions" in server.get("/v1/completions").json()["error"]["message"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": [{"role": "user", "content": "Hel\x00lo?"}]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": "\x00"}, {"role": "assistant", "content": "x"}, *HELLO]},
        ),
        ("session_id", {"session_id": "a\x00b"}),
        ("max_tokens", {"tool_choice": "required", "max_tokens": 8}),
    ],
)
def test_what_cannot_be_answered_is_the_clients_to_change(server, param, fields, caplog):
    for stream in (False, True):
        failures = [value for name, value in server.series().items() if name.startswith("agentlab_failures_total")]
        response = server.post(**{"max_tokens": 8, "stream": stream, **fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        after = [value for name, value in server.series().items() if name.startswith("agentlab_failures_total")]
        assert after == failures
    assert "Traceback" not in caplog.text


def test_a_damaged_card_costs_its_own_adapter_alone(own):
    _, second, third = own.run.results()[-1].pool
    with serving(own) as server:
        (own.run.folder / "adapters" / third / "card.json").write_text("{")
        assert third not in [model["id"] for model in server.get("/v1/models").json()["data"]]
        assert server.post(model=second).status_code == 200
        for response in (server.post(model=third), server.get(f"/v1/models/{third}")):
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"


def test_what_breaks_in_a_route_is_an_error_as_any_other(own, monkeypatch, caplog):
    page = "http://localhost:3000"
    with serving(own, cors=(page,)) as server:

        def broken():
            raise errors.pop()

        errors = [StorageError("the disk is full"), RuntimeError("no such key in /home/tomas/secret")]
        monkeypatch.setattr(server.service.roster, "models", broken)
        unknown, known = (server.get("/v1/models", Origin=page) for _ in range(2))
        assert (unknown.status_code, known.status_code) == (500, 500)
        assert unknown.json()["error"]["message"] == "the server failed; its log says why"
        assert "no such key in /home/tomas/secret" in caplog.text
        assert known.json()["error"]["message"] == "the disk is full"
        assert {one.json()["error"]["type"] for one in (unknown, known)} == {"server_error"}
        assert {one.headers["access-control-allow-origin"] for one in (unknown, known)} == {page}
        series = server.series()
        assert series['agentlab_http_responses_total{code="500",path="/v1/models"}'] == 2
        assert series['agentlab_failures_total{reason="failed"}'] == 2


def test_a_model_that_is_culled_meanwhile_is_looked_up_once(own, monkeypatch):
    _, second, _ = own.run.results()[-1].pool
    with serving(own) as server:
        roster = server.service.roster
        models, looks = roster.models, []

        def culled_after_the_first():
            looks.append(second)
            return [model for model in models() if len(looks) == 1 or model["id"] != second]

        monkeypatch.setattr(roster, "models", culled_after_the_first)
        assert server.get(f"/v1/models/{second}").json()["id"] == second
        assert server.get(f"/v1/models/{second}").status_code == 404


def test_silent_and_slow_connections_are_closed(own, monkeypatch):
    monkeypatch.setattr(serve_server, "_IDLE_S", 0.2)
    monkeypatch.setattr(serve_app, "_BODY_S", 0.3)
    with serving(own) as server:
        address = ("127.0.0.1", server.server.port)
        with socket.create_connection(address, timeout=30) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(address, timeout=30) as trickling:
            trickling.sendall(b"GET /health HTTP/1.1\r\nHo")
            assert trickling.recv(1) == b""
        with socket.create_connection(address, timeout=30) as half:
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {TOKEN}\r\nContent-Length: 500\r\n\r\n{{"
            )
            half.sendall(head.encode())
            assert half.recv(100).startswith(b"HTTP/1.1 408")
        assert server.post(**LONG).status_code == 200  # longer than an idle connection may be


# -- the queue --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asking(server, count=1, **fields):
    """Streams that are being answered or wait; the lines of each are read by a thread of its own."""
    answers = [None] * count
    threads = []

    def work(at):
        answers[at] = server.post(stream=True, **{**LONG, **fields})

    for at in range(count):
        threads.append(threading.Thread(target=work, args=(at,)))
        threads[-1].start()
        until(lambda: server.service.line.busy, 60)
    yield answers
    for thread in threads:
        thread.join()


def test_requests_wait_in_a_bounded_queue(own):
    with serving(own, queue=2) as server:
        line = server.service.line
        with asking(server) as first, asking(server, 2) as waiting:
            until(lambda: line.queued == 2)
            refused = server.post()
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert server.get("/health").status_code == 200
        assert all(events(answer)[-1] == "[DONE]" for answer in [*first, *waiting])
        assert server.series()['agentlab_failures_total{reason="queue_full"}'] == 1


def test_streams_that_wait_are_kept_alive(own, monkeypatch):
    monkeypatch.setattr(serve_app, "KEEP_ALIVE_S", 0.02)
    with serving(own) as server, asking(server, 3) as answers:
        until(lambda: all(answers))
    assert any(answer.text.startswith(": waiting\n\n") for answer in answers)
    assert all(events(answer)[-1] == "[DONE]" for answer in answers)


def test_a_client_that_goes_away_takes_its_job_along(own):
    with serving(own) as server:
        line = server.service.line
        body = {"messages": HELLO, "stream": True, **LONG}
        with httpx.stream("POST", f"{server.url}/chat/completions", json=body, headers=server.headers) as running:
            lines = running.iter_lines()  # kept: a response whose lines nobody reads is closed
            next(lines)
            with pytest.raises(httpx.ReadTimeout):  # waits, and gives up
                server.post(timeout=0.05)
            until(lambda: line.queued == 0)
            assert line.busy
        until(lambda: not line.busy)
        assert server.post().status_code == 200
        series = server.series()
        assert series['agentlab_failures_total{reason="client_gone"}'] == 2
        assert series["agentlab_requests_in_flight"] == 0


def test_a_deadline_counts_from_the_arrival(server):
    with asking(server, max_tokens=450):
        late = server.post(deadline_s=0.01)
        streamed = server.post(deadline_s=0.01, stream=True)
    assert late.status_code == 200
    choice = late.json()["choices"][0]
    assert (choice["finish_reason"], late.json()["agentlab"]["state"]) == ("length", "deadline")
    assert json.loads(events(streamed)[-2])["choices"][0]["finish_reason"] == "length"


def test_fifty_clients_lose_nothing_while_the_champion_changes(own):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from serve import Tally, load  # the benchmark does the same with 200 for a minute

    tally = Tally()
    options = SimpleNamespace(clients=50, seconds=3, changes=1, tokens=8)
    with serving(own) as server:
        champions, _, series = asyncio.run(load(server.root, TOKEN, own, options, tally))
    assert not tally.failures
    assert len(tally.latencies_s) >= 50
    assert all(tally.adapters[name] for name in champions)
    assert "agentlab_champion_swaps_total 1.0" in series


def test_shutting_down_lets_the_running_answer_end_and_sends_the_others_away(own):
    with serving(own) as server:
        with asking(server, max_tokens=300) as running:
            with asking(server, 2) as waiting:
                until(lambda: server.service.line.queued == 2)
                assert holder(config.home() / "accelerator.lock")["purpose"].startswith("serving tiny/")
                server.server.should_exit = True
            assert all(answer.status_code == 503 for answer in waiting)
        assert events(running[0])[-1] == "[DONE]"


def test_the_lease_is_held_while_serving_and_free_afterwards(own):
    lock = config.home() / "accelerator.lock"
    with serving(own, share=True):
        assert holder(lock) is None
        with serving(own):
            with pytest.raises(LeaseHeldError, match="serving tiny/"):
                own.agent(load=False)
            assert re.search(r"serving tiny/\w+ on 127\.0\.0\.1:\d+", holder(lock)["purpose"])
    assert holder(lock) is None


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_happened(server):
    before = server.series()
    server.post()
    server.post(n=2)
    after = server.series()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('agentlab_http_responses_total{code="200",path="/v1/chat/completions"}') == 1
    assert grown('agentlab_http_responses_total{code="400",path="/v1/chat/completions"}') == 1
    assert grown('agentlab_answers_total{state="answered"}') == 1
    assert grown("agentlab_request_seconds_count") == 1
    assert after["agentlab_requests_in_flight"] == after["agentlab_requests_queued"] == 0
    assert grown('agentlab_tokens_total{kind="completion"}') > 0
    assert 'agentlab_request_seconds_bucket{le="2.0"}' in after
    roster = server.service.roster
    model = roster.agent.chain.link.model
    champion = f'agentlab_champion_info{{adapter="{roster.served}",model="{model}",run="{roster.run.id}"}}'
    assert after[champion] == 1
    assert after["agentlab_process_memory_bytes"] > 10 * 2**20
    assert after['agentlab_memory_bytes{device="cpu",kind="total"}'] > 2**30


def test_every_query_of_the_dashboard_finds_its_series(server):
    server.post()
    server.post(stream=True)
    with contextlib.suppress(httpx.HTTPError):
        server.post(timeout=0.001)
    server.post(messages=[{"role": "user", "content": "word " * 300}])
    known = {}
    for line in server.get("/metrics").text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            known[name] = kind
    # what a driver reports, where there is one
    known |= dict.fromkeys(
        ("agentlab_utilisation_ratio", "agentlab_temperature_celsius", "agentlab_power_watts"), "gauge"
    )
    board = dashboard()
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            names = set(re.findall(r"\bagentlab_\w+", target["expr"]))
            assert names
            for name in names:
                family = re.sub(r"_(bucket|count|sum)$", "", name)
                assert name in known or known.get(family) == "histogram", name
                asked.add(family)
            assert target["expr"].count("(") == target["expr"].count(")")
    assert {name for name in known if not name.endswith("_created")} == asked
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert board["templating"]["list"][0]["name"] == "datasource"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(places)
