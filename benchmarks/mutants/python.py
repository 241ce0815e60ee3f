"""The mistakes that can be made in Python: by the syntax tree, where they change what is done.

Left out is what no test can or should tell apart: annotations, decorators, docstrings, the texts
and causes of errors and notes, ``strict=`` of zip, ``__repr__``, ``__all__``, assertions, what only
a type checker reads, and the sizes of caches.
"""

from __future__ import annotations

import ast
import re

from benchmarks.mutants.mutant import Mutant

COMPARE: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}  # fmt: skip
NAMES = {
    "min": ("extreme", "max"), "max": ("extreme", "min"), "any": ("quantifier", "all"),
    "all": ("quantifier", "any"), "amin": ("extreme", "amax"), "amax": ("extreme", "amin"),
    "minimum": ("extreme", "maximum"), "maximum": ("extreme", "minimum"),
}  # fmt: skip

# Calls whose arguments are texts for people, or types; and arguments that change no result.
TOLD = re.compile(r"(\w*(Error|Warning|Note|note|warn|refuse\w*)|print|isinstance|issubclass|cast)")
TEXTS = {"strict", "repr", "maxsize", "hint", "why", "help", "indent", "timeout", "stacklevel"}
# Of two arguments in either order these make the same, or are refused at once.
EITHER = {"min", "max", "gcd", "lcm", "maximum", "minimum", "getattr", "hasattr", "isclose", "map"}
TYPES = {"Callable", "Literal", "Union", "dict", "tuple", "list", "Mapping", "Sequence", "Any"}


def mutants(file: str, text: str) -> list[Mutant]:
    """Return every mistake that is tried in a file, in the order of the text."""
    walk = _Walk(file, text)
    walk.visit(ast.parse(text))
    return sorted(walk.found, key=lambda m: (m.start, m.kind, m.after))


def is_other(mutant: Mutant, text: str) -> bool:
    """Whether the changed file can be parsed and is another program."""
    try:
        changed = ast.parse(mutant.applied(text.encode()))
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(text))


class _Walk(ast.NodeVisitor):
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text.encode()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []

    # ------------------------------------------------------------------ places

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def add(self, kind: str, start: int, before: str, after: str) -> None:
        line = self.text.count(b"\n", 0, start) + 1
        self.found.append(Mutant(self.file, line, kind, start, before, after))

    def replace(self, kind: str, node: ast.AST, after: str) -> None:
        self.add(kind, self.span(node)[0], self.source(node), after)

    def between(self, kind: str, left: ast.AST, right: ast.AST, before: str, after: str) -> None:
        """Replace an operator, which stands between two operands, perhaps beside a bracket."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.text[start:end]).decode()
        pattern = r"\s+".join(map(re.escape, before.split()))
        found = re.search(pattern, gap)
        if found is not None:
            self.add(kind, start + len(gap[: found.start()].encode()), found[0], after)

    # ------------------------------------------------------------------ what is left out

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave out what cannot be false."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave out what an error says."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__repr__" or self._abstract(node):
            return
        self.visit(node.args)
        self.statements(node.body)

    def _abstract(self, node: ast.FunctionDef) -> bool:
        return any("abstractmethod" in ast.unparse(d) for d in node.decorator_list)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not any("Protocol" in ast.unparse(base) for base in node.bases):
            self.statements(node.body)

    def visit_Module(self, node: ast.Module) -> None:
        self.statements(node.body)

    def visit_Assign(self, node: ast.Assign) -> None:
        target, value = node.targets[0], node.value
        typed = isinstance(value, ast.Subscript) and ast.unparse(value.value) in TYPES
        if not typed and not (isinstance(target, ast.Name) and target.id == "__all__"):
            self.generic_visit(node)

    # ------------------------------------------------------------------ statements

    def statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if not self._text(statement):
                self.dropped(statement)
                self.visit(statement)

    def _text(self, node: ast.stmt) -> bool:
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

    def dropped(self, node: ast.stmt) -> None:
        value = node.value if isinstance(node, ast.Expr) else None
        called = isinstance(value, ast.Call) and not TOLD.fullmatch(_name(value.func))
        given = isinstance(value, (ast.Yield, ast.YieldFrom))
        stored = isinstance(node, ast.Assign) and not isinstance(
            node.targets[0], (ast.Name, ast.Tuple)
        )
        stored &= "memo" not in ast.unparse(node) and "cache" not in ast.unparse(node)
        jump = isinstance(node, (ast.Continue, ast.Break))
        if called or given or stored or jump or isinstance(node, (ast.AugAssign, ast.Delete)):
            self.replace("dropped statement", node, "pass")

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self.statements(node.orelse)
            return
        if isinstance(node.body[-1], (ast.Return, ast.Raise, ast.Continue)) and not node.orelse:
            self.replace("dropped guard", node.test, "False")
        self.visit(node.test)
        self.statements(node.body)
        self.statements(node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.statements(node.body)
        self.statements(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.statements(node.body)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self.statements(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        self.statements(node.body)
        for handler in node.handlers:
            self.statements(handler.body)
        self.statements(node.orelse)
        self.statements(node.finalbody)

    # ------------------------------------------------------------------ expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            self.between("comparison", left, right, *COMPARE[type(op)])
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        swap = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self.between("boolean", node.values[0], node.values[1], *swap)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        operand = self.source(node.operand)
        if isinstance(node.op, ast.Not):
            self.replace("boolean", node, f"({operand})")
        elif isinstance(node.op, (ast.USub, ast.Invert)):
            kind = "constant" if isinstance(node.operand, ast.Constant) else "arithmetic"
            self.replace(kind, node, operand)
            if kind == "constant":
                return
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        joined = (ast.JoinedStr, ast.List, ast.Tuple)
        sides = (node.left, node.right)
        texts = any(isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides)
        if (
            type(node.op) in ARITHMETIC
            and not texts
            and not any(isinstance(s, joined) for s in sides)
        ):
            self.between("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            before, after = ARITHMETIC[type(node.op)]
            self.between("arithmetic", node.target, node.value, before + "=", after + "=")
        self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("truth", node, str(not value))
        elif isinstance(value, int):
            self.replace("constant", node, str(value + 1))
            if value > 0:
                self.replace("constant", node, str(value - 1))
        elif isinstance(value, float):
            self.replace("constant", node, repr(value * 2 if value else 1.0))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        ends = {"0": "-1", "-1": "0"}
        index = ast.unparse(node.slice)
        if index in ends:
            self.replace("first and last", node.slice, ends[index])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node.func)
        if TOLD.fullmatch(name):
            return
        if name in NAMES:
            kind, other = NAMES[name]
            start = self.span(node.func)[1] - len(name)
            self.add(kind, start, name, other)
        args = node.args
        if (
            len(args) > 1
            and name not in EITHER
            and not any(isinstance(a, ast.Starred) for a in args)
        ):
            first, last = self.source(args[0]), self.source(args[-1])
            start, (_, end) = self.span(args[0])[0], self.span(args[-1])
            whole = self.text[start:end].decode()
            middle = whole[len(first) : len(whole) - len(last)]
            if first != last:
                self.add("arguments", start, whole, last + middle + first)
        self.visit(node.func)
        for argument in args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in TEXTS:
                self.visit(keyword.value)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
