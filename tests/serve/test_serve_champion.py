"""A champion that changes while it serves, and weights that are not what they should be."""

import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from serve_helpers import serving
from support import promote

from agentlab.adapters import Pool
from agentlab.inference.contract import EngineBroken
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.serve import roster as roster_room
from agentlab.serve.metrics import Metrics
from agentlab.serve.roster import Roster


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def answered_by(server, model="agentlab"):
    response = server.post(model=model)
    assert response.status_code == 200, response.text
    return response.json()["agentlab"]["adapter"]


def loaded(server):
    return server.service.agent.chain.current()[1].adapters()


def test_a_promoted_champion_takes_over_and_the_old_one_leaves_the_memory(own):
    first, second, third = own.run.results()[-1].pool
    with serving(own) as server:
        model = server.service.agent.chain.current()[1]._base
        assert answered_by(server) == first
        assert loaded(server) == [first]
        promote(own.run, second)
        assert answered_by(server) == second  # at once: the next answer is the new champion's
        assert loaded(server) == [second]
        promote(own.run, third)
        until(lambda: server.service.roster.served == third)  # also when nobody asks
        assert server.get("/v1/models").json()["data"][0]["agentlab"] == {"adapter": third}
        promote(own.run, "base")
        assert answered_by(server) == "base"
        assert loaded(server) == []
        assert server.service.agent.chain.current()[1]._base is model  # loaded once
        series = server.series()
        assert series["agentlab_champion_swaps_total"] == 3
        assert [name for name in series if name.startswith("agentlab_champion_info")] == [
            f'agentlab_champion_info{{adapter="base",model="{server.service.agent.chain.link.model}",run="{own.run.id}"}}'
        ]


def test_an_answer_that_is_being_written_is_its_champions_to_the_end(own):
    first, second, _ = own.run.results()[-1].pool
    body = {"messages": [{"role": "user", "content": "Hello?"}], "stream": True, "max_tokens": 450}
    with serving(own) as server:
        with httpx.stream("POST", f"{server.url}/chat/completions", json=body, headers=server.headers) as running:
            lines = running.iter_lines()
            next(lines)
            promote(own.run, second)
            text = "\n".join(lines)
        assert f'"adapter": "{first}"' in text
        assert "[DONE]" in text
        assert answered_by(server) == second


def test_others_of_the_pool_answer_by_name_and_the_champion_stays_loaded(own):
    first, second, third = own.run.results()[-1].pool
    with serving(own) as server:
        assert answered_by(server, second) == second
        assert loaded(server) == sorted([first, second])
        assert answered_by(server, third) == third
        assert loaded(server) == sorted([first, third])
        assert answered_by(server, "base") == "base"
        assert answered_by(server) == first
        assert loaded(server) == [first]


def test_who_is_served_is_pinned_and_nobody_else(own, monkeypatch):
    first, second, third = own.run.results()[-1].pool
    pinned, beside = [], []

    def pin(engine, adapter):
        pinned.append(adapter)
        beside.append(engine.adapters())

    monkeypatch.setattr("agentlab.inference.transformers_engine.TransformersEngine.pin", pin)
    with serving(own) as server:
        answered_by(server, third)
        answered_by(server)
        promote(own.run, second)
        answered_by(server)
    assert set(pinned) == {first, second}
    assert (pinned[-1], beside[-1]) == (second, [second])  # once more when the old one has left its place


def test_damaged_weights_of_a_new_champion_leave_the_old_one(own, caplog):
    first, second, _ = own.run.results()[-1].pool
    weights = own.run.folder / "adapters" / second / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with serving(own) as server:
        promote(own.run, second)
        assert answered_by(server) == first
        assert answered_by(server) == first
        series = server.series()
        assert series["agentlab_champion_swap_failures_total"] == 1
        assert series["agentlab_champion_swaps_total"] == 0
        assert f"champion {second} cannot be loaded, {first} goes on answering" in caplog.text
        damaged = server.post(model=second)
        assert damaged.status_code == 404
        assert "sha256 differs" in damaged.json()["error"]["message"]
        assert answered_by(server) == first
        weights.write_bytes(whole)  # restored from a copy
        assert answered_by(server) == second


@pytest.mark.parametrize("lack", [MemoryError("no room"), EngineBroken("the process is gone")])
def test_a_champion_that_found_no_memory_or_no_engine_is_tried_again(own, monkeypatch, lack):
    first, second, _ = own.run.results()[-1].pool
    monkeypatch.setattr("agentlab.serve.roster._RETRY_S", 0.2)
    with serving(own) as server:
        roster, lacking = server.service.roster, ["once"]
        put = roster._put

        def scarce(adapter, pinned):
            if lacking:
                lacking.pop()
                raise lack
            put(adapter, pinned)

        monkeypatch.setattr(roster, "_put", scarce)
        promote(own.run, second)
        assert answered_by(server) == first
        until(lambda: roster.served == second)
        assert server.series()["agentlab_champion_swap_failures_total"] == 1


