"""Leases: one holder, named to the others, gone with its process."""

import errno
import os
import subprocess
import sys
import time

import pytest

from agentlab.errors import LeaseHeldError
from agentlab.hardware.lease import Lease, holder

_HOLD = """
import sys, time
from pathlib import Path
from agentlab.hardware.lease import Lease
Lease(Path(sys.argv[1]), "testing").acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_on_a_full_disk_it_is_held_although_nobody_can_read_by_whom(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    lease = Lease(tmp_path / "lease", "testing").acquire()
    assert holder(tmp_path / "lease")["purpose"] == "unknown"
    with pytest.raises(LeaseHeldError):
        Lease(tmp_path / "lease", "second").acquire()
    lease.release()
    assert holder(tmp_path / "lease") is None


def test_second_process_is_told_who_holds_it(tmp_path):
    path = tmp_path / "lease"
    process = hold(path)
    try:
        with pytest.raises(LeaseHeldError, match=rf"process {process.pid} holds it since .*testing"):
            Lease(path, "second").acquire()
        assert holder(path)["pid"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_kill_frees_it_at_once(tmp_path):
    path = tmp_path / "lease"
    process = hold(path)
    process.kill()
    process.wait()
    assert holder(path) is None
    with Lease(path, "next").acquire():
        assert holder(path)["pid"] == os.getpid()
    assert holder(path) is None


def test_waiting_outlasts_a_dying_holder(tmp_path):
    path = tmp_path / "lease"
    process = hold(path)
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    started = time.monotonic()
    Lease(path, "patient").acquire(wait_s=20).release()
    process.wait()
    assert time.monotonic() - started >= 0.3


def test_nobody_holds_what_does_not_exist(tmp_path):
    assert holder(tmp_path / "nothing") is None
