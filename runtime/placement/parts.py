"""What the tensors of a model take: in 16 bit, and where their layer is int8."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.formats import DTYPES, FLOAT_DTYPES, KBit, Layout, TensorSpec
from llmint8.formats.int8.schemes import Lookup
from llmint8.kernels.checks import padded_outliers
from llmint8.kernels.reference import Group, groups, row_sum_dtype

Kind = Literal["linear", "kept", "embedding", "head", "norm", "rest"]
KINDS: dict[Kind, str] = {
    "linear": "Linear layers",
    "kept": "Linear, not int8",
    "embedding": "Embeddings",
    "head": "Output head",
    "norm": "Norms",
    "rest": "All else",
}
HALF = 2
_EMBEDDING = re.compile(r"emb|wte|wpe|position|shared")
_HEAD = re.compile(r"head|classifier|score")
_NORM = re.compile(r"norm|(^|[._])ln(_|$)")


@dataclass(frozen=True)
class Int8Bytes:
    """Bytes of an int8 layer without its bias. All but `prepared` is in the checkpoint, too.

    Attributes:
        values: the int8 values.
        columns: the outlier columns, and the dimensions that they are of.
        scales: the absmax of each row.
        prepared: what is made of these when the layer is loaded, to be read by the kernels, and held beside them: scale
            and sums of each row, and the outlier columns as they are read.

    """

    values: int
    columns: int
    scales: int
    prepared: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.values + self.columns + self.scales + self.prepared


@dataclass(frozen=True)
class Part:
    """A tensor of a model, or the weight of an int8 layer with all that belongs to it.

    Attributes:
        name: in the checkpoint.
        place: its name in the model, where that is known.
        kind: what it is.
        half: bytes in 16 bit.
        stored: bytes beside int8 layers; not of those.
        int8: bytes of an int8 layer; None of all else.
        width: how many numbers of an int8 layer's input and output there are for a token.
        twice: bytes of a tensor that shares its memory with another in the model, and has its own in the file.

    """

    name: str
    place: str
    kind: Kind
    half: int
    stored: int
    int8: Int8Bytes | None = None
    width: int = 0
    twice: int = 0

    def taken(self, int8: bool) -> int:
        """Return the bytes that it takes in GPU memory, in int8 where it is a layer of it, or in 16 bit."""
        if not int8:
            return self.half
        return self.stored if self.int8 is None else self.int8.total


def layer_bytes(
    out_features: int, in_features: int, outliers: int, layout: Layout, group: Group | None, stacked: bool = False
) -> Int8Bytes:
    """Return what an int8 layer takes, its outlier columns in 16 bit; see `kernels/operands.py` for what is prepared.

    Args:
        out_features, in_features: N, K.
        outliers: how many columns it stores.
        layout: what its tensors are.
        group: how many dimensions of an input share a scale; None is all of them.
        stacked: whether it is a matrix of an expert. Where all experts are multiplied at once, their prepared tensors
            are held twice, once in a stack.

    """
    n, k = out_features, min(outliers, in_features)
    number, _ = groups(in_features, group)
    sums = n * number * row_sum_dtype(number).itemsize
    prepared = 4 * n + sums + HALF * n * padded_outliers(k)
    return Int8Bytes(
        values=n * in_features,
        columns=(HALF * n + 4) * k,
        scales=4 * n + int(layout.weight_format),
        prepared=prepared * (2 if stacked else 1),
    )


def kbit_bytes(out_features: int, in_features: int, outliers: int, kbit: KBit) -> Int8Bytes:
    """Return what a layer of k bits takes, its outlier columns in 16 bit; see `kernels/kbit/operands.py`."""
    n, k = out_features, min(outliers, in_features)
    codebook = HALF * 2**kbit.bits if kbit.has_codebook else 0
    return Int8Bytes(
        values=n * kbit.row_bytes(in_features),
        columns=(HALF * n + 4) * k,
        scales=HALF * n * kbit.blocks(in_features) + codebook,
        prepared=4 * n * k + 4 * 2**kbit.bits,
    )


def table_bytes(layer: Int8Bytes, lookup: Lookup) -> Int8Bytes:
    """Return what an embedding in int8 takes, from what a layer of its shape does: alone it has nothing prepared."""
    return replace(layer, prepared=0) if lookup == "only" else layer


def half_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a tensor with floating-point numbers in 16 bit; what is none keeps its dtype."""
    return spec.nbytes // DTYPES[spec.dtype].itemsize * HALF if spec.dtype in FLOAT_DTYPES else spec.nbytes


def kind_of(model: Any | None, place: str, heads: set[str]) -> Kind:
    """Return what a tensor beside the int8 layers is.

    Args:
        model: a transformers model on the meta device, or None.
        place: the tensor's name in it; or in the checkpoint, where the name has to do.
        heads: names of modules that are an output head, or a part of one.

    """
    name = place.rpartition(".")[0]
    module = _module(model, name)
    if name in heads:
        return "head"
    if isinstance(module, nn.Embedding) or (module is None and _EMBEDDING.search(name)):
        return "embedding"
    if module is None:
        return "head" if _HEAD.search(name) else "norm" if _NORM.search(name) else "rest"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "kept" if isinstance(module, nn.Linear | Conv1D) else "rest"


def _module(model: Any | None, name: str) -> nn.Module | None:
    try:
        return None if model is None else model.get_submodule(name)
    except AttributeError:
        return None
