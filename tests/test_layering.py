"""Imports run one way: errors <- files <- ir <- {frontend, passes, backends} <- api <- demo <- cli.

`narrows.training` stands above api, too, and nothing imports it.

`narrows.registry`, which passes and targets are found through, `narrows.options`, and
`narrows.executors`, which run jobs, stand beside files.

And whatever is imported from outside is among the requirements that pyproject.toml states.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import narrows

ROOT = Path(narrows.__file__).parent

# The part of the package a module belongs to, and the parts it may import beside its own.
SIBLINGS = ("frontend", "passes", "backends")
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "registry": {"errors"},
    "options": {"errors"},
    "executors": {"errors", "registry"},
    "files": {"errors"},
    "ir": {"errors", "registry", "files"},
    **{
        sibling: {"version", "errors", "registry", "options", "executors", "files", "ir"}
        for sibling in SIBLINGS
    },
    "api": {"errors", "options", "executors", "files", "ir", *SIBLINGS},
    "demo": {"errors", "files", "ir", *SIBLINGS, "api"},
    "training": {"errors", "ir", "passes", "api"},
    "cli": {
        *("version", "errors", "options", "executors", "files", "ir", "api", "demo", "__init__"),
        *SIBLINGS,
    },
    "__main__": {"cli"},
    # The public names, imported on use.
    "__init__": {"version", "errors", "ir", *SIBLINGS, "api"},
}
# (importing file, imported module): breaches that are known and wanted. Keep it empty.
EXCEPTIONS: set[tuple[str, str]] = set()

DOTTED = re.compile(r"narrows(\.\w+)+(:\w+)?")


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(source: str, package: str, *, named: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the line and the narrows module of every import, inside functions, too.

    Where ``named``, also of those that a string names.

    The package itself counts by what is taken from it.
    """
    nodes = list(ast.walk(ast.parse(source)))
    names = [a for n in nodes if isinstance(n, ast.Import) for a in n.names]
    called = {"narrows", *(a.asname for a in names if a.name == "narrows")}
    for node in nodes:
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names if a.name.split(".")[0] == "narrows"]
            yield from ((node.lineno, name) for name in found if name != "narrows")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full = f"narrows.{node.attr}"
            if node.value.id in called:
                yield node.lineno, full if is_module(full) else "narrows"
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.split(".")[0] == "narrows":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield node.lineno, full if is_module(full) else base
        elif named and isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Lazy tables name modules as strings: "narrows.passes.plans.plan:ChannelPlan".
            name = node.value.split(":")[0]
            if DOTTED.fullmatch(node.value) and is_module(name):
                yield node.lineno, name


def breaches(source: str, file: str) -> list[str]:
    path = Path(file)
    module = ".".join(["narrows", *path.with_suffix("").parts])
    package = ".".join(["narrows", *path.parent.parts])
    importer = part_of(module)
    found = []
    for line, target in imports(source, package):
        part = part_of(target)
        if part == importer or part in ALLOWED[importer] or (file, target) in EXCEPTIONS:
            continue
        found.append(f"narrows/{file}:{line} ({importer}) imports {target}")
    return found


def test_every_module_imports_downwards_only():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 10
    found = []
    for path in files:
        found += breaches(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("errors.py", "from narrows.ir.program import Program"),
        ("ir/program.py", "def f():\n    from narrows.passes import base"),
        ("ir/program.py", "import narrows.frontend"),
        ("passes/base.py", "from narrows.backends import base"),
        ("passes/base.py", "from ..frontend import capture"),
        ("backends/base.py", "from narrows import capture"),
        ("backends/base.py", "import narrows\nnarrows.capture(model)"),
        ("backends/base.py", "import narrows as n\nn.capture(model)"),
        ("frontend/__init__.py", "LAZY = {'x': 'narrows.passes:Pass'}"),
        ("api/planning.py", "from narrows import demo"),
        ("api/planning.py", "from narrows import training"),
        ("demo/story.py", "import narrows.training.gates"),
        ("training/gates.py", "from narrows.backends import base"),
        ("demo/story.py", "from .. import cli"),
    ],
)
def test_a_breach_is_found(file: str, source: str):
    assert len(breaches(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ir/program.py", "from narrows.errors import ProgramError"),
        ("ir/ops/table.py", "from .. import program"),
        ("passes/base.py", "from narrows.ir.program import Program"),
        ("backends/base.py", "from narrows.version import VERSION"),
        ("cli/parser.py", "import narrows\nnarrows.capture(model)"),
        ("cli/commands.py", "from narrows import api, demo"),
        ("ir/program.py", "'the text narrows.passes is not an import when part of a sentence'"),
    ],
)
def test_a_downward_import_is_not(file: str, source: str):
    assert breaches(source, file) == []


# ------------------------------------------------------------------ no circles


