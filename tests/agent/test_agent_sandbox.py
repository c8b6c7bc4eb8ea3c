"""Attacks on the sandbox, each with and without the audit hook: what the kernel denies must hold on its own."""
# ruff: noqa: E501 - an attack reads best in one line

import os
import re
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from agentlab.agent.tools import sandbox
from agentlab.agent.tools.sandbox import Limits, run_python
from agentlab.agent.tools.sandbox_kernel import ARCHITECTURES, DENIED, JUDGED, filter_program

pytestmark = pytest.mark.skipif(
    sandbox.unavailable() is not None,
    reason="without Landlock in the kernel the python tool refuses to run, which test_agent_builtin covers",
)
SECRET = "a-secret-that-must-not-leak"


def attempt(attack, *, audit, limits=Limits(timeout_s=20)):  # noqa: B008
    """Run one line of attack that prints ESCAPED and what it got, if it gets anything."""
    body = "\n".join("    " + line for line in attack.splitlines())
    code = f"try:\n{body}\nexcept BaseException as error:\n    print('HELD', type(error).__name__, error)"
    text, _ = run_python(code, limits=limits, audit=audit)
    return text


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "dir").mkdir()
    return folder


def file_attacks(path):
    module = Path(sandbox.__file__)
    return {
        "passwd": "print('ESCAPED', open('/etc/passwd').read())",
        "project": f"print('ESCAPED', open({str(module)!r}).read())",
        "worker": f"print('ESCAPED', open({str(module.with_name('sandbox_worker.py'))!r}).read())",
        "site-packages": "import jsonschema; print('ESCAPED')",
        "site-packages listed": f"import os; print('ESCAPED', os.listdir({str(Path(pytest.__file__).parent.parent)!r}))",
        "stdlib listed": "import os; print('ESCAPED', os.listdir(os.path.dirname(os.__file__)))",
        "home": "import os; print('ESCAPED', os.listdir(os.path.expanduser('~root/.ssh')))",
        "home by path": f"import os; print('ESCAPED', os.listdir({str(Path.home())!r}))",
        "list root": "import os; print('ESCAPED', os.listdir('/'))",
        "scan root": "import os; print('ESCAPED', [e.name for e in os.scandir('/')])",
        "glob root": "import glob\nfound = glob.glob('/*/*')\nassert found, 'nothing'\nprint('ESCAPED', found)",
        "fchdir": "import os\nfd = os.open('/', os.O_PATH)\nos.fchdir(fd)\nprint('ESCAPED', os.listdir('.'))",
        "dir_fd": "import os\nfd = os.open('/etc', os.O_PATH)\nprint('ESCAPED', os.open('passwd', os.O_RDONLY, dir_fd=fd))",
        "secret": f"print('ESCAPED', open({str(path / 'secret.txt')!r}).read())",
        "os.open": f"import os; print('ESCAPED', os.read(os.open({str(path / 'secret.txt')!r}, 0), 99))",
        "io.FileIO": f"import io; print('ESCAPED', io.FileIO({str(path / 'secret.txt')!r}).read())",
        "bytes path": f"print('ESCAPED', open({str(path / 'secret.txt').encode()!r}).read())",
        "mmap": f"import mmap,os; print('ESCAPED', mmap.mmap(os.open({str(path / 'secret.txt')!r}, 0), 0, prot=1)[:])",
        "dots": f"print('ESCAPED', open('../' * 20 + {str(path / 'secret.txt').lstrip('/')!r}).read())",
        "symlink": f"import os; os.symlink({str(path / 'secret.txt')!r}, 'x'); print('ESCAPED', open('x').read())",
        "symlinked folder": f"import os; os.symlink({str(path)!r}, 'd'); print('ESCAPED', os.listdir('d'))",
        "hard link": f"import os; os.link({str(path / 'secret.txt')!r}, 'x'); print('ESCAPED', open('x').read())",
        "rename in": f"import os; os.rename({str(path / 'secret.txt')!r}, 'x'); print('ESCAPED')",
        "rename out": f"import os; open('x', 'w').close(); os.rename('x', {str(path / 'x')!r}); print('ESCAPED')",
        "write": f"open({str(path / 'new')!r}, 'w').write('x'); print('ESCAPED')",
        "append": f"open({str(path / 'secret.txt')!r}, 'a').write('x'); print('ESCAPED')",
        "truncate": f"import os; os.truncate({str(path / 'secret.txt')!r}, 0); print('ESCAPED')",
        "remove": f"import os; os.remove({str(path / 'secret.txt')!r}); print('ESCAPED')",
        "rmdir": f"import os; os.rmdir({str(path / 'dir')!r}); print('ESCAPED')",
        "mkdir": f"import os; os.mkdir({str(path / 'made')!r}); print('ESCAPED')",
        "chmod": f"import os; os.chmod({str(path / 'secret.txt')!r}, 0o777); print('ESCAPED')",
        "chown": f"import os; os.chown({str(path / 'secret.txt')!r}, os.getuid(), os.getgid()); print('ESCAPED')",
        "utime": f"import os; os.utime({str(path / 'secret.txt')!r}, (1, 1)); print('ESCAPED')",
        "setxattr": f"import os; os.setxattr({str(path / 'secret.txt')!r}, 'user.x', b'1'); print('ESCAPED')",
        "chmod stdlib": "import os; os.fchmod(os.open(os.__file__, 0), 0o777); print('ESCAPED')",
        "write stdlib": "import os; open(os.__file__, 'a'); print('ESCAPED')",
        "sqlite": f"import sqlite3; print('ESCAPED', sqlite3.connect({str(path / 'db')!r}).execute('create table t(x)'))",
        "tmp": "open('/tmp/agentlab-escape', 'w'); print('ESCAPED')",
        "shm": "open('/dev/shm/agentlab-escape', 'w'); print('ESCAPED')",
        "own memory": "open('/proc/self/mem', 'r+b'); print('ESCAPED')",
        "own environment": "print('ESCAPED', open('/proc/self/environ').read())",
        "parent": "import os; print('ESCAPED', open(f'/proc/{os.getppid()}/environ').read())",
        "parent memory": "import os; open(f'/proc/{os.getppid()}/mem', 'rb'); print('ESCAPED')",
        "parent's files": "import os; print('ESCAPED', os.listdir(f'/proc/{os.getppid()}/fd'))",
        "processes": "import os; print('ESCAPED', os.listdir('/proc'))",
        "mkfifo": "import os; os.mkfifo('x'); print('ESCAPED')",
        "device": "import os; os.mknod('x', 0o20666, os.makedev(1, 1)); print('ESCAPED')",
    }


