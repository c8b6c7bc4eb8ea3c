"""The architecture as docs/DESIGN.md draws it: imports go down and never round."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "agentlab"
MODULES = {
    ".".join(["agentlab", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Top down; rooms in one line do not import each other either.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["serve", "notebook"],
    ["lab"],
    ["launcher", "answering", "planning", "bookkeeping", "working"],
    ["tracking", "report"],
    ["evolution"],
    ["learning"],
    ["agent"],
    ["memory"],
    ["inference"],
    ["adapters"],
    ["tasks", "models"],
    ["hardware"],
    ["records", "events", "config", "toolformat"],
    ["files"],
    ["errors"],
]


def _imports(path: Path, lazy: bool) -> set[str]:
    """Modules of the package that a file imports; with `lazy` also inside functions, never for type hints alone."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update(
                whole if (whole := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name in MODULES}


def test_no_module_imports_itself_by_any_way_round():
    graph = {name: _imports(path, lazy=False) - {name} for name, path in MODULES.items()}
    done, path = set(), []

    def walk(name: str) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            walk(other)
        path.pop()
        done.add(name)

    for name in graph:
        walk(name)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_floor():
    known = {room for floor in FLOORS for room in floor}
    assert {_room(name) for name in MODULES} - {""} == known


def test_rooms_import_only_from_rooms_below():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = []
    for name, path in MODULES.items():
        for other in _imports(path, lazy=True):
            here, there = _room(name), _room(other)
            if here and there and here != there and floor_of[there] <= floor_of[here]:
                wrong.append(f"{name} imports {other}")
    assert not wrong
