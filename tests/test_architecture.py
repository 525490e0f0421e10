"""Who may import whom, read from the source.

request <- text, draft, schedule <- plan <- {model, device} <- engine <- server <- cli
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hsrpc"

ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "constraint": {"errors"},
    "request": {"constraint", "errors"},
    "prompt": {"errors"},
    "v1": set(),
    "text": set(),
    "schedule": {"request", "errors"},
    "draft": {"request", "errors"},
    "plan": {"draft", "schedule", "config", "errors"},
    "model": {"plan", "schedule", "request", "config", "errors"},
    "device": {"plan", "schedule", "config", "errors"},
    "engine": {
        *("model", "device", "plan", "draft", "schedule", "text", "prompt", "request", "constraint"),
        *("config", "errors"),
    },
    "server": {"engine", "plan", "schedule", "prompt", "request", "constraint", "config", "errors", "v1"},
    "client_proxy": set(),
    "client_messages": {"client_proxy", "prompt", "request", "constraint", "errors", "v1"},
    "client_channel": {"client_proxy"},
    "client": {"client_channel", "client_messages", "client_proxy", "prompt", "request", "errors", "v1"},
    "source": {"client", "engine", "prompt", "request", "errors", "v1"},
    "batch": {"source", "client_messages", "plan", "prompt", "request", "constraint", "config", "errors"},
    "loop_thread": set(),
    "ray": {"batch", "loop_thread", "source", "engine", "config", "errors"},
    "lm_eval": {"batch", "client", "loop_thread", "source", "engine", "prompt", "request", "config", "errors"},
    "testing": {"server", "engine", "model", "device", "plan", "schedule", "prompt", "request", "config", "errors"},
    "bench": {
        *("testing", "server", "client", "client_channel", "client_messages", "v1"),
        *("engine", "model", "device", "plan", "draft", "schedule", "prompt", "request", "config", "errors"),
    },
    "cli": {
        *("bench", "batch", "source", "client", "client_channel", "client_messages", "client_proxy", "server", "v1"),
        *("engine", "model", "device", "plan", "schedule", "prompt", "request", "constraint", "config", "errors"),
    },
    "__main__": {"cli"},
}
"""What each part of the package may import, besides itself."""


class Imports(ast.NodeVisitor):
    """Collects the dotted names that run-time imports name; `deferred`: also of those inside functions."""

    def __init__(self, deferred: bool) -> None:
        self.names: list[str] = []
        self._deferred = deferred

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"relative import of {node.module}"
        self.names += [f"{node.module}.{alias.name}" for alias in node.names]

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if self._deferred:
            self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)


def imports(tree: ast.Module, *, deferred: bool) -> list[str]:
    visitor = Imports(deferred)
    visitor.visit(tree)
    return visitor.names


@cache
def modules() -> dict[str, ast.Module]:
    """Source of every module of the package, by dotted name."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in paths}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The part that a dotted name belongs to; None: not of this package, or the package itself."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 and names[1] != "__version__" else None


def users(library: str) -> set[str]:
    """Modules that import `library`."""
    return {
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] == library for name in imports(tree, deferred=True))
    }


def parts(names: set[str]) -> set[str | None]:
    return {part_of(name) for name in names}


def test_dependencies_point_one_way():
    """No module imports a part that is above its own, not even inside a function."""
    wrong = []
    for module, tree in modules().items():
        part = part_of(module)
        for name in imports(tree, deferred=True):
            target = part_of(name)
            if target is not None and target != part and target not in ALLOWED.get(part or "", set()):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_every_part_has_its_place():
    """A new part of the package is put into the order first."""
    assert parts(set(modules())) - {None} <= set(ALLOWED)
    assert {"schedule", "plan", "model", "device", "engine", "server", "client"} <= parts(set(modules()))


def test_the_order_has_no_cycles():
    """The allowed directions themselves can be put in a row."""
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert (
        order.index("schedule")
        < order.index("plan")
        < order.index("model")
        < order.index("engine")
        < order.index("server")
    )


def test_no_import_cycles():
    """Modules can be put in an order in which each needs only those before it."""
    names = set(modules())
    graph = {}
    for module, tree in modules().items():
        targets = set(imports(tree, deferred=False))
        named = {name if name in names else name.rpartition(".")[0] for name in targets}
        graph[module] = (named & names) - {module}
    assert sum(map(len, graph.values())) > 50
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)


def test_only_the_edges_know_grpc():
    """grpc is imported by the server, the load tests, the command line, the client and generated code alone."""
    assert parts(users("grpc")) <= {"server", "bench", "cli", "client", "client_channel", "client_messages", "v1"}
    assert "server" in parts(users("grpc"))