CALLS = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', {port}), 3); print('ESCAPED')",
    "tcp by _socket": "import _socket; _socket.socket().connect(('127.0.0.1', {port})); print('ESCAPED')",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0)); print('ESCAPED')",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})); print('ESCAPED')",
    "ipv6": "import socket; socket.socket(socket.AF_INET6); print('ESCAPED')",
    "raw": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "abstract unix": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}'); print('ESCAPED')",
    "datagram pair": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "a.sendto(b'x', '\\0{name}')\nprint('ESCAPED')",
    "urllib": "import urllib.request; print('ESCAPED', urllib.request.urlopen('http://127.0.0.1:{port}', timeout=3))",
    "dns": "import socket; print('ESCAPED', socket.getaddrinfo('example.org', 80))",
    "subprocess": "import subprocess; print('ESCAPED', subprocess.check_output(['/bin/ls', '/']))",
    "os.system": "import os; code = os.system('true'); assert code == 0, code; print('ESCAPED')",
    "fork": "import os; os.fork(); print('ESCAPED')",
    "forkpty": "import os; os.forkpty(); print('ESCAPED')",
    "exec": "import os; os.execv('/bin/echo', ['echo', 'ESCAPED'])",
    "exec interpreter": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])",
    "posix_spawn": "import os; print('ESCAPED', os.posix_spawn('/bin/ls', ['ls'], {{}}))",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process(target=print, args=('ESCAPED',)).start()",
    "_posixsubprocess": "import _posixsubprocess, os, sys\nr, w = os.pipe()\n"
    "args = [[b'/bin/ls'], [b'/bin/ls'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, True, False, -1,"
    " None, None, None, -1, None]\nif sys.version_info < (3, 14): args.append(False)\n"
    "pid = _posixsubprocess.fork_exec(*args)\nassert pid > 0\nprint('ESCAPED', pid)",
    "kill parent": "import os; os.kill(os.getppid(), 0); print('ESCAPED')",
    "kill group": "import os; os.killpg(os.getpgid(os.getppid()), 0); print('ESCAPED')",
    "kill init": "import os; os.kill(1, 0); print('ESCAPED')",
    "pidfd": "import os; os.pidfd_open(os.getppid()); print('ESCAPED')",
    "parent's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9)); print('ESCAPED')",
    "raise limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1)); print('ESCAPED')",
    "affinity": "import os; os.sched_setaffinity(os.getppid(), {{0}}); print('ESCAPED')",
    "nice parent": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19); print('ESCAPED')",
    "setsid": "import os; os.setsid(); print('ESCAPED')",
    "memfd": "import os; os.memfd_create('x'); print('ESCAPED')",
    "shared memory": "from multiprocessing import shared_memory as s; s.SharedMemory('x', True, 99); print('ESCAPED')",
    "chroot": "import os; os.chroot('.'); print('ESCAPED')",
    "setuid": "import os\nif os.getuid() == 0:\n    os.setuid(65534)\n    print('ESCAPED')",
}


