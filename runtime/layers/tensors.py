"""The tensors of a quantized layer, named as in the checkpoint, and what becomes of them when a module moves.

Moving or casting moves the tensors and casts bias and outlier columns; the int8 values and their scales keep their
dtypes. What runs is the prepared weight (`kernels/prepared.py`), which is made anew when tensors are moved, cast or
loaded. It may have the values in the layout of a kernel, in the place of `weight`; `unpacked_weight`, the state dict,
copies and moves give them back as they were. Tensors that are put in the place of those it was made of are used from
then on; who writes into one calls `prepare`. Over 250 lines, as all that touches these tensors has to leave what is
prepared in step with them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmint8.formats import DTYPES, KBit, Layout, Scheme
from llmint8.kernels import linear
from llmint8.kernels.checks import check_weight
from llmint8.kernels.kbit import linear as kbit_linear
from llmint8.kernels.kbit.levels import levels_of
from llmint8.kernels.kbit.reference import KBitWeight
from llmint8.kernels.prepared import PreparedWeight, StoredWeight
from llmint8.kernels.reference import Int8Weight, Rotation

from .float_weight import FloatWeight, dequantized


class QuantizedTensors(nn.Module):
    """The tensors of a quantized layer, and the weight that is prepared from them.

    Attributes:
        weight: what a float weight would be, see `float_weight.py`. The module's parameter of this name is int8 [N, K],
            all columns, `W ~ weight * absmax[:, None] / 127`, or what W is rotated to; opaque if its layout is a
            kernel's; `unpacked_weight` gives it as it is in the state. Of k bits, it is uint8: packed codes.
        SCB, or absmax in format 2: float32 [N], of each row, under the name it has on disk; see `row_absmax`. Of k
            bits, float16 [N, G], of each block.
        codebook: float16 [2 ** k], the levels, where a layer of k bits has some of its own.
        weight_format: uint8 [], always 0: row-major. bitsandbytes wants it on disk; there is none in format 2.
        outlier_dims: int32 [k], sorted, or None for a layer that stores no outliers (bitsandbytes wrote it).
        outlier_weight: float [N, k], the columns of W at `outlier_dims` as they were, or None.
        bias: float [N] or None.
        prepared: what runs, or None where nothing is prepared: a layer that accelerate offloads is only here for a
            call, and prepares its weight in it.
        rotation: see `Int8Weight`.
        kbit: how the weight is coded, where it is not int8 by row.
        name: in its model, for messages; empty where nobody said.

    """

    bias: nn.Parameter | None
    outlier_dims: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        outlier_count: int | None,
        rotation: Rotation | None,
        layout: Layout,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        kbit: KBit | None = None,
    ) -> None:
        """Make zeros, to be filled and prepared; `dtype` is that of the bias and the outlier columns."""
        nn.Module.__init__(self)  # that of a linear layer would make a float weight
        self._is_hf_initialized = True  # transformers fills linear layers with random numbers
        self.in_features, self.out_features, self.rotation, self.kbit = in_features, out_features, rotation, kbit
        self._layout = layout
        self.prepared: PreparedWeight | None = None
        self._prepared_from: tuple[Tensor | None, ...] = ()
        self._dtype = dtype or torch.get_default_dtype()
        self.name = ""

        def zeros(*shape: int, kind: torch.dtype | None) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        # First, so that model code which takes the dtype of the first parameter gets a float one where there is a bias.
        shift = nn.Parameter(zeros(out_features, kind=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", shift)
        weight, *others = layout.weight_specs("", out_features, in_features, Scheme(rotation=rotation, kbit=kbit))
        values = zeros(*weight.shape, kind=DTYPES[weight.dtype])
        self._parameters["weight"] = nn.Parameter(values, requires_grad=False)
        for spec in others:
            self.register_buffer(spec.name.removeprefix("."), zeros(*spec.shape, kind=DTYPES[spec.dtype]))
        k = outlier_count
        # The only zeros that would be wrong.
        dims = None if k is None else torch.arange(k, dtype=torch.int32, device=device)
        self.register_buffer("outlier_dims", dims)
        self.register_buffer("outlier_weight", None if k is None else zeros(out_features, k, kind=dtype))

    @property
    def weight(self) -> Tensor:
        """Return what stands for the float weight; on the meta device the int8 tensor, which has no numbers."""
        values: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        if values is None or values.is_meta:
            return values
        if torch.compiler.is_compiling():
            return dequantized(QuantizedTensors.stored(self), self.dtype)  # a compiler drops what nobody uses
        shape, read = (self.out_features, self.in_features), functools.partial(QuantizedTensors.stored, self)
        weight = FloatWeight(read, self.name, shape, self.dtype, values.device)
        weight.overwrite = self.overwrite
        vars(weight).update(vars(values))  # transformers notes there that a parameter needs no random values
        return weight

    @weight.setter
    def weight(self, value: Tensor | None) -> None:
        """Take on int8 values. torch does that by itself, but for tensors that are no parameters."""
        self._parameters["weight"] = value  # type: ignore[assignment]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Leave the weight as it is where what stands for it is put in its place, as PEFT does when it is done."""
        if not (isinstance(param, FloatWeight) and param.overwrite == self.overwrite):
            super().register_parameter(name, param)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all that is not int8, and of the weight as model code sees it."""
        return self._dtype if self.outlier_weight is None else self.outlier_weight.dtype

    @property
    def row_absmax(self) -> Tensor:
        """The absmax of each row, float32 [N]: what 127 stands for. Of k bits, float16 [N, G], of each block."""
        return self._buffers[self._layout.absmax]  # type: ignore[return-value]

    def stored(self) -> StoredWeight:
        """Return the tensors as they are stored."""
        absmax, dims, columns = self.row_absmax, self.outlier_dims, self.outlier_weight
        if dims is None or columns is None:
            dims, columns = absmax.new_empty(0, dtype=torch.int32), absmax.new_empty(self.out_features, 0)
        if self.kbit is None:
            return Int8Weight(self.unpacked_weight(), absmax, dims, columns, self.bias, rotation=self.rotation)
        coded = self.unpacked_weight(), absmax, self._levels(self.kbit), self.in_features, self.kbit.block
        return KBitWeight(*coded, dims, columns, self.bias)

    def _levels(self, kbit: KBit) -> Tensor:
        """Return what the codes stand for, float32 [2 ** k]."""
        if kbit.has_codebook:
            return self._buffers["codebook"].float()  # type: ignore[union-attr]
        return levels_of(kbit.data_type, kbit.bits).to(self.row_absmax.device)

    def overwrite(self, weight: Tensor) -> None:
        """Quantize another weight, float [N, K], into the layer; see `Int8Linear`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Check the tensors, and lay them out for the device they are on.

        Raises:
            ValueError: they do not fit each other, or outlier dims are not strictly increasing or not in the layer.

        """
        self._unprepare()
        if not self.is_meta:
            # What accelerate placed has a hook, and moves as it is.
            prepared = _prepare(self.stored(), self._may_pack())
            self._set_weight(prepared.values)
            self.prepared, self._prepared_from = prepared, self._tensors()

    def _may_pack(self) -> bool:
        return not hasattr(self, "_hf_hook")

    def ready(self) -> PreparedWeight:
        """Return what runs: what is prepared, or for tensors that are only here for this call, what is made of them."""
        if self._is_current():
            return self.prepared  # type: ignore[return-value]
        if hasattr(self, "_hf_hook"):
            self.prepared = None  # offloaded since, to save its memory
        return _prepare(self.stored(), may_pack=False)

    def unpacked_weight(self) -> Tensor:
        """Return the weight, int8 [N, K] or packed codes; a copy if its layout is a kernel's."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        # What a compiler has in the place of the tensor is none of those that are compared.
        if self.prepared is not None and (weight is self._prepared_from[0] or torch.compiler.is_compiling()):
            return self.prepared.unpack()
        return weight.read().values if isinstance(weight, FloatWeight) else weight

    @property
    def is_meta(self) -> bool:
        """Whether the weight has no numbers."""
        return self._parameters["weight"].is_meta  # type: ignore[union-attr]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        here = self._parameters, self._buffers
        absmax = here[1][self._layout.absmax]
        return here[0]["weight"], here[0]["bias"], absmax, here[1]["outlier_dims"], here[1]["outlier_weight"]

    def _is_current(self) -> bool:
        """Tell whether what is prepared was made of the tensors that are here."""
        if self.prepared is None or torch.compiler.is_compiling():
            return self.prepared is not None
        made, parameters, buffers = self._prepared_from, self._parameters, self._buffers
        # In every call, so without a loop.
        return (
            parameters["weight"] is made[0]
            and parameters["bias"] is made[1]
            and buffers[self._layout.absmax] is made[2]
            and buffers["outlier_dims"] is made[3]
            and buffers["outlier_weight"] is made[4]
        )

    def _set_weight(self, weight: Tensor) -> None:
        if weight is not self._parameters["weight"]:
            self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def _unprepare(self) -> bool:
        """Give the weight its own layout back; tell whether it was prepared."""
        prepared = self.prepared is not None
        self._set_weight(self.unpacked_weight())
        self.prepared = None
        return prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as `fn` does, but cast nothing that is part of the quantized weight."""
        prepared = self._unprepare()
        others = (self._buffers.get(name) for name in ("weight_format", "codebook"))
        buffers = (self.row_absmax, *others, self.outlier_dims)
        stored = [part for part in (self._parameters["weight"], *buffers) if part is not None]
        self._dtype = fn(self.row_absmax.new_empty(0, dtype=self._dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is part for part in stored):
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if prepared:
            # `to_empty` leaves values that nobody wrote; they are to be loaded.
            with contextlib.suppress(ValueError):
                self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along; what is prepared belongs to this machine."""
        weight = self.unpacked_weight()
        if weight is not self._parameters["weight"]:
            weight = nn.Parameter(weight, requires_grad=False)
        parameters = {**self._parameters, "weight": weight}
        prepared = {"prepared": self.prepared is not None, "_prepared_from": ()}
        return vars(self) | {"_parameters": parameters} | prepared

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on that state, and prepare what was prepared."""
        super().__setstate__(state | {"prepared": None})  # type: ignore[no-untyped-call]
        if state["prepared"]:
            self.prepare()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.unpacked_weight()
        if weight is not self._parameters["weight"]:
            destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Take on the number of outliers in the state; refuse a weight that has not been quantized."""
        weight = state_dict.get(f"{prefix}weight")
        expected = torch.int8 if self.kbit is None else torch.uint8
        if weight is not None and weight.dtype != expected:
            # copy_ would round it to int8 without a word.
            made = type(self).__name__
            lists[-1].append(f"{prefix}weight is {weight.dtype}, expected {expected}; see {made}.from_linear")
            return
        self._unprepare()
        dims, columns = (state_dict.get(prefix + name) for name in ("outlier_dims", "outlier_weight"))
        if dims is not None and columns is not None:
            here = self.outlier_weight
            device, dtype = self.row_absmax.device, columns.dtype if here is None else here.dtype
            if here is None or here.shape[1] != len(dims):
                self.outlier_dims = torch.zeros(len(dims), dtype=torch.int32, device=device)
                self.outlier_weight = torch.zeros(self.out_features, len(dims), dtype=dtype, device=device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        try:
            self.prepare()
        except ValueError as error:
            lists[-1].append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")


def _prepare(stored: StoredWeight, may_pack: bool) -> PreparedWeight:
    """Lay a weight out for the device it is on, by the facade for its format."""
    if isinstance(stored, KBitWeight):
        return kbit_linear.prepare(stored)
    assert isinstance(stored, Int8Weight)
    return linear.prepare(stored, may_pack)


def check_stored(stored: StoredWeight) -> None:
    """Check a weight by the rules for its format. Raises ValueError."""
    if isinstance(stored, KBitWeight):
        kbit_linear.check_weight(stored)
    elif isinstance(stored, Int8Weight):
        check_weight(stored)
