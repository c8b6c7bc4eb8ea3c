"""Atomic writing: a reader sees the old content or the new, and a full disk loses nothing."""

import json
import resource
import signal
import subprocess
import sys

import pytest

from agentlab import files
from agentlab.errors import StorageError


def test_write_and_read_back(tmp_path):
    path = tmp_path / "deep" / "value.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_nan_is_refused_and_the_old_content_stays(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == 1


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "value.json"
    path.write_text('{"a": ')
    with pytest.raises(StorageError, match=r"value\.json is damaged"):
        files.read_json(path)


_FILL = """
import resource, signal, sys
from pathlib import Path
from agentlab import files
from agentlab.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes(Path(sys.argv[1]), b"x" * 5000)
except StorageError as error:
    print(error)
"""


def test_interrupted_write_keeps_the_old_content_and_no_leftovers(tmp_path):
    path = tmp_path / "value.bin"
    files.write_bytes(path, b"old")
    done = subprocess.run([sys.executable, "-c", _FILL, str(path)], capture_output=True, text=True)
    assert "a file of that size is more than the file system or `ulimit -f` allows" in done.stdout, done
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["value.bin"]
    assert resource.RLIMIT_FSIZE is not None
    assert signal.SIGXFSZ


def test_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*: the disk is full"), files.disk_errors(tmp_path / "x"):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))


def test_digest_does_not_depend_on_key_order():
    one = files.canonical_digest(json.loads('{"a": 1, "b": [2, 3]}'))
    assert one == files.canonical_digest(json.loads('{"b": [2, 3], "a": 1}'))
    assert one != files.canonical_digest({"a": 1, "b": [3, 2]})