@pytest.fixture(scope="module")
def server():
    """A listening TCP port and an abstract unix name that take everybody."""
    name = f"agentlab-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        yield {"port": tcp.getsockname()[1], "name": name}


AUDIT = pytest.mark.parametrize("audit", [True, False], ids=["both", "kernel-alone"])


@AUDIT
@pytest.mark.parametrize("name", file_attacks(Path("/x")))
def test_files_outside_are_out_of_reach(outside, name, audit):
    text = attempt(file_attacks(outside)[name], audit=audit)
    assert "ESCAPED" not in text, text
    assert "HELD" in text
    assert (outside / "secret.txt").read_text() == SECRET
    assert sorted(path.name for path in outside.iterdir()) == ["dir", "secret.txt"]


@AUDIT
@pytest.mark.parametrize("name", CALLS)
def test_network_and_processes_are_out_of_reach(server, name, audit):
    attack = CALLS[name].format(**server)
    text = attempt(attack, audit=audit)
    assert "ESCAPED" not in text, text


SYSCALLS = {
    "execve": "libc.execve(b'/bin/echo', (ctypes.c_char_p * 3)(b'echo', b'ESCAPED', None), None)",
    "fork": "libc.fork()",
    "socket": "libc.socket(2, 1, 0)",
    "ptrace": "libc.ptrace(16, os.getppid(), 0, 0)",
    "keyctl": "libc.syscall({keyctl}, 0, -3, 0)",
    "io_uring": "libc.syscall(425, 8, ctypes.create_string_buffer(256))",
    "bpf": "libc.syscall({bpf}, 0, ctypes.create_string_buffer(128), 128)",
    "mount": "libc.mount(b'none', b'.', b'tmpfs', 0, None)",
    "unshare": "libc.unshare(0x10000000)",
    "clone with a namespace": "libc.syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0)",
    "clone3": "libc.syscall(435, ctypes.create_string_buffer(88), 88)",
    "process_vm_readv": "libc.syscall({process_vm_readv}, os.getppid(), 0, 0, 0, 0, 0)",
    "kill": "libc.kill(os.getppid(), 0)",
    "sigqueue": "libc.sigqueue(os.getppid(), 0, 0)",
    "tgkill": "libc.syscall({tgkill}, os.getppid(), os.getppid(), 0)",
    "undo die with parent": "libc.prctl(1, 0, 0, 0, 0)",
    "shmget": "libc.shmget(0, 4096, 0o1600)",
}


@pytest.mark.parametrize("name", SYSCALLS)
def test_raw_system_calls_are_denied(name):
    column = ARCHITECTURES[os.uname().machine][1]
    numbers = {call: row[column] for call, row in (DENIED | JUDGED).items()}
    attack = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"result = {SYSCALLS[name].format(**numbers)}\nprint('got', result, ctypes.get_errno())"
    )
    text = attempt(attack, audit=False)
    assert re.fullmatch(r"got -1 (1|38)", text), text  # EPERM; clone3: ENOSYS


@pytest.mark.parametrize("module", ["ctypes", "_ctypes", "ctypes.util"])
def test_ctypes_is_not_there(module):
    assert f"{module} is not allowed" in attempt(f"import {module}; print('ESCAPED')", audit=True)


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    assert run_python("import os; dict(os.environ)") == ("{}", None)


def test_no_descriptor_is_inherited(outside):
    with (outside / "secret.txt").open() as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\nfound = []\nfor fd in range(60):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
        assert run_python(code + "    except OSError:\n        pass\nfound") == ("[0, 1, 2]", None)


def test_input_ends_at_once():
    text, problem = run_python("input()")
    assert problem == "error"
    assert "EOFError" in text


# -- too much ---------------------------------------------------------------------------------------------------------


