"""An embedding in int8: rows are looked up, and only these are dequantized. A head tied to it multiplies by its table.

The class of a model's embedding stays, as what it does with a row is its own matter, such as to scale it: an
`Int8Embedding` of that class takes its place in the line of `super()`, where the plain lookup was.
"""

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from llmint8.formats import NATIVE, KBit, Layout
from llmint8.kernels.reference import Rotation

from .arguments import Outliers
from .float_weight import FloatWeight, dequantized
from .kbit import KBitLinear
from .layer import Int8Linear
from .linear import QuantizedLinear
from .tensors import QuantizedTensors, check_stored


class Int8Embedding(QuantizedTensors, nn.Embedding):
    """Rows of an int8 table [N, K] by their numbers; it is an `nn.Embedding`, and frozen.

    Its tensors, and what becomes of them when it moves, are those of all int8 layers; `in_features` is K, the width of
    a row. Nothing is prepared: a table is read as it is stored.

    Attributes:
        plain: the class of the embedding in whose place it is.

    """

    plain: ClassVar[type[nn.Embedding]] = nn.Embedding

    @staticmethod
    def in_place_of(
        embedding: nn.Embedding,
        outlier_count: int,
        rotation: Rotation | None = None,
        layout: Layout = NATIVE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kbit: KBit | None = None,
    ) -> "Int8Embedding":
        """Make a table of zeros, to be filled, that does with its rows what an embedding does; arguments as of layers.

        Settings and buffers of the embedding are taken over, its weight is not.
        """
        made = _empty(type(embedding))
        rows, width = embedding.num_embeddings, embedding.embedding_dim
        QuantizedTensors.__init__(made, width, rows, False, outlier_count, rotation, layout, device, dtype, kbit)
        own = vars(embedding)
        vars(made).update({name: value for name, value in own.items() if name not in vars(made)})
        made._buffers.update(embedding._buffers)
        made._non_persistent_buffers_set |= embedding._non_persistent_buffers_set
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map whole numbers [...] to the rows of these numbers, [..., K] in the table's dtype."""
        found = self.stored().rows(input.reshape(-1))
        return dequantized(found, self.dtype).reshape(*input.shape, self.in_features)

    def prepare(self) -> None:
        """Check the tensors. Raises ValueError; see `QuantizedTensors.prepare`."""
        if not self.is_meta:
            check_stored(self.stored())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the table in floating point, [N, K]; stored outlier columns are exact."""
        return dequantized(self.stored(), dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as what it is made of: its class is made where it is needed."""
        return _empty, (self.plain,), self.__getstate__()

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        return f"{self.out_features}, {self.in_features}, outlier_dims={len(cast('Tensor', self.outlier_dims))}"


_CLASSES: dict[type[nn.Embedding], type[Int8Embedding]] = {nn.Embedding: Int8Embedding}


def _int8_class(plain: type[nn.Embedding]) -> type[Int8Embedding]:
    """Return a class that does with a row what another does, and looks it up in an int8 table."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Int8{plain.__name__}", (plain, Int8Embedding), {"plain": plain})
    return _CLASSES[plain]


def _empty(plain: type[nn.Embedding]) -> Int8Embedding:
    """Return a module without anything, to be filled."""
    made = _int8_class(plain)
    return made.__new__(made)


class TiedHead(QuantizedLinear):
    """An output head that multiplies by the table of an embedding. It has the embedding's tensors, and none of its own.

    The two modules have their parameters and buffers in common, not only equal ones: where one moves, both have moved.
    """

    _table: tuple[Int8Embedding]

    def take(self, table: Int8Embedding) -> Self:
        """Take the table."""
        self._table = (table,)  # in a tuple, as it is no part of the head
        self._share()
        return self

    @property
    def table(self) -> Int8Embedding:
        """The embedding."""
        return self._table[0]

    def _share(self) -> None:
        self._parameters, self._buffers = self.table._parameters, self.table._buffers

    def _may_pack(self) -> bool:
        return False  # the embedding reads the rows as they are stored

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Leave the weight as it is where transformers ties it to that of the embedding once more."""
        if not isinstance(param, FloatWeight):
            super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on the state of a copy, which has a copy of the table."""
        super().__setstate__(state | {"prepared": False})
        self._share()
        if state["prepared"]:
            self.prepare()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Leave the tensors to the embedding."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Leave the tensors to the embedding, but for what is prepared of them."""
        if not self.is_meta:
            self.prepare()


class TiedInt8Head(TiedHead, Int8Linear):  # type: ignore[misc]
    """One to a table in int8."""


class TiedKBitHead(TiedHead, KBitLinear):  # type: ignore[misc]
    """One to a table of k bits."""


def tied_head(table: Int8Embedding, *, outliers: Outliers = "static", **settings: Any) -> TiedHead:
    """Make the head of a table, with the settings of `Int8Linear`."""
    count = None if table.outlier_dims is None else len(table.outlier_dims)
    shape = table.in_features, table.out_features, False, count
    how: dict[str, Any] = {"outliers": outliers, "layout": table._layout, "device": "meta"}
    if table.kbit is not None:
        return TiedKBitHead(*shape, kbit=table.kbit, **how).take(table)
    return TiedInt8Head(*shape, **{"rotation": table.rotation, **how, **settings}).take(table)