def edges() -> dict[str, set[str]]:
    """Return per file which files it imports, in functions and for types alone included."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(["narrows", *parts[:-1]])
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        # What a registry names by a string, as it would a stranger's, is no part of a circle.
        targets = {t for _, t in imports(source, package, named=False)}
        targets = {t.removeprefix("narrows").lstrip(".") for t in targets}
        found[name] = targets - {name}
    return found


def reach(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return per file which files it imports, and those import, and so on."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        seen, queue = set[str](), [name]
        while queue:
            for target in graph.get(queue.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        reached[name] = seen
    return reached


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Return the sets of files that reach one another."""
    reached = reach(graph)
    found = {
        frozenset(n for n in reached[name] if name in reached.get(n, ()))
        for name in graph
        if name in reached[name]
    }
    return sorted(found, key=sorted)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert circles(graph) == [frozenset({"b", "c"})]


def test_no_files_import_one_another():
    graph = {name: targets for name, targets in edges().items() if name}  # but the public names
    assert len(graph) > 300
    assert circles(graph) == []


# The floors inside ir/, from below; what a floor does not name may stand on any.
FLOORS = (
    ("program", "notes", "choices", "sealed", "views", "graph", "labels"),
    ("ops",),
    ("channels", "liveness", "couplings", "structure", "workload"),
    ("rewrite",),
)


def floor_of(file: str) -> int | None:
    """Return the number of a file's floor inside ir/."""
    part = file.removeprefix("ir.").split(".")[0] if file.startswith("ir.") else ""
    return next((n for n, parts in enumerate(FLOORS) if part in parts), None)


def climbs(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the files that reach a higher floor, and what they reach, through any file."""
    found = []
    for name, targets in reach(graph).items():
        own = floor_of(name)
        if own is not None:
            found += [(name, t) for t in sorted(targets) if (floor_of(t) or 0) > own]
    return found


def test_a_climb_is_found():
    graph = {"ir.rewrite": {"ir.graph"}, "ir.graph": {"ir.between"}, "ir.between": {"ir.ops.table"}}
    assert climbs(graph) == [("ir.graph", "ir.ops.table")]


def test_no_floor_of_the_ir_imports_a_higher_one():
    assert [part for floor in FLOORS for part in floor if not is_module(f"narrows.ir.{part}")] == []
    assert climbs(edges()) == []


# Registries, and what loads a user's module: who imports by a name escapes the tests above.
BY_NAME = {
    "__init__.py", "cli/calibrate.py", "cli/model.py", "cli/parser.py", "registry.py",
}  # fmt: skip


def test_modules_are_imported_by_name_in_registries_only():
    calls = re.compile(r"\b(import_module|__import__)\(")
    found = {p for p in ROOT.rglob("*.py") if calls.search(p.read_text(encoding="utf-8"))}
    assert {p.relative_to(ROOT).as_posix() for p in found} == BY_NAME


def test_the_exceptions_are_still_needed():
    for file, target in EXCEPTIONS:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert target in {t for _, t in imports(source, "narrows")}


# ------------------------------------------------------------------ imports from outside

PROJECT = ROOT.parent / "pyproject.toml"
# The distribution of a package that is imported under another name.
DISTRIBUTIONS = {"onnx_ir": "onnx-ir", "sklearn": "scikit-learn", "tvm": "apache-tvm"}
# What a module, or a folder of them, may import beyond the core requirements: those of an extra.
EXTRAS = {
    "demo/": "demo",
    "backends/openvino/": "openvino",
    "backends/tvm/": "tvm",
    "executors/cluster.py": "ray",
}


def outside(source: str) -> set[str]:
    """Return the distributions of what a module imports beyond Python and the package itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    top = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"narrows"}
    return {DISTRIBUTIONS.get(name, name) for name in top}


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}  # type: ignore[index]


def test_whatever_is_imported_is_required():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    core = distributions(project["dependencies"])
    assert core
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        names = [extra for place, extra in EXTRAS.items() if file.startswith(place)]
        extra = [r for name in names for r in project["optional-dependencies"][name]]
        missing = outside(path.read_text(encoding="utf-8")) - core - distributions(extra)
        assert not missing, f"narrows/{file} imports {', '.join(missing)}: not in pyproject.toml"


def test_whatever_is_required_has_an_exact_version():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = (ROOT.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = {line.split("==")[0].lower() for line in lines if "==" in line}
    for wanted in (project["dependencies"], *project["optional-dependencies"].values()):
        assert distributions(wanted) <= exact


def test_imports_from_outside_are_found():
    source = "import os, onnx.checker\ndef f():\n    from sklearn import x\n    from . import y"
    assert outside(source) == {"onnx", "scikit-learn"}


# ------------------------------------------------------------------ who names operators

# Rooms that may: the table and what it writes, what codes mean, the readers of other dialects, and
# the backends, whose rules are their own.
NAMING = ("ir/ops", "ir/integer", "frontend", "backends")


def operators(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every ATen operator that a file names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"(torch\.ops\.)?aten\.\w+", text):
                yield node.lineno, text


def test_the_table_alone_names_operators() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(NAMING)
        for line, name in operators(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "say it with a trait of the row, or with narrows.ir.ops.dialect"


@pytest.mark.parametrize(
    "text", ["x = aten.relu.default", "f(torch.ops.aten.add.Tensor)", "t = {aten.mul: 1}"]
)
def test_a_named_operator_is_seen(text: str) -> None:
    assert list(operators(text))