@AUDIT
def test_a_fork_bomb_does_not_start(audit):
    text = attempt("import os\nwhile True:\n    os.fork()", audit=audit)
    assert text.startswith("HELD PermissionError")


def test_a_thread_bomb_ends_in_an_error():
    code = (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    text, problem = run_python(code, limits=Limits(timeout_s=5))
    assert problem in ("error", "timeout")
    assert len(text) < 2100


def test_four_gigabytes_are_refused():
    text, problem = run_python("x = bytearray(4 << 30)")
    assert problem == "error"
    assert text.endswith("MemoryError")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(99)",
        "9**9**9",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import atexit, time; x = atexit.register(time.sleep, 99)",
        "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "import os\nos.close(1); os.close(2)\nwhile True: pass",
    ],
)
def test_what_never_ends_is_killed_on_time(code):
    began = time.monotonic()
    text, problem = run_python(code, limits=Limits(timeout_s=1))
    assert time.monotonic() - began < 20
    assert (problem, text) == ("timeout", "timed out after 1 s; the process was killed")
    assert not [child for child in psutil.Process().children() if "sandbox_worker.py" in " ".join(child.cmdline())]


def test_a_flood_of_output_is_not_kept():
    before = psutil.Process().memory_info().rss
    text, problem = run_python("while True: print('x' * 1000)", limits=Limits(timeout_s=1))
    assert problem == "timeout"
    assert len(text) <= 2000
    assert "characters left out" in text
    assert psutil.Process().memory_info().rss - before < 50 << 20
    text, problem = run_python("print('y' * 10_000_000)\n'last'")
    assert problem is None
    assert text.endswith("'last'")
    assert len(text) <= 2000


def test_one_large_file_and_many_files_are_stopped():
    text, problem = run_python("open('x', 'wb').write(bytes(100 << 20))")
    assert problem == "error"
    assert "File too large" in text or "SIGXFSZ" in text
    code = "import itertools\nfor n in itertools.count():\n    open(str(n), 'wb').write(bytes(10 << 20))"
    text, problem = run_python(code, limits=Limits(timeout_s=20))
    assert (problem, text) == ("error", "stopped: files of more than 64 MiB together")
    code = """
import os, time
held = []
for _ in range(12):
    held.append(open('x', 'wb', buffering=0))
    os.unlink('x')  # it has no name any more and is there all the same
    held[-1].write(bytes(10 << 20))
time.sleep(10)
"""
    assert run_python(code, limits=Limits(timeout_s=20)) == ("stopped: files of more than 64 MiB together", "error")
    code = "import itertools\nfor n in itertools.count():\n    open(str(n), 'w').close()"
    assert run_python(code)[0] == "stopped: more than 2000 files and folders"


def test_a_stop_is_heard():
    began = time.monotonic()
    _, problem = run_python("while True: pass", should_stop=lambda: time.monotonic() - began > 0.3)
    assert problem == "cancelled"
    assert time.monotonic() - began < 15


def test_the_folder_is_deleted_however_it_looks(tmp_path, monkeypatch, outside):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    code = f"""
import os
os.symlink({str(outside)!r}, "link")
os.mkdir("closed", 0)
open("file", "w").close()
for n in range(1500):
    os.mkdir("a" * 200)
    os.chdir("a" * 200)
"""
    text, problem = run_python(code, audit=False)
    assert problem is None, text
    assert list(tmp_path.iterdir()) == []
    assert (outside / "secret.txt").exists()


def test_the_audit_hook_cannot_be_taken_away():
    text = attempt(
        "import sys, gc\nsys.addaudithook(lambda *a: None)\nopen('/etc/passwd')\nprint('ESCAPED')", audit=True
    )
    assert "HELD PermissionError" in text


# -- closed or not at all ---------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_lock_itself_in_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_resource_limits", lambda limits: {"RLIMIT_NOFILE": 3})
    text, problem = run_python("print('RAN')")
    assert problem == "error"
    assert "so nothing was run" in text
    assert "RAN" not in text


def _header_numbers(path, pattern):
    return {name: int(number) for name, number in re.findall(pattern, Path(path).read_text(), re.M)}


