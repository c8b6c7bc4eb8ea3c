"""Memory and GPU readings, with and without a driver; the driver is a stand-in with NVML's own interface."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from nvml_standin import NotSupported, Nvml
from support import memory_hog

from agentlab.hardware import monitor


def test_without_a_driver_there_are_zeros_and_no_gpus(monkeypatch):
    monkeypatch.setattr(monitor, "_nvml", lambda: None)
    stats = monitor.memory_stats()
    assert (stats.gpu_total, stats.gpu_used, stats.gpu_free) == (0, 0, 0)
    assert monitor.gpus() == []


def test_ram_is_the_machines_and_adds_up():
    stats = monitor.memory_stats()
    assert stats.cpu_total == pytest.approx(psutil.virtual_memory().total / 2**20)
    assert stats.cpu_used + stats.cpu_free == pytest.approx(stats.cpu_total)
    assert 0 < stats.cpu_used < stats.cpu_total
    assert abs(stats.timestamp - time.time()) < 5


def test_the_ram_of_what_this_process_has_started_counts_once():
    own = monitor.process_ram_mb()
    with memory_hog(200) as process:
        # what it shares with this process, such as its libraries, is not counted again
        assert monitor.family_ram_mb() - own == pytest.approx(200, abs=50)
        process.kill()
    process.wait()
    assert monitor.family_ram_mb() == pytest.approx(monitor.process_ram_mb(), abs=50)


def test_all_gpus_are_read_and_summed(monkeypatch):
    monkeypatch.setattr(monitor, "_nvml", Nvml)
    first, second = monitor.gpus()
    assert first == monitor.Gpu("Card A", 6144, 1024, 5120, 37, 61, 45.5, (8, 9))
    assert second.name == "Card B"
    stats = monitor.memory_stats()
    assert (stats.gpu_total, stats.gpu_used, stats.gpu_free) == (12288, 2048, 10240)


def test_what_the_driver_does_not_report_is_none(monkeypatch):
    silent = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature", "nvmlDeviceGetUtilizationRates")
    monkeypatch.setattr(monitor, "_nvml", lambda: Nvml(silent))
    card = monitor.gpus()[0]
    assert (card.power_w, card.temperature_c, card.utilisation_percent) == (None, None, None)
    assert card.memory_total_mb == 6144


@pytest.mark.parametrize("silent", ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"])
def test_a_broken_driver_never_raises(monkeypatch, silent):
    monkeypatch.setattr(monitor, "_nvml", lambda: Nvml([silent]))
    assert monitor.memory_stats().gpu_total == 0


def test_a_driver_that_does_not_start_is_no_driver(monkeypatch):
    import pynvml

    def broken():
        raise NotSupported

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    monitor._nvml.cache_clear()
    assert monitor.gpus() == []
    monitor._nvml.cache_clear()


def test_monitoring_is_cheap_enough_for_every_answer():
    monitor.memory_stats()
    began = time.perf_counter()
    for _ in range(20):
        monitor.memory_stats()
    assert (time.perf_counter() - began) / 20 < 1


def test_the_accelerator_is_where_torch_will_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # nobody has imported it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(monitor, "torch_cuda", lambda: (13, 0))
    monkeypatch.setattr(monitor, "_nvml", lambda: None)
    assert monitor.accelerator() == "cpu"
    monkeypatch.setattr(monitor, "_nvml", Nvml)
    assert monitor.accelerator() == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert monitor.accelerator() == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(monitor, "_nvml", lambda: Nvml(cuda=12080))  # torch cannot run on it
    assert monitor.accelerator() == "cpu"
    monkeypatch.setattr(monitor, "_nvml", lambda: Nvml(["nvmlSystemGetCudaDriverVersion_v2"]))  # it might
    assert monitor.accelerator() == "cuda"
    monkeypatch.setattr(monitor, "torch_cuda", lambda: None)
    assert monitor.accelerator() == "cpu"


def test_torch_itself_is_asked_where_it_is_imported(monkeypatch):
    def torch(*answers):
        answers = iter(answers)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=answers.__next__)))

    monkeypatch.setattr(monitor, "_nvml", lambda: None)  # as for a card that NVML does not show
    torch(True)
    assert monitor.accelerator() == "cuda"
    monkeypatch.setattr(monitor, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    torch(False)
    assert monitor.accelerator() == "cpu"
    monkeypatch.setattr(monitor, "torch_cuda", lambda: (13, 0))
    torch()  # another thread imports it just now, so that it fails
    assert monitor.accelerator() == "cuda"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["Card B"]), ("1,0", ["Card B", "Card A"]), (" 0 , 7, 1", ["Card A"]), ("GPU-b", ["Card B"]),
        ("GPU-b7c1,0", ["Card B", "Card A"]), ("GPU-", []), ("GPU-c,0", []), ("MIG-GPU-a/1/0", []),
        ("MIG-7c1", ["Card A"]), ("MIG-7c", []),
        ("", ["Card A", "Card B"]), ("-1", ["Card A", "Card B"]),
    ],
)  # fmt: skip
def test_the_cards_are_those_that_programs_may_see_in_their_order(visible, names, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in monitor.gpus(Nvml())] == names
    # what is measured as this process's own is measured on the same card
    held = {os.getpid(): 700 * 2**20}
    own = [monitor.process_vram_mb(index, Nvml(processes=held)) for index in range(3)]
    assert own == [700.0] * len(names) + [None] * (3 - len(names))


def test_a_processs_own_memory_is_the_drivers_or_not_reported():
    assert monitor.process_vram_mb(0, Nvml(processes={os.getpid(): 700 * 2**20, 1: 2**30})) == 700
    assert monitor.process_vram_mb(0, Nvml(processes={os.getpid(): None})) is None
    with subprocess.Popen(["sleep", "60"]) as child:  # an engine in a process of its own is no stranger
        held = {os.getpid(): 700 * 2**20, child.pid: 300 * 2**20, 1: 2**30}
        assert monitor.process_vram_mb(0, Nvml(processes=held)) == 1000
        child.kill()
    assert monitor.process_vram_mb(0, Nvml()) is None
    assert monitor.process_vram_mb(0, Nvml(["nvmlDeviceGetComputeRunningProcesses"])) is None


def test_a_process_that_holds_nothing_beside_others_that_do_is_told_so():
    assert monitor.process_vram_mb(0, Nvml(processes={os.getppid(): 2**30})) == 0
    assert monitor.process_vram_mb(0, Nvml(processes={os.getppid(): None})) is None
    # ids of another namespace, as in a container: this process may be among them under another one
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert monitor.process_vram_mb(0, Nvml(processes={os.getppid(): 2**30, gone.pid: 2**30})) is None


def test_what_is_free_of_the_first_card():
    assert monitor.free_gib(Nvml(used=2 * 2**30)) == 4.0
    assert monitor.free_gib(Nvml(["nvmlDeviceGetMemoryInfo"])) == float("inf")


def test_a_driver_runs_every_cuda_of_its_own_major_version():
    known = [monitor.runs_cuda(driver, (13, 0)) for driver in ((12, 8), (13, 0), (14, 1), None)]
    assert known == [False, True, True, None]
    assert monitor.runs_cuda((12, 8), None) is None
