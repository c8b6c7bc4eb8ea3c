"""The inside of the sandbox, run as `python -I -S sandbox_worker.py`: locks itself in, then runs the code from stdin.

Standard library only. stdin carries JSON: code, folder, limits, audit. What is printed, the last expression's value and
a short traceback go to stdout. Exit code 120 says that the locks did not hold and nothing was run.
"""

import ast
import builtins
import json
import os
import resource
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REFUSED = 120
_CODE = "<code>"
_FRAMES_SHOWN = 3
_TIME_ZONES = ("/usr/share/zoneinfo", "/etc/localtime")


def main() -> None:
    """Lock in, run, exit."""
    job = json.loads(sys.stdin.buffer.read())
    folder = os.path.realpath(job["folder"])
    try:
        readable = _readable()
        _lock(job, folder, readable)
    except BaseException as error:
        print(f"the sandbox could not be closed ({type(error).__name__}: {error}), so nothing was run", flush=True)
        os._exit(REFUSED)
    if job["audit"]:
        sys.addaudithook(_audit_hook(folder, readable))
    _run(job["code"])


def _lock(job: "dict[str, Any]", folder: str, readable: "dict[str, int]") -> None:
    kernel = ModuleType("sandbox_kernel")
    loader = SourceFileLoader(
        "sandbox_kernel", os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_kernel.py")
    )
    code = loader.get_code("sandbox_kernel")
    assert code is not None
    exec(code, kernel.__dict__)
    kernel.die_with_parent()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.chdir(folder)
    for name, value in job["limits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # the second after a full CPU limit is for SIGXCPU, which says why; the next signal kills
        resource.setrlimit(getattr(resource, name), (soft, soft + 1 if name == "RLIMIT_CPU" else soft))
    abi = kernel.landlock_abi()
    if abi < 1:
        raise OSError("the kernel has no Landlock")
    kernel.restrict_files(abi, readable, folder)
    kernel.drop_capabilities()
    kernel.restrict_calls(abi)
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]
    # The folder of the standard library itself cannot be listed any more (its site-packages lie in it): what the
    # import system read of it while this module was loading stays.
    for finder in sys.path_importer_cache.values():
        if finder is not None:
            finder.invalidate_caches = lambda: None  # type: ignore[attr-defined]


def _readable() -> "dict[str, int]":
    """{path: Landlock bits} of the standard library without site-packages, the shared libraries and the time zones."""
    file_bits, folder_bits = 1 << 2, 1 << 2 | 1 << 3
    found: dict[str, int] = {}
    library = os.path.dirname(os.path.realpath(os.__file__))
    for entry in os.scandir(library):
        if entry.name not in ("site-packages", "dist-packages", "__pycache__"):
            found[entry.path] = folder_bits if entry.is_dir() else file_bits
    found[os.path.join(library, "__pycache__")] = file_bits
    folders = {os.path.join(sys.base_prefix, "lib")}
    with open("/proc/self/maps") as maps:
        folders |= {os.path.dirname(line.split(None, 5)[5]) for line in maps if ".so" in line and "/" in line}
    for folder in folders:
        # only the libraries: other packages, data and settings may lie beside them
        for entry in os.scandir(folder) if os.path.isdir(folder) and not folder.startswith(library) else ():
            if ".so" in entry.name and entry.is_file():
                found[entry.path] = file_bits
    found["/etc/ld.so.cache"] = file_bits
    for path in _TIME_ZONES:
        found[path] = folder_bits if os.path.isdir(path) else file_bits
    return {path: bits for path, bits in found.items() if os.path.exists(path)}


# -- the second line --------------------------------------------------------------------------------------------------

_FORBIDDEN = frozenset(
    """
    subprocess.Popen os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn pty.spawn os.kill os.killpg os.chmod
    os.chown os.utime os.setxattr os.removexattr shutil.chown syslog.openlog syslog.syslog resource.prlimit
    resource.setrlimit sqlite3.enable_load_extension sqlite3.load_extension
    """.split()  # noqa: SIM905 - as in the documentation's table
)
_PATHS = frozenset(
    ("open", "os.listdir", "os.scandir", "os.chdir", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link")
)


def _audit_hook(folder: str, readable: "dict[str, int]") -> "Any":
    """Refuses in words what the kernel would refuse by number; Python code alone could get round it, the kernel not."""
    real, join, decode = os.path.realpath, os.path.join, os.fsdecode
    inside = join(folder, "")
    system = tuple({real(path) for path in readable} | set(readable) | {real(os.path.dirname(os.__file__))})

    def allowed(event: str, arguments: "tuple[Any, ...]") -> bool:
        path = arguments[0]
        if path is None or isinstance(path, int):
            return True
        whole = real(decode(path))
        if whole == folder or whole.startswith(inside):
            return True
        return event in ("open", "os.listdir", "os.scandir") and whole.startswith(system)

    def hook(event: str, arguments: "tuple[Any, ...]") -> None:
        if event in _PATHS:
            if not allowed(event, arguments):
                raise PermissionError(f"{arguments[0]!r} is outside the sandbox; allowed: files in the current folder")
        elif event in _FORBIDDEN or event.startswith("ctypes.") or (event == "import" and "ctypes" in arguments[0]):
            raise PermissionError(f"{event if event != 'import' else arguments[0]} is not allowed in the sandbox")
        elif event.startswith("socket.") and not (event == "socket.__new__" and arguments[1] == 1):
            raise PermissionError("the sandbox has no network")

    return hook


# -- the code ---------------------------------------------------------------------------------------------------------


def _run(source: str) -> None:
    """Execute `source`; show the value of a last expression as the interactive interpreter does."""
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [""]
    try:
        tree = ast.parse(source, _CODE)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _CODE, "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            sys.displayhook(eval(compile(ast.Expression(last.value), _CODE, "eval"), module.__dict__))
    except SystemExit:
        raise
    except BaseException as error:
        _show(error, source)
        sys.exit(1)


def _show(error: BaseException, source: str) -> None:
    """The lines of the code that led to the error, and the error."""
    sys.stdout.flush()
    lines = source.splitlines()
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == _CODE:
            text = lines[trace.tb_lineno - 1].strip() if 0 < trace.tb_lineno <= len(lines) else ""
            where = "" if code.co_name == "<module>" else f" in {code.co_name}"
            places.append(f"line {trace.tb_lineno}{where}: {text[:200]}")
        trace = trace.tb_next
    if len(places) > 2 * _FRAMES_SHOWN:
        left_out = len(places) - 2 * _FRAMES_SHOWN
        places[_FRAMES_SHOWN:-_FRAMES_SHOWN] = [f"... {left_out} more calls"]
    if isinstance(error, SyntaxError) and error.filename == _CODE:
        places.append(f"line {error.lineno}: {(error.text or '').strip()[:200]}")
        message = error.msg
    else:
        message = str(error)
    if isinstance(error, ModuleNotFoundError):
        message += " (only Python's standard library is available here)"
    sys.stderr.write("".join(f"{place}\n" for place in places))
    sys.stderr.write(f"{type(error).__name__}: {message[:1000]}\n" if message else f"{type(error).__name__}\n")


if __name__ == "__main__":
    main()
