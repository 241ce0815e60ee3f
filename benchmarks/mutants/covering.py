"""Which tests a mutant is tried on: those that run its line, or use what its line makes at import.

A table, a default or a class attribute is read when the module is imported, before any test. Its
tests are those that run a line which names it. Those of a row of the op table look the row up.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.mutants.cover import Cover
from benchmarks.mutants.mutant import Mutant
from benchmarks.mutants.tree import ROOT, text_of

ROWS, TABLE = "narrows/ir/ops/rows.py", "narrows/ir/ops/table.py"
FUNCTIONS = (ast.FunctionDef, ast.Lambda)


def tests_of(mutant: Mutant, cover: Cover) -> list[str]:
    """Return the tests that could notice a mutant; none if its line is not covered."""
    if mutant.file.endswith(".c"):
        return cover.with_kernel(Path(mutant.file).stem)
    lines = cover.lines(mutant.file)
    if not lines:
        return []
    outer = list(_around(mutant.file, mutant.line))
    statement = outer[-1]
    found = lines.get(mutant.line) or _in(lines, _header(statement))
    in_function = any(isinstance(o, FUNCTIONS) for o in outer[:-1])
    if found and in_function:
        return found
    seen = any(line in lines for line in _header(statement))
    if in_function and not seen:
        return []
    if mutant.file.startswith("narrows/ir/ops/"):
        rows = _rows_of(mutant.file, statement, outer[0], cover)
        if rows:
            own = {t for row in rows for group in tests_of_row(row, cover) for t in group}
            return sorted(own | set(tests_of_table(cover)))
    return _by_name(mutant.file, outer, cover) or _in(lines, _inner_lines(mutant.file))


def _in(lines: dict[int, list[str]], wanted: range | set[int]) -> list[str]:
    return sorted({test for line in wanted for test in lines.get(line, ())})


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(text_of(file))


def _around(file: str, line: int) -> Iterator[ast.stmt]:
    """Yield the statements that hold a line, the outermost first."""

    def walk(node: ast.AST) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ExceptHandler):
                yield from walk(child)
            if not isinstance(child, ast.stmt):
                continue
            decorators = getattr(child, "decorator_list", [])
            first = min([child.lineno, *(d.lineno for d in decorators)])
            if first <= line <= (child.end_lineno or child.lineno):
                yield child
                yield from walk(child)

    return walk(_tree(file))


def _header(node: ast.stmt) -> range:
    """Return the lines of a statement without those of the statements it holds."""
    body = getattr(node, "body", None)
    last = node.end_lineno or node.lineno
    if isinstance(body, list) and body:
        last = max(node.lineno, body[0].lineno - 1)
    return range(node.lineno, last + 1)


def _inner_lines(file: str, within: ast.AST | None = None, named: str = "") -> set[int]:
    """Return the lines of the functions' bodies of a file or of a part of it."""
    found: set[int] = set()
    for node in ast.walk(within or _tree(file)):
        if isinstance(node, ast.FunctionDef) and named in ("", node.name):
            found |= set(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
    return found


def _by_name(file: str, outer: list[ast.stmt], cover: Cover) -> list[str]:
    """Return the tests that run a line which names what a statement makes."""
    function = next((o for o in outer if isinstance(o, ast.FunctionDef)), None)
    if function is not None:  # a default, or a function that runs at import
        found = _in(cover.lines(file), _inner_lines(file, function))
        if found:
            return found
    if isinstance(outer[0], ast.ClassDef):
        found = _in(cover.lines(file), _inner_lines(file, outer[0]))
        if found:
            return found
    names = _names(outer[0])
    if not names:
        return []
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b")
    found = _naming(file, pattern, cover)
    if found:
        return found
    # What only other statements of its module name is read with what they make.
    more = names.union(*(_names(statement) for statement in _tree(file).body))
    for wanted in (names, more):
        found = _named_elsewhere(file, wanted, cover)
        if found:
            return found
    return []


def _named_elsewhere(file: str, names: set[str], cover: Cover) -> list[str]:
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b")
    others = (str(p.relative_to(ROOT)) for p in sorted((ROOT / "narrows").rglob("*.py")))
    return sorted({t for other in others if other != file for t in _naming(other, pattern, cover)})


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}


def _naming(file: str, pattern: re.Pattern[str], cover: Cover) -> list[str]:
    text = text_of(file)
    if not pattern.search(text):
        return []
    named = {i for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)}
    return _in(cover.lines(file), named & _inner_lines(file))


def _rows_of(file: str, statement: ast.stmt, outer: ast.stmt, cover: Cover) -> set[str]:
    """Return the rows that a statement makes or names; in the table of rows all, if it is none."""
    words: set[str] = set()
    texts = {_one(n.targets[0]): n.value for n in _tree(file).body if isinstance(n, ast.Assign)}
    for node in ast.walk(statement):
        node = texts.get(node.id, node) if isinstance(node, ast.Name) else node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(node.value.split())
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "1" for p in node.values)
            words |= set("".join(map(str, parts)).split())
    rows = {r for told in cover.tests.values() for r in told["rows"]}
    named = rows & (words | {f"{w}.default" for w in words})
    if not named and isinstance(outer, ast.FunctionDef) and statement is not outer:
        return _rows_of(file, outer, outer, cover)
    return named or (rows if file == ROWS else set())


def _one(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def tests_of_table(cover: Cover) -> list[str]:
    """Return the tests that look at all rows."""
    return _in(cover.lines(TABLE), _inner_lines(TABLE, named="rows"))


def tests_of_row(row: str, cover: Cover) -> tuple[list[str], list[str]]:
    """Return the tests of a row: its own laws, the fastest first, and others that look it up."""
    own = re.compile(rf"test_op_rows\.py::.*\[{re.escape(row)}(-|\])")
    laws = sorted((t for t in cover.tests if own.search(t)), key=lambda t: cover.seconds([t]))
    return laws, [t for t in cover.with_row(row) if "test_op_rows.py" not in t]
