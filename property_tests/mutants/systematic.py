"""Mutants of Python, made of the syntax tree: one rule an operator, applied wherever it fits.

A mutant replaces the source of one node. Left alone is what can't change a result: docstrings,
annotations, decorators, imports, messages of errors, assertions.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

from .mutant import Mutant, flat

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
CALLS = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "floor": "ceil",
    "any": "all", "all": "any", "amax": "amin",
}  # fmt: skip
# Functions of two arguments in which these stand for each other: nothing to swap.
SYMMETRIC = frozenset({"minimum", "maximum", "logical_and", "logical_or", "logical_xor", "equal"})
# Arguments of a launch that say how fast, and not what.
HINTS = frozenset({"num_warps", "num_stages", "maxsize", "num_ctas"})
# Calls whose argument, or object, stands in for the result.
LAID_BARE = frozenset({
    "clamp", "abs", "floor", "round", "square", "sqrt", "sqrt_rn", "reciprocal", "detach",
    "contiguous",
})  # fmt: skip
RANGES = frozenset({"range", "static_range"})
# Arguments that a call does without, to another effect.
DROPPED = frozenset({"mask", "max", "stable", "descending", "right", "dtype"})
# What a masked load gives where nothing is loaded is undefined without `other`; this is undefined
# made visible.
ANYTHING = "77"

Change = tuple[str, ast.AST, str]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All of one file, in the order of the source."""
    walk = _Walk(source)
    walk.visit(ast.parse(source))
    found, counts, seen = [], Counter[tuple[str, str]](), set()
    for scope, operator, lines, start, end, new in walk.found:
        old = source[start:end].decode()
        if (start, end, new) in seen or _dump(old) == _dump(new):
            continue
        seen.add((start, end, new))
        n = counts[scope, operator]
        counts[scope, operator] += 1
        name = f"{file}:{scope or 'module'}:{operator}:{n}"
        what = f"{flat(old)} -> {flat(new)}"
        found.append(Mutant(name, "systematic", file, lines, start, end, new, what))
    return found


def _dump(text: str) -> str:
    """The syntax tree of an expression or a statement, without its brackets and spaces."""
    try:
        return ast.dump(ast.parse(f"({text})"))
    except SyntaxError:
        return ast.dump(ast.parse(text))


