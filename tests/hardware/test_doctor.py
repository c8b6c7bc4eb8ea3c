"""Doctor: every check's every verdict, from facts that are made up, and once on this machine."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from nvml_standin import Nvml

from agentlab.cli import main
from agentlab.cli.doctor import facts as facts_of
from agentlab.hardware import doctor
from agentlab.hardware.monitor import Gpu, driver_version

CARD = Gpu("Card", 6144.0, 300.0, 5800.0)
WINDOWS = Path("/", "mnt", "c", "project")
GOOD = doctor.Facts(
    gpus=[CARD], driver="580.95", torch="2.13.0", packages={"torch": ("2.13.0", "==2.13.0", True)},
    ram_total_mb=32 * 1024, ram_free_mb=20 * 1024, swap_total_mb=8 * 1024, disk_free_gib={Path("/home"): 100.0},
    models=["smollm2-135m-instruct"], embedded_model=None, store=Path("/project/mlruns/mlflow.db"), store_problem=None,
    kernel="/venv/bin/python", kernel_exists=True, python="/venv/bin/python", wsl2=False,
)  # fmt: skip


def one(check, **changes):
    (found,) = check(dataclasses.replace(GOOD, **changes))
    return found


def test_a_good_machine_is_all_ok():
    findings = doctor.diagnose(GOOD)
    assert {finding.status for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)
    assert doctor.exit_code(findings) == 0


@pytest.mark.parametrize(
    ("check", "changes", "status", "words"),
    [
        (doctor.check_driver, {"gpus": [], "driver": None}, "ok", "CPU"),
        (doctor.check_driver, {"gpus": [], "wsl2": True}, "warn", "in Windows"),
        (doctor.check_driver, {"torch": "2.13.0+cpu"}, "warn", "make install EXTRA=gpu"),
        (doctor.check_driver, {"torch": None}, "warn", "make install EXTRA=gpu"),
        (doctor.check_driver, {"gpus": [Gpu("Card")], "driver": None}, "ok", "not reported"),
        (doctor.check_versions, {"packages": {"trl": ("2.0", "<1.17", False)}}, "fail", "trl 2.0 (allowed: <1.17)"),
        (doctor.check_versions, {"packages": {"trl": (None, "", False)}}, "fail", "trl missing (allowed: any)"),
        (doctor.check_versions, {"packages": {}}, "warn", "make install"),
        (doctor.check_disk, {"disk_free_gib": {Path("/a"): 50.0, Path("/b"): 1.0}}, "fail", "1.0 GiB free at /b"),
        (doctor.check_disk, {"disk_free_gib": {Path("/a"): 10.0}}, "warn", "hub"),
        (doctor.check_disk, {"disk_free_gib": {}}, "warn", "not reported"),
        (doctor.check_models, {"embedded_model": "it is not installed"}, "fail", "make install"),
        (doctor.check_models, {"models": []}, "warn", "agentlab models prepare"),
        (doctor.check_store, {"store_problem": "cannot use the store"}, "fail", "cannot use the store"),
        (doctor.check_kernel, {"kernel": None}, "fail", "ipykernel install"),
        (doctor.check_kernel, {"kernel_exists": False}, "fail", "does not exist"),
        (doctor.check_kernel, {"kernel": "/other/python"}, "warn", "/other/python"),
        (doctor.check_kernel, {"kernel": "python"}, "ok", "starts python"),
        (doctor.check_lease, {"holder": {"pid": 7, "purpose": "evolving x"}}, "ok", "process 7 has it (evolving x)"),
    ],
)
def test_each_verdict_and_its_remedy(check, changes, status, words):
    found = one(check, **changes)
    assert found.status == status
    assert words in f"{found.text} {found.remedy}"
    assert bool(found.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"ram_total_mb": 4 * 1024, "ram_free_mb": 3 * 1024}, "warn", "embedded model"),
        ({"ram_total_mb": 4 * 1024, "ram_free_mb": 3 * 1024, "wsl2": True}, "warn", ".wslconfig"),
        ({"ram_free_mb": 3 * 1024}, "warn", "close other programs"),
    ],
)
def test_verdicts_on_ram(changes, status, words):
    found = one(doctor.check_memory, gpus=[], **changes)
    assert (found.name, found.status) == ("memory", status)
    assert words in found.remedy


def test_verdicts_on_the_cards_memory():
    _, enough = doctor.check_memory(GOOD)
    _, little = doctor.check_memory(dataclasses.replace(GOOD, gpus=[Gpu("Card", 6144.0, 2144.0, 4000.0)]))
    _, silent = doctor.check_memory(dataclasses.replace(GOOD, gpus=[Gpu("Card")]))
    assert enough.status == "ok"
    assert little.status == "warn"
    assert "budget.vram_gib to 3.8" in little.remedy
    assert (silent.status, silent.text) == ("warn", "not reported by the driver")


def test_the_traps_of_wsl2_are_named_only_there():
    assert doctor.check_wsl2(GOOD) == []
    inside = dataclasses.replace(GOOD, wsl2=True)
    names = [finding.name for finding in doctor.check_wsl2(inside)]
    assert names == ["WSL2 RAM", "WSL2 spill", "WSL2 pinned memory"]
    assert [finding.name for finding in doctor.check_wsl2(dataclasses.replace(inside, gpus=[]))] == ["WSL2 RAM"]
    assert doctor.exit_code(doctor.diagnose(inside)) == 0
    on_windows = dataclasses.replace(inside, store=WINDOWS / "mlruns" / "mlflow.db")
    assert "WSL2 disk" in [finding.name for finding in doctor.check_wsl2(on_windows)]
    assert doctor.exit_code(doctor.diagnose(on_windows)) == 1


@pytest.mark.parametrize(
    ("path", "windows"),
    [(WINDOWS, True), (Path("/", "mnt", "data"), False), (Path("/", "home", "c"), False), (Path("/"), False)],
)
def test_windows_drives(path, windows):
    assert doctor.is_windows_drive(path) is windows


def test_the_drivers_version():
    assert driver_version(Nvml()) == "580.95"
    assert driver_version(Nvml(["nvmlSystemGetDriverVersion"])) is None
    nvml = Nvml()
    nvml.nvmlSystemGetDriverVersion = lambda: b"470.1"
    assert driver_version(nvml) == "470.1"


def test_the_facts_of_this_machine(tmp_path, embedded):
    found = facts_of(tmp_path)
    assert found.ram_total_mb > found.ram_free_mb > 0
    assert all(free > 0 for free in found.disk_free_gib.values())
    assert found.embedded_model is None
    assert "smollm2-135m-instruct" in found.models
    assert found.packages["torch"][0] == found.torch
    assert found.kernel_exists
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("this is no database, whatever its name says")
    assert "not a database" in facts_of(tmp_path).store_problem


def test_the_command_prints_a_line_each_and_says_how_it_went(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for facts, code in ((GOOD, 0), (dataclasses.replace(GOOD, kernel=None), 1)):
        monkeypatch.setattr("agentlab.cli.doctor.facts", lambda root, facts=facts: facts)
        result = CliRunner().invoke(main, ["doctor"])
        assert result.exit_code == code
        assert len(result.output.splitlines()) == len(doctor.diagnose(facts))
        values = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
        assert [value["status"] for value in values].count("fail") == code
