"""The monitor: samples, owners, alerts and their end, with a stand-in for the driver and with the real RAM."""

import os
import threading

import psutil
import pytest
from nvml_standin import Nvml
from support import memory_hog

from agentlab.config import BudgetSettings
from agentlab.hardware.watch import OTHERS, SILENCE_S, UNATTRIBUTED, Holding, Monitor, Owners, Sample, judge

BUDGET = BudgetSettings()
NONE = frozenset()


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Sets where torch runs, as on a machine with the stand-in's cards: on the GPU, until a test says otherwise."""

    def runs_on(name):
        monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: name)

    runs_on("cuda")
    return runs_on


def sample(used=1000.0, total=6000.0, **more):
    return Sample(time_s=0.0, device="cuda", name="Card", total_mib=total, used_mib=used, swap_used_mib=0.0, **more)


# -- samples ------------------------------------------------------------------------------------------------------


def test_a_sample_of_the_gpu_attributes_memory_to_its_owners():
    watching = Monitor(nvml=Nvml(used=4 * 2**30, processes={os.getpid(): 3 * 2**30}))
    watching.owners.register("base", Holding(2000))
    watching.owners.register("kv_cache", lambda: Holding(500, idle_mib=400))
    found = watching.sample()
    assert (found.device, found.name, found.total_mib, found.used_mib) == ("cuda", "Card A", 6144, 4096)
    assert found.owners == {"base": 2000, "kv_cache": 500, UNATTRIBUTED: 3072 - 2500, OTHERS: 1024}
    assert found.efficiency == pytest.approx(2100 / 2500)
    assert found.pressure == pytest.approx((4096 - 400) / 6144)
    watching.owners.unregister("base")
    watching.owners.unregister("nobody")
    assert "base" not in watching.sample().owners


def test_where_the_driver_knows_no_processes_the_others_are_not_guessed():
    watching = Monitor(nvml=Nvml())
    watching.owners.register("base", Holding(100))
    assert watching.sample().owners == {"base": 100}


def test_what_the_driver_does_not_report_is_none():
    silent = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature", "nvmlDeviceGetUtilizationRates")
    found = Monitor(nvml=Nvml(silent)).sample()
    assert (found.power_w, found.temperature_c, found.utilisation_percent) == (None, None, None)
    assert not Monitor(nvml=Nvml(silent, celsius=99)).alerts()


def test_without_a_gpu_the_ram_is_watched(monkeypatch, device):
    device("cpu")
    monkeypatch.setattr("agentlab.hardware.monitor._nvml", lambda: None)
    found = Monitor().sample()
    assert (found.device, found.name) == ("cpu", "RAM")
    assert found.total_mib == pytest.approx(psutil.virtual_memory().total / 2**20)
    assert found.owners[UNATTRIBUTED] > 10
    assert found.temperature_c is None
    assert found.efficiency is None


def test_beside_a_card_that_torch_does_not_use_the_ram_is_watched(device):
    device("cpu")
    watching = Monitor(nvml=Nvml(used=6 * 2**30, celsius=99))
    watching.owners.register("base", Holding(5))
    found = watching.sample()
    assert (found.device, found.name, found.temperature_c) == ("cpu", "RAM", None)
    assert found.total_mib == pytest.approx(psutil.virtual_memory().total / 2**20)
    assert found.owners["base"] == 5
    assert "temperature" not in {alert.kind for alert in watching.alerts()}


@pytest.mark.parametrize("silent", [("nvmlDeviceGetCount",), ("nvmlDeviceGetMemoryInfo",)])
def test_where_the_cards_memory_cannot_be_read_its_owners_are_not_counted_against_the_ram(silent):
    watching = Monitor(nvml=Nvml(silent))
    watching.owners.register("base", Holding(5000, idle_mib=100))
    found = watching.sample()
    assert (found.device, found.name, found.idle_mib) == ("cpu", "RAM", 0)
    assert set(found.owners) == {UNATTRIBUTED, OTHERS}
    assert found.temperature_c == (61 if silent == ("nvmlDeviceGetMemoryInfo",) else None)


