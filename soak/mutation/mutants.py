"""Mutants of a module: its source with one small fault in it.

A fault is a piece of the text put in the place of another, found in the syntax tree: a comparison or an operator that
is its neighbour, a number that is one more, a flag turned over, a condition denied, a statement or a value left
out. What only says something is left alone: docstrings, annotations, f-strings, the arguments of errors, of logs and of
notices. So are strings, and functions of Triton, which its interpreter reads from the file.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_TELLS = ("log", "warnings", "notices")


@dataclass(frozen=True)
class Mutant:
    """One fault: `line` of `path` (relative to the tree), the piece that was there, and the one that is now."""

    path: str
    line: int
    last_line: int
    in_function: bool
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """What it is known by, as long as its line stays as it is, wherever that moves to."""
        return f"{self.path}: {self.before} -> {self.after}"

    @property
    def digest(self) -> str:
        """What it is known by as long as the module stays as it is."""
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()[:16]


def mutants(root: Path, path: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of its lines."""
    source = (root / path).read_text()
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    raw, found = source.encode(), []
    for node, new, inside in _Walker().walk(ast.parse(source)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        mutated = raw[:begin] + new.encode() + raw[end:]
        if mutated == raw or not _compiles(mutated):
            continue
        line, shown = lines[node.lineno - 1].decode().strip(), " ".join(new.split())
        was = " ".join(raw[begin:end].decode().split())
        what = f"{was} => {shown}"
        last_line = node.end_lineno or node.lineno
        found.append(Mutant(path, node.lineno, last_line, inside, line, what, mutated.decode()))
    return found


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


Change = tuple[ast.expr | ast.stmt, str, bool]


class _Walker:
    """Walks a module, past what only says something."""

    def walk(self, tree: ast.Module) -> Iterator[Change]:
        for statement in tree.body:
            yield from self._statement(statement, False)

    def _statement(self, node: ast.stmt, inside: bool) -> Iterator[Change]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
                return
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                yield from self._expressions(default, inside)
            for statement in node.body:
                yield from self._statement(statement, True)
            return
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node) or _tells(node):
            return
        if isinstance(node, ast.Raise):
            yield node, "pass", inside
            return
        if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete):
            yield node, "pass", inside
        if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
            yield node, "pass", inside
        if isinstance(node, ast.Continue):
            yield node, "break", inside
        if isinstance(node, ast.Break):
            yield node, "continue", inside
        if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
            yield node.value, "None", inside
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.Constant):
            yield node.test, f"not ({ast.unparse(node.test)})", inside
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.stmt):
                    yield from self._statement(child, inside)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    for statement in child.body:
                        yield from self._statement(statement, inside)
                elif isinstance(child, ast.AST):
                    yield from self._expressions(child, inside)

    def _expressions(self, node: ast.AST | None, inside: bool) -> Iterator[Change]:
        if node is None or isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.expr):
            yield from ((node, text, inside) for text in _replacements(node))
        for child in ast.iter_child_nodes(node):
            yield from self._expressions(child, inside)


def _replacements(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in _COMPARISONS[type(node.ops[0])]:
            yield f"({ast.unparse(ast.Compare(node.left, [other()], node.comparators))})"
    elif isinstance(node, ast.BoolOp):
        yield f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))})"
        for left_out in range(len(node.values)):
            rest = [value for number, value in enumerate(node.values) if number != left_out]
            yield f"({ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and not _is_type(node):
        yield f"({ast.unparse(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield f"({ast.unparse(node.body)})"
        yield f"({ast.unparse(node.orelse)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield repr(node.value + 1)


def _is_type(node: ast.BinOp) -> bool:
    """Tell a union of types, and text put together, from arithmetic."""
    text = [part for part in (node.left, node.right) if isinstance(part, ast.JoinedStr) or _is_string(part)]
    return bool(text) or (isinstance(node.op, ast.BitOr) and ast.unparse(node.right)[:1].isupper())


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and _is_string(node.value)


def _tells(node: ast.stmt) -> bool:
    """Tell whether a statement is a line of a log, or of what is said to the user."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    called = node.value.func
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in _TELLS