def test_a_champion_that_never_finds_memory_is_tried_now_and_then(own, monkeypatch):
    first, second, _ = own.run.results()[-1].pool
    now, asked, load = [0.0], [], TransformersEngine.load_adapter

    def scarce(engine, adapter, folder):
        if adapter == second:
            asked.append(adapter)
            raise MemoryError("no room for the factors")
        load(engine, adapter, folder)

    monkeypatch.setattr(TransformersEngine, "load_adapter", scarce)
    monkeypatch.setattr("agentlab.serve.roster.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    pool, metrics = Pool(own.run.folder / "adapters"), Metrics()
    used = pool.card(second).usage_count
    with own.agent(remember=False, lease=False) as agent:
        roster = Roster(agent, own.run, "champion", metrics)
        promote(own.run, second)
        for attempts in (1, 2):
            for _ in range(5):
                roster.refresh()
                pool.count_use(second)  # by another program: it is the same adapter all the same
            assert asked == [second] * (attempts + 1)  # at first the weights of the old one gave way
            now[0] += roster_room._RETRY_S
        assert (roster.served, pool.card(second).usage_count) == (first, used + 10)
        assert b"agentlab_champion_swap_failures_total 1.0" in metrics.text()
        monkeypatch.setattr(TransformersEngine, "load_adapter", load)
        roster.refresh()
        assert (roster.served, pool.card(second).usage_count) == (second, used + 11)


def test_who_is_promoted_while_the_agent_is_loaded_takes_over(own):
    first, second, _ = own.run.results()[-1].pool
    with own.agent(remember=False, lease=False) as agent:
        promote(own.run, second)
        roster = Roster(agent, own.run, "champion", Metrics())
        assert roster.served == first
        roster.refresh()
        assert roster.served == second


def test_a_champion_that_cannot_be_kept_on_the_device_has_taken_over_all_the_same(own, monkeypatch, caplog):
    second = own.run.results()[-1].pool[1]
    metrics = Metrics()
    with own.agent(remember=False, lease=False) as agent:
        roster, use = Roster(agent, own.run, "champion", metrics), agent.chain.use

        def scarce(link, pressing=False):
            if agent.chain.links[0].adapter == second:
                raise MemoryError("no room to pin it")
            use(link, pressing)

        monkeypatch.setattr(agent.chain, "use", scarce)
        promote(own.run, second)
        roster.refresh()
        assert roster.served == second
    assert b"agentlab_champion_swaps_total 1.0" in metrics.text()
    assert f'adapter="{second}"'.encode() in metrics.text()
    assert f"champion {second} is not kept on the device: no room to pin it" in caplog.text


def test_who_is_asked_for_by_name_and_finds_no_memory_gets_a_lower_rung(own, monkeypatch):
    first, second, third = own.run.results()[-1].pool
    load = TransformersEngine.load_adapter

    def scarce(engine, adapter, folder):
        if adapter == third or (adapter == second and engine.rung == "fp32"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        load(engine, adapter, folder)

    monkeypatch.setattr(TransformersEngine, "load_adapter", scarce)
    with serving(own) as server:
        assert answered_by(server) == first
        named = server.post(model=second).json()["agentlab"]
        assert named["adapter"] == second
        assert any("lower rung fp32 → bf16: CUDA out of memory" in step for step in named["fallbacks"])
        never = server.post(model=third)
        assert (never.status_code, never.json()["error"]["code"]) == (500, "adapter_failed")
        assert never.json()["error"]["message"] == f"adapter {third} finds no memory: CUDA out of memory"
        assert answered_by(server) == first
        assert answered_by(server, second) == second


def test_a_champion_whose_card_is_restored_is_taken(own):
    first, second, _ = own.run.results()[-1].pool
    card = own.run.folder / "adapters" / second / "card.json"
    whole = card.read_bytes()
    with serving(own) as server:
        card.write_text("{")
        promote(own.run, second)
        assert answered_by(server) == first
        assert server.series()["agentlab_champion_swap_failures_total"] == 1
        card.write_bytes(whole)
        assert answered_by(server) == second


def test_a_damaged_result_file_leaves_the_old_champion(own):
    first, second, _ = own.run.results()[-1].pool
    with serving(own) as server:
        promote(own.run, second)
        path = own.run.generation_folder(own.run.results()[-1].generation) / "result.json"
        text = path.read_text()
        path.write_text("{")
        until(lambda: server.series()["agentlab_champion_swap_failures_total"] >= 1)
        assert answered_by(server) in (first, second)
        path.write_text(text)
        assert answered_by(server) == second


def test_a_named_adapter_is_served_whoever_is_champion(own):
    _, second, third = own.run.results()[-1].pool
    with serving(own, adapter=third) as server:
        promote(own.run, second)
        assert answered_by(server) == third
        assert server.series()["agentlab_champion_swaps_total"] == 0
