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


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/value.json", "cannot make the folder {0}/file: {0}/file is no folder"),
        ("file/deep/value.json", "cannot make the folder {0}/file/deep: {0}/file is no folder"),
        ("nowhere/value.json", "cannot make the folder {0}/nowhere: {0}/nowhere is no folder"),
        ("loop/value.json", "{0}/loop is no folder"),
        ("y" * 300, "File name too long"),
        ("y" * 300 + "/value.json", "cannot make the folder {0}/yyy"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path, place, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError, match="choose another folder") as caught:
        files.write_bytes(tmp_path / place, b"x")
    assert f"cannot write {tmp_path / place}: " in str(caught.value)
    assert words.format(tmp_path) in str(caught.value)
    assert "free space" not in str(caught.value)


def test_what_else_is_missing_is_no_error_of_the_place(tmp_path):
    for missing in (tmp_path / "source.bin", tmp_path / "b" / "x"):
        with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path / "a" / "target"):
            missing.read_bytes()


def test_whether_a_folder_can_be_written_to_is_known_before_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert files.obstacle(tmp_path) == files.obstacle(tmp_path / "new" / "deep") == ""
    for name in ("file", "nowhere"):
        assert files.obstacle(tmp_path / name / "home") == f"{tmp_path / name} is no folder"
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    assert files.obstacle(tmp_path / "new") == f"no permission to write in {tmp_path}"


def test_digest_does_not_depend_on_key_order():
    one = files.canonical_digest(json.loads('{"a": 1, "b": [2, 3]}'))
    assert one == files.canonical_digest(json.loads('{"b": [2, 3], "a": 1}'))
    assert one != files.canonical_digest({"a": 1, "b": [3, 2]})