class _Walk(ast.NodeVisitor):
    """Visits what may be mutated, and notes each change as offsets in bytes."""

    def __init__(self, source: bytes) -> None:
        self.found: list[tuple[str, str, tuple[int, int], int, int, str]] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._lines = (1, 1)
        self._assigned: list[set[str]] = [set()]

    def visit(self, node: ast.AST) -> None:
        """Changes of this node, then those inside it."""
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            self._lines = (node.lineno, max(node.lineno, last))
        for operator, place, new in self._changes(node):
            start, end = self._span(place)
            scope = ".".join(self._scope)
            self.found.append((scope, operator, self._lines, start, end, new))
        super().visit(node)

    def _span(self, node: ast.AST) -> tuple[int, int]:
        at = self._starts
        return (
            at[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            at[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def _changes(self, node: ast.AST) -> Iterator[Change]:
        for rule in RULES:
            yield from rule(node)
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            if isinstance(target, ast.Name) and names <= self._assigned[-1]:
                yield "remove", node, "pass"
            self._assigned[-1] |= names

    # What is left alone.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        known = {a.arg for a in node.args.args + node.args.kwonlyargs}
        self._scope.append(node.name)
        self._assigned.append(known)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self._block(node.body)
        self._assigned.pop()
        self._scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        self._assigned.append(set())
        self._block(node.body)
        self._assigned.pop()
        self._scope.pop()

    def visit_Module(self, node: ast.Module) -> None:
        self._block(node.body)

    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if not _is_text(statement):
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        union = isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr)
        if names == ["__all__"] or (union and not self._scope):
            return  # a list of names; an alias of types
        self.visit(node.value)
        for target in node.targets:
            if not isinstance(target, ast.Name):
                self.visit(target)

    def visit_keyword(self, node: ast.keyword) -> None:
        # A number for `other` is replaced by one that no neighbour resembles, and by no neighbour.
        if node.arg not in HINTS and not (node.arg == "other" and _is_number(node.value)):
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Nothing of a message."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Nothing."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nothing: texts."""


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _with(node: ast.AST, **fields: object) -> str:
    """The source of `node` with these fields, in brackets."""
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return f"({ast.unparse(made)})"


def _binary(node: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.BinOp):
        return
    other = ARITHMETIC.get(type(node.op))
    if other is not None:
        yield "arithmetic", node, _with(node, op=other())
    if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitAnd | ast.BitOr):
        yield "left", node, f"({ast.unparse(node.left)})"
    if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
        yield "right", node, f"({ast.unparse(node.right)})"


def _compared(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
            yield "compare", node, _with(node, ops=ops)


def _boolean(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", node, _with(node, op=other)
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            whole = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
            yield "term", node, f"({ast.unparse(whole)})"
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "unary", node, f"({ast.unparse(node.operand)})"


def _condition(node: ast.AST) -> Iterator[Change]:
    tests = []
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    for test in tests:
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], NEGATED):
            continue  # `_compared` does the same
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            continue  # the rule of unary operators does the same
        yield "negate", test, f"(not ({ast.unparse(test)}))"


def _constant(node: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float):
        return
    value = node.value
    if isinstance(value, bool):
        yield "constant", node, repr(not value)
        return
    near = (value + 1, value - 1)
    for other in near if value not in near else (value * 2, value / 2):
        yield "constant", node, f"({other!r})" if other < 0 else repr(other)


def _call(node: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.Call):
        return
    args, name = node.args, _name(node.func)
    symmetric = name in SYMMETRIC or (name in ("min", "max") and len(args) == 2)
    for i, (a, b) in enumerate(() if symmetric else itertools.pairwise(args)):
        if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
            swapped = [*args[:i], b, a, *args[i + 2 :]]
            yield "swap", node, _with(node, args=swapped)
    for i, keyword in enumerate(node.keywords):
        rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
        if keyword.arg == "other":
            yield "other", keyword.value, ANYTHING
        elif keyword.arg in DROPPED:
            yield "keyword", node, _with(node, keywords=rest)
    if name in CALLS:
        yield "call", node.func, ast.unparse(node.func).removesuffix(name) + CALLS[name]
    if name in LAID_BARE:
        # A function, tl.abs(x), or a method, x.abs().
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        module = isinstance(owner, ast.Name) and owner.id in ("tl", "torch", "math")
        bare = args[0] if owner is None or module else owner
        yield "bare", node, f"({ast.unparse(bare)})"
    if name == "where" and len(args) == 3:
        yield "where", node, f"({ast.unparse(args[1])})"
        yield "where", node, f"({ast.unparse(args[2])})"
    if name in RANGES and args:
        stop = args[0] if len(args) == 1 else args[1]
        for step in () if _is_number(stop) else ("- 1", "+ 1"):  # numbers have a rule
            yield "range", stop, f"({ast.unparse(stop)} {step})"


def _is_number(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _slice(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Slice):
        for end in (node.lower, node.upper):
            if end is not None and not _is_number(end):
                yield "slice", end, f"({ast.unparse(end)} + 1)"


def _statement(node: ast.AST) -> Iterator[Change]:
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if call or isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield "remove", node, "pass"
    if isinstance(node, ast.AugAssign):
        other = ARITHMETIC.get(type(node.op))
        if other is not None:
            changed = copy.copy(node)
            changed.op = other()
            yield "arithmetic", node, ast.unparse(changed)


RULES: tuple[Callable[[ast.AST], Iterator[Change]], ...] = (
    _binary, _compared, _boolean, _condition, _constant, _call, _slice, _statement,
)  # fmt: skip