SERVER = "hsrpc.server"
COMPOSITION = f"{SERVER}.app"
"""The one module that puts the use case, its operations and its front ends together."""
FRONT_ENDS = {"grpc", "openai"}
"""Folders of the server that each carry calls over one transport."""
TRANSPORT = {"grpc", "google", "grpc_health", "grpc_reflection", "hsrpc.v1"}
"""What gRPC's folder alone may know of."""


def room_of(module: str) -> str | None:
    """The folder of a module of the server, `use case` for those in none, or `app`; None: not of the server."""
    names = module.split(".")
    if names[:2] != SERVER.split("."):
        return None
    if module == COMPOSITION or module.startswith(f"{COMPOSITION}."):
        return "app"
    folder = names[2] if len(names) > 2 else ""
    return folder if folder in FRONT_ENDS | {"ops"} else "use case"


def of_server(module: str, tree: ast.Module) -> list[tuple[str, str]]:
    """Each import of a module of the server with the room, or the library, that it is of."""
    found = []
    for name in imports(tree, deferred=True):
        library = next((known for known in TRANSPORT if name == known or name.startswith(f"{known}.")), None)
        found.append((name, room_of(name) or library or ""))
    return found


def test_the_server_knows_its_transport_in_one_folder():
    """The use case imports neither operations nor a transport, operations no transport, and front ends neither
    operations nor each other: what adds an HTTP front end adds a folder, and a line to the composition."""
    allowed = {
        "app": {"use case", "ops", *FRONT_ENDS},
        "use case": {"use case"},
        "ops": {"use case", "ops"},
        "grpc": {"use case", "grpc", *TRANSPORT},
        "openai": {"use case", "openai"},
    }
    rooms = {module: room for module in modules() if (room := room_of(module))}
    assert set(rooms.values()) == set(allowed)
    wrong = [
        f"{module} imports {name}"
        for module, room in rooms.items()
        for name, target in of_server(module, modules()[module])
        if target and target not in allowed[room]
    ]
    assert wrong == []


def test_only_the_composition_names_front_ends():
    """Outside the server nothing imports a front end: who serves, does so by `hsrpc.server`."""
    inside = {f"{SERVER}.{folder}" for folder in FRONT_ENDS}
    naming = {
        module
        for module, tree in modules().items()
        for name in imports(tree, deferred=True)
        if any(name == folder or name.startswith(f"{folder}.") for folder in inside)
    }
    assert {module for module in naming if room_of(module) not in FRONT_ENDS} == {COMPOSITION}


def test_the_use_case_loads_no_transport():
    """Neither by itself nor by what it imports, however deep; the operations neither."""
    names = [module for module in modules() if room_of(module) in ("use case", "ops")]
    assert len(names) > 15
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print(sorted({{"grpc", "google.protobuf", "google.rpc", "hsrpc.v1", "hsrpc.server.grpc"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("library", ["torch", "asyncio"])
def test_decisions_are_pure(library: str):
    """They need neither tensors nor an event loop."""
    assert parts(users(library)).isdisjoint({"request", "text", "draft", "schedule", "plan"})


def test_models_and_devices_are_synchronous():
    """Neither the models nor the device know of asyncio."""
    assert parts(users("asyncio")).isdisjoint(
        {"model", "device", "plan", "schedule", "text", "request", "config", "errors"}
    )


def test_only_the_engine_joins_asyncio_and_torch():
    """Modules of the engine import both, no others do; apart, benchmarks (torch's profiler) and testing's devices."""
    assert parts(set(users("asyncio")) & set(users("torch"))) == {"engine"}
    assert parts(users("asyncio")) & parts(users("torch")) <= {"engine", "bench", "testing"}


def test_clocks_are_monotonic():
    """No part asks for the time of day: a clock that is set back must not end, stall or misjudge a request."""
    wall = re.compile(
        r"\btime\.time(_ns)?\(|\bdatetime\b(?! import timedelta\n)|\bCLOCK_REALTIME\b"
        r"|from time import (?!monotonic|perf_counter)"
    )
    telling = {ROOT / "hsrpc/batch/answer.py"}
    """Nothing is decided by the time of day there: an answer says when it was made."""
    paths = sorted(set((ROOT / "hsrpc").rglob("*.py")) - telling)
    assert [str(path) for path in paths if wall.search(path.read_text())] == []


def test_imports_are_found_wherever_they_are():
    """The reader sees plain, nested and deferred imports, and leaves out those for type checkers."""
    source = """
import a.b
from c import d, e
if TYPE_CHECKING:
    import f
try:
    import g
except ImportError:
    pass
def h():
    import i
class J:
    def k(self):
        from l import m
"""
    tree = ast.parse(source)
    assert imports(tree, deferred=True) == ["a.b", "c.d", "c.e", "g", "i", "l.m"]
    assert imports(tree, deferred=False) == ["a.b", "c.d", "c.e", "g"]
