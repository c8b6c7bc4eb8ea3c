"""The guard: alerts become events where work is polled, and a hot card pauses it."""

import threading

import pytest
import torch
from nvml_standin import Nvml

from agentlab.config import BudgetSettings
from agentlab.evolution.bench import open_bench
from agentlab.evolution.guard import Guard
from agentlab.hardware.watch import Sample
from agentlab.lab import Lab
from agentlab.report.progress import Progress


@pytest.fixture(autouse=True)
def _on_the_card(monkeypatch):
    """Torch runs on the stand-in's card."""
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")


def test_an_alert_is_an_event_at_the_next_poll():
    events = []
    guard = Guard(BudgetSettings(), events.append, lambda: False, nvml=Nvml(used=int(5.9 * 2**30)))
    assert not guard.should_stop()
    guard.monitor.sample()
    assert events == []
    assert not guard.should_stop()
    assert [event.kind for event in events] == ["warned"]
    assert "the limit is 90 %" in events[0].message
    guard.monitor.sample()
    assert not guard.should_stop()
    assert len(events) == 1


def test_a_hot_card_pauses_the_work_until_it_has_cooled():
    nvml, polled, going = Nvml(celsius=85), threading.Event(), threading.Event()

    def asked():
        polled.set()
        return False

    events = []
    with Guard(BudgetSettings(), events.append, asked, nvml=nvml, interval_s=0.01) as guard:
        guard.monitor.sample()
        worker = threading.Thread(target=lambda: (guard.should_stop(), going.set()))
        worker.start()
        assert polled.wait(60)
        assert not going.wait(0.2)
        nvml.celsius = 60
        assert going.wait(60)
        worker.join()
    warned, *waits = events
    assert warned.kind == "warned"
    assert "85 °C" in warned.message
    assert [wait.reason for wait in waits] == ["the card is too hot; it goes on below 75 °C"]  # said once
    progress = Progress()
    progress.update(waits[0])
    assert progress.stage() == "waiting: the card is too hot; it goes on below 75 °C"


def test_a_pause_ends_when_somebody_asks_to_stop():
    guard = Guard(BudgetSettings(), lambda event: None, lambda: True, nvml=Nvml(celsius=85))
    guard.monitor.sample()
    assert guard.should_stop()


def test_whoever_works_at_a_bench_waits_for_a_hot_card(tiny_experiment, monkeypatch):
    hot = Sample(0.0, "cuda", "card", 6141, 1000, 0, temperature_c=85)
    monkeypatch.setattr("agentlab.hardware.watch.read", lambda *_: hot)
    lab, events, polls = Lab.open(tiny_experiment, ["budget.threads=1"]), [], []

    def asked():
        polls.append(torch.get_num_threads())
        return len(polls) > 1

    before = torch.get_num_threads()
    try:
        with open_bench(lab.run, lab.suite, events.append, asked) as bench:
            assert bench.should_stop()
    finally:
        torch.set_num_threads(before)
    assert set(polls) == {1}
    assert [event.kind for event in events if event.kind in ("warned", "waiting")] == ["warned", "waiting"]
