"""The mistakes that can be made in C text: token by token, in kernels and in what Python writes.

Comments, directives and texts in quotes are left alone; so is, in Python, whatever is not C: what
errors and notes say, docstrings, and the fields of f-strings.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from benchmarks.mutants.mutant import Mutant
from benchmarks.mutants.python import TOLD

# What is replaced by what; the group `t` is the token.
TOKENS: tuple[tuple[str, str, str], ...] = (
    ("comparison", r"(?<=[\w)\]] )(?P<t><=)(?= )", "<"),
    ("comparison", r"(?<=[\w)\]] )(?P<t><)(?= )", "<="),
    ("comparison", r"(?<=[\w)\]] )(?P<t>>=)(?= )", ">"),
    ("comparison", r"(?<=[\w)\]] )(?P<t>>)(?= )", ">="),
    ("comparison", r"(?<= )(?P<t>==)(?= )", "!="),
    ("comparison", r"(?<= )(?P<t>!=)(?= )", "=="),
    ("arithmetic", r"(?<=[\w)\]] )(?P<t>\+)(?= )", "-"),
    ("arithmetic", r"(?<=[\w)\]] )(?P<t>-)(?= )", "+"),
    ("arithmetic", r"(?<=[\w)\]] )(?P<t>\*)(?= )", "+"),
    ("arithmetic", r"(?<=[\w)\]] )(?P<t>/)(?= )", "*"),
    ("arithmetic", r"(?<=[\w)\]] )(?P<t>%)(?= )", "/"),
    ("arithmetic", r"(?<= )(?P<t><<)(?= )", ">>"),
    ("arithmetic", r"(?<= )(?P<t>>>)(?= )", "<<"),
    ("arithmetic", r"(?<= )(?P<t>&)(?= )", "|"),
    ("arithmetic", r"(?<= )(?P<t>\+=)(?= )", "-="),
    ("arithmetic", r"(?<= )(?P<t>-=)(?= )", "+="),
    ("boolean", r"(?<= )(?P<t>&&)(?=\s)", "||"),
    ("boolean", r"(?<= )(?P<t>\|\|)(?=\s)", "&&"),
    ("boolean", r"(?P<t>!)(?=[\w(])", " "),
    ("constant", r"(?<![\w.])(?P<t>0)(?![\w.])", "1"),
    ("constant", r"(?<![\w.])(?P<t>1)(?![\w.])", "0"),
    ("constant", r"(?<![\w.])(?P<t>1)(?![\w.])", "2"),
    ("constant", r"(?<![\w.])(?P<t>[2-9]|[1-9]\d{1,8})(?![\w.])", "+1"),
)
# An assignment to what there is already, a call, or a jump; a declaration begins with two names.
STATEMENT = re.compile(
    r"^[ \t]*(?P<t>\*?\w+(?:->\w+|\.\w+|\[[^\];]*\])*\s*(?:[-+|&*]|<<|>>)?=[^=;][^;]*;"
    r"|\w+\([^;]*\);|continue;|\w+(?:\+\+|--);)[ \t]*$",
    re.M,
)
HIDDEN = re.compile(
    r"/\*.*?\*/|^[ \t]*#[^\n]*|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'", re.S | re.M
)
MADE = re.compile(r"[;{}]|->|\b(int|int32_t|number|return|for|if)\b|\w\(|[-+*/<>&|]=? \w")


def kernel_mutants(file: str, text: str) -> list[Mutant]:
    """Return every mistake that is tried in a file of C."""
    return list(_in_text(file, text, 0, text))


def written_mutants(file: str, text: str) -> list[Mutant]:
    """Return every mistake that is tried in the C text which a file of Python writes."""
    tree = ast.parse(text)
    told = _told(tree)
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.STRING or token.start[0] in told:
            continue
        body = re.sub(r"\{[^{}]*\}", lambda m: "\0" * len(m[0]), token.string[1:-1])
        if not body.isascii() or not MADE.search(body):
            continue
        row, column = token.start
        offset = starts[row - 1] + len(text.splitlines()[row - 1][:column].encode()) + 1
        found += _in_text(file, body, offset, text)
    return found


def _told(tree: ast.AST) -> set[int]:
    """Return the lines of what is not C: docstrings, errors, notes, and the Makefile."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        called = isinstance(node, ast.Call) and TOLD.fullmatch(
            ast.unparse(node.func).split(".")[-1]
        )
        make = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("MAKE", "__all__")
        if text or called or make or isinstance(node, (ast.Raise, ast.Assert)):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
    return lines


def _in_text(file: str, body: str, offset: int, whole: str) -> Iterator[Mutant]:
    """Yield the changes of a piece of C at a byte of a file."""
    seen = HIDDEN.sub(lambda m: re.sub(r"[^\n]", "\0", m[0]), body)
    text = whole.encode()
    found = [
        (kind, m, str(int(m["t"]) + 1) if after == "+1" else after)
        for kind, pattern, after in TOKENS
        for m in re.finditer(pattern, seen)
    ]
    found += [("dropped statement", m, ";") for m in STATEMENT.finditer(seen) if "\0" not in m["t"]]
    for kind, match, after in sorted(found, key=lambda f: (f[1].start("t"), f[2])):
        start = offset + len(body[: match.start("t")].encode())
        before = body[match.start("t") : match.end("t")]
        line = text.count(b"\n", 0, start) + 1
        yield Mutant(file, line, f"C {kind}", start, before, after)