def test_a_process_that_this_one_has_started_is_no_other_one(device):
    device("cpu")
    before = Monitor().sample().owners
    with memory_hog(300) as process:
        during = Monitor().sample().owners
        process.kill()
    assert during[UNATTRIBUTED] - before[UNATTRIBUTED] == pytest.approx(300, abs=100)


def test_owners_that_are_computed_cannot_be_registered():
    for owner in (OTHERS, UNATTRIBUTED):
        with pytest.raises(ValueError, match=owner):
            Owners().register(owner, Holding(1))


def test_an_owner_that_fails_is_left_out():
    watching = Monitor(nvml=Nvml())
    watching.owners.register("base", Holding(100))
    watching.owners.register("training", lambda: 1 / 0)
    assert watching.sample().owners == {"base": 100}


def test_the_thread_samples_until_it_is_stopped_and_the_history_is_bounded():
    enough = threading.Event()
    nvml = Nvml()
    reads = []

    def count():
        reads.append(1)
        if len(reads) >= 8:
            enough.set()
        return Holding(1)

    watching = Monitor(interval_s=0.01, keep=3, nvml=nvml)
    watching.owners.register("base", count)
    with watching:
        assert watching.start() is watching
        assert enough.wait(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "agentlab-monitor"]
    seen = len(reads)
    times = [found.time_s for found in watching.history()]
    assert len(times) == 3
    assert times == sorted(times)
    watching.stop()
    assert len(reads) == seen


def test_a_consumers_mistake_does_not_end_the_watch():
    again = threading.Event()
    calls = []

    def fail(alert):
        calls.append(alert)
        nvml.used = 0  # the next sample ends the alert, the one after it begins another
        raise RuntimeError("a consumer's mistake")

    nvml = Nvml(used=6 * 2**30)

    def refill():
        if calls and nvml.used == 0 and not watching.alerts():
            nvml.used = 6 * 2**30
        if len(calls) >= 2:
            again.set()
        return Holding(0)

    watching = Monitor(interval_s=0.01, on_alert=fail, nvml=nvml)
    watching.owners.register("base", refill)
    with watching:
        assert again.wait(60)


# -- alerts -------------------------------------------------------------------------------------------------------


def test_memory_alerts_once_and_ends_well_below_the_limit():
    nvml, raised = Nvml(used=int(0.89 * 6 * 2**30)), []
    watching = Monitor(nvml=nvml, on_alert=raised.append)
    watching.owners.register("adapters", Holding(900))
    for share, active, times in [(0.89, 0, 0), (0.91, 1, 1), (0.88, 1, 1), (0.92, 1, 1), (0.84, 0, 1), (0.9001, 1, 2)]:
        nvml.used = int(share * 6 * 2**30)
        watching.sample()
        assert len(watching.alerts()) == active, share
        assert len(raised) == times, share
    assert "unload adapters" in raised[0].message
    assert "91 %" in raised[0].message


def test_a_hot_card_whose_driver_falls_silent_counts_as_hot_for_a_minute():
    now, told = [0.0], []
    watching = Monitor(nvml=Nvml(celsius=85), on_alert=told.append, clock=lambda: now[0])
    watching.sample()
    watching._nvml = Nvml(["nvmlDeviceGetTemperature"])
    for now[0], hot in [(1, True), (SILENCE_S - 1, True), (SILENCE_S, False), (SILENCE_S + 1, False)]:
        watching.sample()
        assert watching.is_too_hot() is hot
        assert bool(watching.alerts()) is hot
    assert [alert.kind for alert in told] == ["temperature"] * 2
    assert "85 °C" in told[1].message
    assert "told no temperature for 60 s" in told[1].message


def test_a_driver_that_speaks_again_decides():
    now = [0.0]
    watching = Monitor(nvml=Nvml(celsius=85), clock=lambda: now[0])
    for now[0], nvml, hot in [
        (0, Nvml(celsius=85), True),
        (50, Nvml(["nvmlDeviceGetTemperature"]), True),
        (55, Nvml(celsius=78), True),  # not well below yet
        (110, Nvml(["nvmlDeviceGetTemperature"]), True),  # the minute counts from when it spoke last
        (112, Nvml(celsius=60), False),
        (113, Nvml(["nvmlDeviceGetTemperature"]), False),
    ]:
        watching._nvml = nvml
        watching.sample()
        assert watching.is_too_hot() is hot


