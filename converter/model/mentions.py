"""What the code of a model's modules says of the weights of layers in them, in branches that run and in others.

The code is read, not run. Branches that the module as it was built can never take, such as those for training, or for
a value that its config does not have, are left out; what depends on an input counts.
"""

import ast
import inspect
import logging
import operator
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

log = logging.getLogger("llmint8")

# What is done to weights when there are none yet, or when they are moved about.
_NOT_IN_USE = re.compile(r"_*(init|reset|tie|prune|resize|load|save|extra_repr|repr)")
_FRAMEWORK = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "builtins")
_HARMLESS = {"device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "grad", "element_size"}
_QUESTIONS = {"isinstance", "hasattr", "id", "type"}
_ANY = "*"
_UNKNOWN = object()
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class Mention(NamedTuple):
    """`("attn", "proj")` where code takes `self.attn.proj.weight`, and what must be true, or false, to get there."""

    chain: tuple[str, ...]
    conditions: tuple[tuple[ast.expr, bool], ...]


def weights_mentioned(model: Any, layers: Iterable[str]) -> set[str]:
    """Return the layers of which the code of a module around them takes the weight, or its dtype.

    What has int8 in mind may look at the dtype; what looks at shapes and devices does no harm.

    Args:
        model: a transformers model in evaluation mode, on any device.
        layers: names of linear modules in it.

    """
    parts_of = {name: name.split(".") for name in layers}
    found: set[str] = set()
    for module_name, module in model.named_modules():
        prefix = module_name.split(".") if module_name else []
        cls: Any = type(module)
        for mention in _mentions(cls):
            truths = [(_truth(test, module), wanted) for test, wanted in mention.conditions]
            if any(truth is not _UNKNOWN and truth is not wanted for truth, wanted in truths):
                continue
            place = [*prefix, *mention.chain]
            found.update(
                name
                for name, parts in parts_of.items()
                if len(parts) == len(place) and all(a in (_ANY, b) for a, b in zip(place, parts, strict=True))
            )
    return found


@cache
def _mentions(cls: Any) -> tuple[Mention, ...]:
    """Return what the methods of a class mention, in the order of its bases."""
    found: list[Mention] = []
    overridden: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith(_FRAMEWORK):
            continue
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
            function = inspect.unwrap(function) if callable(function) else function
            if not isinstance(function, FunctionType) or name in overridden or _NOT_IN_USE.match(name):
                continue
            if "super" not in function.__code__.co_names:
                overridden.add(name)
            if not _says_weight(function.__code__):
                continue
            try:
                source = textwrap.dedent(inspect.getsource(function))
                found += _of_function(ast.parse(source), "int8" in source)
            except (OSError, TypeError, SyntaxError):
                log.debug("the code of %s.%s cannot be read", base.__qualname__, name)
    return tuple(found)


def _says_weight(code: CodeType) -> bool:
    return "weight" in code.co_names or any(_says_weight(part) for part in code.co_consts if isinstance(part, CodeType))


def _of_function(tree: ast.AST, knows_int8: bool) -> Iterator[Mention]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    known: dict[str, tuple[str, ...]] = {"self": ()}
    for node in ast.walk(tree):  # `proj = self.proj`, `for layer in self.layers`
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            chain, name = _chain(node.value, known), node.targets[0].id
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            chain, name = _chain(node.iter, known), node.target.id
            chain = None if chain is None else (*chain, _ANY)
        else:
            continue
        if chain:
            known.setdefault(name, chain)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr != "weight" or not (chain := _chain(node.value, known)):
            continue
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute) and (parent.attr in _HARMLESS or (parent.attr == "dtype" and knows_int8)):
            continue
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _QUESTIONS:
            continue
        if isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
            continue
        yield Mention(chain, tuple(_conditions(node, parents)))


def _chain(node: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return `("a", "*", "b")` for `self.a[i].b`; None for anything that does not begin at `self`."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return None
    chain = _chain(node.value, known)
    if isinstance(node, ast.Attribute):
        step = node.attr
    else:
        step = str(node.slice.value) if isinstance(node.slice, ast.Constant) else _ANY
    return None if chain is None else (*chain, step)


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node is not parent.test:
            yield parent.test, node in parent.body
        if isinstance(parent, ast.IfExp) and node is not parent.test:
            yield parent.test, node is parent.body
        node = parent


def _value(node: ast.AST, module: nn.Module) -> Any:
    """Return what a condition comes to for a module, or _UNKNOWN where it depends on what it is given."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, module)
        return _UNKNOWN if owner is _UNKNOWN else getattr(owner, node.attr, _UNKNOWN)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _truth(node.operand, module)
        return _UNKNOWN if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_truth(value, module) for value in node.values]
        decided = isinstance(node.op, ast.Or)  # one true value decides `or`, one false value decides `and`
        if decided in values:
            return decided
        return _UNKNOWN if _UNKNOWN in values else not decided
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        if all(value is None or isinstance(value, bool | int | float | str) for value in (left, right)):
            try:
                return bool(_COMPARE[type(node.ops[0])](left, right))
            except TypeError:
                return _UNKNOWN
    return _UNKNOWN


def _truth(node: ast.AST, module: nn.Module) -> Any:
    value = _value(node, module)
    return bool(value) if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
