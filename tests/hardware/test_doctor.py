"""Doctor: every check's every verdict, from facts that are made up, and once on this machine."""

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from nvml_standin import Nvml

from agentlab.cli import main
from agentlab.cli.doctor import facts as facts_of
from agentlab.hardware import compiler, doctor
from agentlab.hardware.monitor import Gpu, driver_cuda, driver_version, torch_cuda

CARD = Gpu("Card", 6144.0, 300.0, 5800.0)
WINDOWS = Path("/", "mnt", "c", "project")
GOOD = doctor.Facts(
    gpus=[CARD], driver="580.95", driver_cuda=(13, 2), torch="2.13.0", torch_cuda=(13, 0), vllm="cuda",
    compiler_missing="", packages={"torch": ("2.13.0", "==2.13.0", True)},
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
        (doctor.check_driver, {"torch_cuda": None}, "warn", "make install EXTRA=gpu"),
        (doctor.check_driver, {"torch": None}, "warn", "make install EXTRA=gpu"),
        (doctor.check_driver, {"driver_cuda": (12, 8)}, "warn", "up to 12.8, torch is built for 13.0"),
        (doctor.check_driver, {"driver_cuda": (12, 8), "wsl2": True}, "warn", "update NVIDIA's driver in Windows"),
        (doctor.check_driver, {"driver_cuda": None}, "ok", "580.95"),
        (doctor.check_compiler, {"compiler_missing": "Python.h"}, "fail", "Python.h is missing"),
        (doctor.check_vllm, {"vllm": None}, "ok", "transformers answers"),
        (doctor.check_vllm, {"vllm": "cpu"}, "warn", "make install EXTRA=gpu"),
        (doctor.check_vllm, {"vllm": "cpu", "gpus": []}, "ok", "built for the CPU"),
        (doctor.check_vllm, {"gpus": []}, "warn", "make install EXTRA=cpu"),
        (doctor.check_driver, {"gpus": [Gpu("Card")], "driver": None}, "ok", "not reported"),
        (doctor.check_versions, {"packages": {"trl": ("2.0", "<1.17", False)}}, "fail", "trl 2.0 (allowed: <1.17)"),
        (doctor.check_versions, {"packages": {"trl": (None, "", False)}}, "fail", "trl missing (allowed: any)"),
        (doctor.check_versions, {"packages": {}}, "warn", "make install"),
        (doctor.check_disk, {"disk_free_gib": {Path("/a"): 50.0, Path("/b"): 1.0}}, "fail", "1.0 GiB free at /b"),
        (doctor.check_disk, {"disk_free_gib": {Path("/a"): 10.0}}, "warn", "hub"),
        (doctor.check_disk, {"disk_free_gib": {}}, "warn", "not reported"),
        (doctor.check_disk, {"unusable": {Path("/a"): "/a is no folder"}}, "fail", "/a cannot be written to: /a is no"),
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


def test_a_card_with_less_than_the_least_budget_is_not_told_to_set_one():
    _, found = doctor.check_memory(dataclasses.replace(GOOD, gpus=[Gpu("Card", 6144.0, 5850.0, 294.0)]))
    assert (found.status, found.remedy) == ("warn", "close programs that use the card")


def test_swap_that_nobody_can_read_is_left_out():
    found, _ = doctor.check_memory(dataclasses.replace(GOOD, swap_total_mb=None))
    assert (found.status, found.text) == ("ok", "20.0 of 32.0 GiB of RAM free")


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


def test_nobody_without_a_gpu_needs_a_compiler():
    assert doctor.check_compiler(GOOD) == []
    for useless in ({"gpus": []}, {"driver_cuda": (12, 8)}, {"torch_cuda": None}):
        assert doctor.check_compiler(dataclasses.replace(GOOD, compiler_missing="Python.h", **useless)) == []
        assert doctor.check_vllm(dataclasses.replace(GOOD, vllm="cpu", **useless))[0].status == "ok"
        assert doctor.check_vllm(dataclasses.replace(GOOD, vllm="cuda", **useless))[0].status == "warn"


def test_a_compiler_and_pythons_headers_are_looked_for_where_triton_does(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name == "clang" else None)
    monkeypatch.delenv("CC", raising=False)
    assert compiler.missing() == f"Python's C headers ({tmp_path / 'Python.h'})"
    (tmp_path / "Python.h").touch()
    assert compiler.missing() == ""
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert "a C compiler" in compiler.missing()
    monkeypatch.setenv("CC", "tcc")
    assert compiler.missing() == ""


def test_the_cuda_of_driver_and_torch():
    assert driver_cuda(Nvml(cuda=12080)) == (12, 8)
    assert driver_cuda(Nvml(["nvmlSystemGetCudaDriverVersion_v2"])) is None
    built = None if torch.version.cuda is None else tuple(map(int, torch.version.cuda.split(".")[:2]))
    assert torch_cuda() == built


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


@pytest.mark.parametrize("word", ["python", "python3", f"python3.{sys.version_info.minor}"])
def test_the_kernels_python_is_the_one_that_jupyter_starts_for_that_word(word, tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = [word, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "p", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no python there
    (found,) = doctor.check_kernel(facts_of(tmp_path))
    assert (found.status, found.text) == ("ok", f"python3 starts {sys.executable}")


def test_a_kernel_whose_program_is_not_there_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = [str(tmp_path / "gone"), "-m", "ipykernel_launcher"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "p", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (found,) = doctor.check_kernel(facts_of(tmp_path))
    assert (found.status, found.text) == ("fail", f"kernel python3 starts {tmp_path / 'gone'}, which does not exist")


@pytest.mark.parametrize("home", ["file/home", "file"])
def test_a_home_that_cannot_be_used_fails(home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / home))
    found = facts_of(tmp_path)
    (text,) = found.unusable.values()
    assert text.endswith("is no folder")
    assert doctor.exit_code(doctor.check_disk(found)) == 1


def test_a_home_or_project_that_may_not_be_written_to_fails(tmp_path, monkeypatch):
    home, project = tmp_path / "home", tmp_path / "project"
    for folder in (home, project):
        folder.mkdir()
    monkeypatch.setenv("AGENTLAB_HOME", str(home))
    monkeypatch.setattr("agentlab.files.os.access", lambda path, mode: False)
    found = facts_of(project)
    assert list(found.unusable) == [home, project]
    assert [finding.status for finding in doctor.check_disk(found)] == ["fail", "fail"]


def test_a_store_in_whose_place_a_file_lies_fails(tmp_path):
    (tmp_path / "mlruns").write_text("")
    (found,) = doctor.check_store(facts_of(tmp_path))
    assert found.status == "fail"
    assert f"{tmp_path / 'mlruns'} is no folder" in found.text


def test_what_may_not_be_looked_at_is_a_finding_and_no_traceback(tmp_path, monkeypatch):
    """As in a folder that the user may not enter, and where /proc is hidden; the tests may be run by root."""
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / "secret" / "home"))
    stat = os.stat

    def barred(path, *args, **options):
        if "secret/" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *args, **options)

    def hidden():
        raise RuntimeError("/proc is hidden")

    (tmp_path / "secret").mkdir()
    found = facts_of(tmp_path)  # imports what it needs
    monkeypatch.setattr("os.stat", barred)
    monkeypatch.setattr("os.lstat", barred)
    monkeypatch.setattr("psutil.swap_memory", hidden)
    monkeypatch.setattr("agentlab.files.os.access", lambda path, mode: "secret" not in str(path))
    found = facts_of(tmp_path)
    assert found.unusable == {tmp_path / "secret" / "home": f"no permission to write in {tmp_path / 'secret'}"}
    assert (found.swap_total_mb, found.models, found.holder) == (None, [], None)
    assert doctor.exit_code(doctor.diagnose(found)) == 1


def test_the_command_prints_a_line_each_and_says_how_it_went(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for facts, code in ((GOOD, 0), (dataclasses.replace(GOOD, kernel=None), 1)):
        monkeypatch.setattr("agentlab.cli.doctor.facts", lambda root, facts=facts: facts)
        result = CliRunner().invoke(main, ["doctor"])
        assert result.exit_code == code
        assert len(result.output.splitlines()) == len(doctor.diagnose(facts))
        values = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
        assert [value["status"] for value in values].count("fail") == code