def test_heat_alerts_and_ends_five_degrees_below():
    nvml = Nvml(celsius=79)
    watching = Monitor(nvml=nvml)
    for celsius, hot in [(79, False), (80, True), (76, True), (74, False), (79, False)]:
        nvml.celsius = celsius
        watching.sample()
        assert watching.is_too_hot() is hot, celsius
    assert "lower its power limit" in judge(sample(temperature_c=85), BUDGET, NONE)["temperature"].message


def test_limits_are_the_settings():
    lenient = BudgetSettings(memory_alert=0.99, temperature_c=90, swap_gib=100)
    full = sample(used=5800, temperature_c=85)
    assert [kind for kind, alert in judge(full, BUDGET, NONE).items() if alert] == ["memory", "temperature"]
    assert not any(judge(full, lenient, NONE).values())


def test_memory_reserved_on_purpose_is_no_alarm():
    assert judge(sample(used=5800), BUDGET, NONE)["memory"] is not None
    assert judge(sample(used=5800, idle_mib=2000), BUDGET, NONE)["memory"] is None


def test_swap_beyond_its_limit_alerts_until_a_tenth_below():
    def swap(gib, active=NONE):
        found = Sample(0.0, "cpu", "RAM", 1000, 100, swap_used_mib=gib * 1024)
        return judge(found, BUDGET, active)["swap"]

    assert swap(8.0) is None
    assert "8 GiB" in swap(8.1).message
    assert swap(7.5, frozenset({"swap"})) is not None
    assert swap(7.1, frozenset({"swap"})) is None


@pytest.mark.parametrize(
    ("owner", "remedy"),
    [
        ("base", "lower model.rung"),
        ("training", "training.batch_size"),
        ("kv_cache", "shorten the context"),
        (OTHERS, "close other programs"),
        ("something", "smaller model"),
    ],
)
def test_the_alert_names_who_holds_most_and_what_to_do(owner, remedy):
    message = judge(sample(used=5900, owners={owner: 4000.0, "little": 5.0}), BUDGET, NONE)["memory"].message
    assert remedy in message
    assert "4,000 MiB" in message
    assert "\n" not in message


# -- Prometheus ---------------------------------------------------------------------------------------------------


def test_prometheus_reads_every_metric(monkeypatch):
    from prometheus_client.parser import text_string_to_metric_families

    nvml = Nvml(used=int(5.9 * 2**30), processes={os.getpid(): 2**30})
    nvml.nvmlDeviceGetName = lambda handle: 'A "card"\\with\na name'
    watching = Monitor(nvml=nvml)
    watching.owners.register("base", Holding(1000))
    text = watching.prometheus()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation and family.type == "gauge" for family in families.values())
    assert families["agentlab_memory_total_bytes"].samples[0].value == 6 * 2**30
    assert families["agentlab_memory_total_bytes"].samples[0].labels["name"] == 'A "card"\\with\na name'
    owners = {found.labels["owner"]: found.value for found in families["agentlab_memory_owner_bytes"].samples}
    assert owners["base"] == 1000 * 2**20
    alerts = {found.labels["kind"]: found.value for found in families["agentlab_alert_active"].samples}
    assert alerts == {"memory": 1, "temperature": 0, "swap": 0}
    assert families["agentlab_temperature_celsius"].samples[0].value == 61


def test_what_is_not_reported_is_not_in_prometheus():
    silent = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature", "nvmlDeviceGetUtilizationRates")
    text = Monitor(nvml=Nvml(silent)).prometheus()
    for name in ("power", "temperature", "utilisation", "owner", "efficiency"):
        assert f"agentlab_{name}" not in text
        assert f"memory_{name}" not in text
    assert text.endswith("\n")
