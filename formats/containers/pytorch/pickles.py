"""What a `torch.save` pickle says, read without unpickling: nothing in it is called, imported or allocated.

A pickle is a program for a stack machine. This machine knows the operations that torch.save writes; the classes and
functions that it names become labels (`Label`), calling one gives a `Call`, and a storage stays a reference. It is
stricter than torch.load(weights_only=True), which calls some constructors with whatever sizes the file wishes, and
does so before the file has shown that it is that large.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# A tensor takes about 35 operations.
MAX_OPERATIONS = 4_000_000
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
    """Reads one pickle after another from the beginning of what may go on with something else.

    Attributes:
        position: where the next one begins, or whatever follows.
        references: of all pickles read so far.

    """

    def __init__(self, data: bytes, may_name: Callable[[str], bool]) -> None:
        """Take the bytes, and a function that tells whether a pickle may name a class or function at all."""
        self._data, self._may_name = data, may_name
        self.position = 0
        self.references: list[Reference] = []
        self._left = MAX_OPERATIONS

    def read(self) -> Any:
        """Return the next object. Raises ValueError: broken, too long, or with more than data."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        data, end = self._data, len(self._data)
        while self.position < end:
            operation = data[self.position]
            self.position += 1
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MAX_OPERATIONS} operations")
            if operation == _STOP:
                return self._pop()
            action = _ACTIONS.get(operation)
            if action is None:
                raise ValueError(f"operation {_name(operation)} is not one that torch.save writes")
            action(self)
        raise ValueError("it does not end")

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise ValueError(f"it ends {self.position - len(self._data)} bytes too early")
        return self._data[start : self.position]

    def _number(self, count: int, signed: bool = False) -> int:
        start, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise ValueError("it ends in a number")
        return int.from_bytes(self._data[start : self.position], "little", signed=signed)

    def _string(self, count: int, encoding: str = "utf-8") -> None:
        self._stack.append(self._take(count).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict"))

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise ValueError("a line does not end")
        return self._take(end + 1 - self.position)[:-1].decode()

    def _pop(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise ValueError("its stack is empty")
        return self._stack.pop()

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

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if not self._may_name(name):
            raise ValueError(f"it holds more than tensors ({name[:80]!r}), and loading that could run code of its own")
        self._stack.append(Label(name))

    def _persistent(self) -> None:
        self.references.append(Reference(self._pop()))
        self._stack.append(self.references[-1])

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1].items if self._stack and isinstance(self._stack[-1], Call) else self._top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        target.update(_dict_of(zip(items[::2], items[1::2], strict=True)))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
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

    def _build(self) -> None:
        state = self._pop()  # attributes, such as a state dict's _metadata
        if self._stack and isinstance(self._stack[-1], Call):
            self._stack[-1].state = state

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"nothing was kept under {index}")
        self._stack.append(self._memo[index])


def _name(operation: int) -> str:
    known: Any = next((known for known in pickletools.opcodes if known.code == chr(operation)), None)
    return known.name if known else f"0x{operation:02x}"


_STOP = ord(".")
_ACTIONS: dict[int, Callable[[PickleReader], Any]] = {
    ord(operation): action
    for operation, action in {
        "\x80": lambda reader: reader._take(1),  # the protocol
        "c": PickleReader._global,
        "Q": PickleReader._persistent,
        "(": lambda reader: reader._stack.append(_Mark()),
        "}": lambda reader: reader._stack.append({}),
        "]": lambda reader: reader._stack.append([]),
        ")": lambda reader: reader._stack.append(()),
        "t": lambda reader: reader._stack.append(tuple(reader._pop_to_mark())),
        "\x85": lambda reader: reader._tuple(1),
        "\x86": lambda reader: reader._tuple(2),
        "\x87": lambda reader: reader._tuple(3),
        "a": lambda reader: reader._append([reader._pop()]),
        "e": lambda reader: reader._append(reader._pop_to_mark()),
        "s": lambda reader: reader._set([reader._pop(), reader._pop()][::-1]),
        "u": lambda reader: reader._set(reader._pop_to_mark()),
        "R": PickleReader._reduce,
        "\x81": PickleReader._reduce,  # NEWOBJ
        "b": PickleReader._build,
        "q": lambda reader: reader._put(reader._number(1)),
        "r": lambda reader: reader._put(reader._number(4)),
        "h": lambda reader: reader._get(reader._number(1)),
        "j": lambda reader: reader._get(reader._number(4)),
        "N": lambda reader: reader._stack.append(None),
        "\x88": lambda reader: reader._stack.append(True),
        "\x89": lambda reader: reader._stack.append(False),
        "K": lambda reader: reader._stack.append(reader._number(1)),
        "M": lambda reader: reader._stack.append(reader._number(2)),
        "J": lambda reader: reader._stack.append(reader._number(4, signed=True)),
        "\x8a": lambda reader: reader._stack.append(reader._number(reader._number(1), signed=True)),
        "G": lambda reader: reader._stack.append(struct.unpack(">d", reader._take(8))[0]),
        "X": lambda reader: reader._string(reader._number(4)),
        "\x8c": lambda reader: reader._string(reader._number(1)),
        "T": lambda reader: reader._string(reader._number(4), "latin-1"),
        "U": lambda reader: reader._string(reader._number(1), "latin-1"),
        "B": lambda reader: reader._stack.append(reader._take(reader._number(4))),
        "C": lambda reader: reader._stack.append(reader._take(reader._number(1))),
    }.items()
}


def _dict_of(pairs: Any) -> dict[Any, Any]:
    # A tuple nested a million times as a key would crash the interpreter when it is hashed.
    result = {}
    for key, value in pairs:
        result[key if isinstance(key, str | int | bytes) else _OddKey(type(key).__name__)] = value
    return result