@pytest.mark.parametrize(
    ("machine", "path"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_the_numbers_are_those_of_the_kernel(machine, path):
    if not Path(path).exists():
        pytest.skip("no kernel headers here")
    known = _header_numbers(path, r"^#define __NR(?:3264)?_(\w+)\s+(\d+)")
    column = ARCHITECTURES[machine][1]
    checked = 0
    for name, row in (DENIED | JUDGED).items():
        if row[column] is not None and name in known:
            assert known[name] == row[column], name
            checked += 1
        elif row[column] is None:
            assert name not in known, name
    assert checked > 90


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("abi", [1, 7])
def test_every_jump_of_the_filter_lands_inside_it(machine, abi):
    program = filter_program(machine, 1234, abi)
    for place, (code, yes, no, _) in enumerate(program):
        if code & 0x07 == 0x05:
            assert place + 1 + max(yes, no) < len(program)
        assert max(yes, no) < 256


# -- normal use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2"),
        ("x = 3", "done; nothing was printed"),
        ("print('a')\n'b'", "a\n'b'"),
        ("None", "done; nothing was printed"),
        ("", "done; nothing was printed"),
        ("import math; math.factorial(20)", "2432902008176640000"),
        ("import json; json.dumps({'a': [1, 'é']}, ensure_ascii=False)", "'{\"a\": [1, \"é\"]}'"),
        ("import re; re.findall(r'\\d+', 'a1b22')", "['1', '22']"),
        ("import statistics; statistics.median([3, 1, 2])", "2"),
        ("import datetime; (datetime.date(2024, 3, 1) - datetime.date(2024, 2, 1)).days", "29"),
        ("from zoneinfo import ZoneInfo; import datetime\ndatetime.datetime(2024, 7, 1, tzinfo=ZoneInfo('UTC')).isoformat()",
         "'2024-07-01T00:00:00+00:00'"),
        ("from collections import Counter; Counter('aab').most_common(1)", "[('a', 2)]"),
        ("import itertools; list(itertools.islice(itertools.count(), 3))", "[0, 1, 2]"),
        ("from decimal import Decimal; Decimal('0.1') + Decimal('0.2')", "Decimal('0.3')"),
        ("import csv, io, random, hashlib, sqlite3, fractions, heapq, functools, string, textwrap, uuid, zlib, struct\n1", "1"),
        ("with open('a.txt', 'w') as f:\n    f.write('hi')\nopen('a.txt').read()", "'hi'"),
        ("import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.rename('a/b/c', 'd'); sorted(os.listdir('.'))",
         "['a', 'd']"),
        ("import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('y')", "done; nothing was printed"),
        ("import sqlite3; sqlite3.connect('db').execute('select 1').fetchall()", "[(1,)]"),
        ("import threading\nt = threading.Thread(target=print, args=('in a thread',)); t.start(); t.join()", "in a thread"),
        ("from concurrent.futures import ThreadPoolExecutor as T\nwith T(2) as p: print(list(p.map(abs, [-1, 2])))", "[1, 2]"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nasyncio.run(f())", "5"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True"),
        ("import importlib; importlib.invalidate_caches(); import bisect, colorsys; 1", "1"),
        ("if __name__ == '__main__': print('main')", "main"),
        ("import sys; sys.exit(0)", "done; nothing was printed"),
    ],
)  # fmt: skip
def test_ordinary_code_runs(code, text):
    assert run_python(code) == (text, None)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 / 0", "line 1: 1 / 0\nZeroDivisionError: division by zero"),
        ("def f(x):\n    return x['a']\nprint('before')\nf({})",
         "before\nline 4: f({})\nline 2 in f: return x['a']\nKeyError: 'a'"),
        ("x = (\n1", "line 1: x = (\nSyntaxError: '(' was never closed"),
        ("import json; json.loads('{')",
         "line 1: import json; json.loads('{')\nJSONDecodeError: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"),
        ("import numpy", "line 1: import numpy\nModuleNotFoundError: No module named 'numpy' (only Python's standard library "
         "is available here)"),
        ("raise SystemExit(3)", "the process ended with exit code 3"),
        ("import os; os.abort()", "the process was killed by SIGABRT"),
        ("open('/etc/passwd')", "line 1: open('/etc/passwd')\nPermissionError: '/etc/passwd' is outside the sandbox; allowed: "
         "files in the current folder"),
    ],
)  # fmt: skip
def test_errors_are_short_and_say_where(code, text):
    assert run_python(code) == (text, "error")


def test_endless_recursion_is_told_in_a_few_lines():
    text, _ = run_python("def f(n): return f(n + 1)\nf(0)")
    assert "more calls" in text
    assert len(text.splitlines()) == 8


def test_runs_share_nothing_and_may_be_at_once():
    answers = {}

    def work(number):
        answers[number] = run_python(f"open('x', 'a').write('{number}'); open('x').read()")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: (f"'{number}'", None) for number in range(4)}
