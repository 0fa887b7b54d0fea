"""What a `torch.save` pickle says, read without unpickling: nothing in it is called, imported or allocated.

A pickle is a program for a stack machine. This machine knows the operations that torch.save writes; the classes and
functions that it names become labels (`Label`), calling one gives a `Call`, and a storage stays a reference. It is
stricter than torch.load(weights_only=True), which calls some constructors with whatever sizes the file wishes, and
does so before the file has shown that it is that large.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# A tensor takes about 35 operations.
MAX_OPERATIONS = 4_000_000
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING SHORT_BINBYTES "  # noqa: SIM905
    "BINBYTES".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DICT = "collections.OrderedDict"


@dataclass(frozen=True)
class Label:
    """A class or function by its name; never the thing itself."""

    name: str


@dataclass(eq=False)
class Call:
    """What the pickle would have called, and with what; and what it would then have set on the result."""

    function: Label
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the pickle keeps outside of itself: for torch, a storage."""

    key: Any


@dataclass(frozen=True, eq=False)
class _OddKey:
    """In place of a key that is neither a string nor a number: to hash one that is nested deep ends the interpreter."""

    kind: str

    def __str__(self) -> str:
        return f"<a {self.kind}>"


class _Mark:
    pass


class PickleReader:
    """Reads one pickle after another from a file object."""

    def __init__(self, file: BinaryIO, may_name: Callable[[str], bool]) -> None:
        """Take the file, and a function that tells whether a pickle may name a class or function at all."""
        self._file, self._may_name = file, may_name
        self.references: list[Reference] = []  # of all pickles read so far
        self._left = MAX_OPERATIONS

    def read(self) -> Any:
        """Return the next object. Raises ValueError: broken, too long, or with more than data."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for operation, argument, _ in pickletools.genops(self._file):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MAX_OPERATIONS} operations")
            if operation.name == "STOP":
                return self._pop()
            self._step(operation.name, argument)
        raise ValueError("it does not end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _FIXED_TUPLES:
            self._stack.append(tuple(self._pop_many(_FIXED_TUPLES[name])))
        else:
            action = getattr(self, f"_do_{name.lower()}", None)
            if action is None:
                raise ValueError(f"operation {name} is not one that torch.save writes")
            action(argument)

    def _pop(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise ValueError("its stack is empty")
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack and not isinstance(self._stack[-1], _Mark):
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("a mark is missing")
        self._stack.pop()
        return items[::-1]

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise ValueError(f"expected a {kind.__name__} on the stack")
        return self._stack[-1]

    def _do_proto(self, argument: int) -> None:
        pass

    def _do_global(self, argument: str) -> None:
        name = ".".join(argument.split(" "))
        if not self._may_name(name):
            raise ValueError(f"it holds more than tensors ({name[:80]!r}), and loading that could run code of its own")
        self._stack.append(Label(name))

    def _do_binpersid(self, argument: None) -> None:
        self.references.append(Reference(self._pop()))
        self._stack.append(self.references[-1])

    def _do_mark(self, argument: None) -> None:
        self._stack.append(_Mark())

    def _do_empty_dict(self, argument: None) -> None:
        self._stack.append({})

    def _do_empty_list(self, argument: None) -> None:
        self._stack.append([])

    def _do_tuple(self, argument: None) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _do_append(self, argument: None) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _do_appends(self, argument: None) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _do_setitem(self, argument: None) -> None:
        pair = self._pop_many(2)
        self._set(pair)

    def _do_setitems(self, argument: None) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1].items if self._stack and isinstance(self._stack[-1], Call) else self._top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        target.update(_dict_of(zip(items[::2], items[1::2], strict=True)))

    def _do_reduce(self, argument: None) -> None:
        function, arguments = self._pop_many(2)
        if isinstance(function, Call):  # a method of something that was never made
            function = function.function
        if not isinstance(function, Label) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        if function.name == _DICT:
            pairs = arguments[0] if arguments else []
            if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) for pair in pairs):
                raise ValueError("an OrderedDict of something else than pairs")
            self._stack.append(_dict_of(pairs))
        else:
            self._stack.append(Call(function, arguments))

    def _do_newobj(self, argument: None) -> None:
        self._do_reduce(argument)

    def _do_build(self, argument: None) -> None:
        state = self._pop()  # attributes, such as a state dict's _metadata
        if self._stack and isinstance(self._stack[-1], Call):
            self._stack[-1].state = state

    def _do_binput(self, argument: int) -> None:
        self._memo[argument] = self._top(object)

    def _do_long_binput(self, argument: int) -> None:
        self._do_binput(argument)

    def _do_binget(self, argument: int) -> None:
        if argument not in self._memo:
            raise ValueError(f"nothing was kept under {argument}")
        self._stack.append(self._memo[argument])

    def _do_long_binget(self, argument: int) -> None:
        self._do_binget(argument)


def _dict_of(pairs: Any) -> dict[Any, Any]:
    # A tuple nested a million times as a key would crash the interpreter when it is hashed.
    result = {}
    for key, value in pairs:
        result[key if isinstance(key, str | int | bytes) else _OddKey(type(key).__name__)] = value
    return result
