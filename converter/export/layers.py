"""What an int8 checkpoint holds of each weight: its int8 values, and the weight that they stand for."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from llmint8.formats import DTYPES, FLOAT_DTYPES, Checkpoint, Int8Record, TensorSpec
from llmint8.kernels.kbit.levels import levels_of
from llmint8.kernels.kbit.packing import unpack
from llmint8.kernels.kbit.reference import dequantize_codes
from llmint8.kernels.reference import dequantize_weight

from ..model.experts import expert_matrices
from ..model.names import module_names


@dataclass(frozen=True)
class Layer:
    """An int8 layer of a checkpoint.

    Attributes:
        checkpoint: where it is.
        record: what is stored of it.
        module: its module in the model; its name where the model is not known.
        transposed: whether the model keeps the weight [in, out].

    """

    checkpoint: Checkpoint
    record: Int8Record
    module: str
    transposed: bool

    @property
    def name(self) -> str:
        """Name in the checkpoint."""
        return self.record.name

    @property
    def tensors(self) -> list[str]:
        """The tensors of the checkpoint that are the layer's alone; its bias is a tensor as any."""
        suffixes = [*self.checkpoint.layout.weight_suffixes(self.record.scheme), "outlier_dims", "outlier_weight"]
        return [f"{self.name}.{suffix}" for suffix in suffixes if f"{self.name}.{suffix}" in self.checkpoint.tensors]

    @property
    def dtype(self) -> str:
        """The dtype that its weight had, in safetensors' spelling: that of its columns, or else of the model."""
        columns = self.checkpoint.tensors.get(f"{self.name}.outlier_weight")
        if columns is not None:
            return columns.dtype
        others = (info.dtype for info in self.checkpoint.tensors.values() if not self._is_of_a_layer(info.name))
        return next((dtype for dtype in others if dtype in FLOAT_DTYPES), "F16")

    def _is_of_a_layer(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.checkpoint.records

    @property
    def weight(self) -> TensorSpec:
        """The weight as the source had it."""
        shape = (self.record.out_features, self.record.in_features)
        return TensorSpec(f"{self.name}.weight", self.dtype, shape[::-1] if self.transposed else shape)

    def absmax(self) -> Tensor:
        """Read the absmax of each row, float32 [N]; of k bits those of its blocks, [N, G]."""
        return self.checkpoint.read(f"{self.name}.{self.checkpoint.layout.absmax}").float()

    def _outliers(self) -> tuple[Tensor, Tensor] | None:
        names = f"{self.name}.outlier_dims", f"{self.name}.outlier_weight"
        if not set(names) <= self.checkpoint.tensors.keys():
            return None
        return self.checkpoint.read(names[0]).long(), self.checkpoint.read(names[1]).float()

    def values(self) -> Iterator[Tensor]:
        """Yield the int8 values, or the packed codes, in blocks of rows."""
        return self.checkpoint.read_rows(f"{self.name}.weight")

    def restored(self) -> Iterator[Tensor]:
        """Yield the weight in blocks of rows, float32: dequantized, rotated back, and exact in the outlier columns."""
        start, absmax, outliers = 0, self.absmax(), self._outliers()
        for values in self.values():
            rows = slice(start, start + len(values))
            block = self._dequantized(values, absmax[rows])
            if outliers is not None:
                dims, columns = outliers
                block[:, dims] = columns[rows]
            yield block
            start = rows.stop

    def _dequantized(self, values: Tensor, absmax: Tensor) -> Tensor:
        kbit = self.record.scheme.kbit
        if kbit is None:
            return dequantize_weight(values, absmax, self.record.scheme.rotation)
        own = f"{self.name}.codebook"
        levels = self.checkpoint.read(own).float() if kbit.has_codebook else levels_of(kbit.data_type, kbit.bits)
        codes = unpack(values, kbit.bits, self.record.in_features)
        return dequantize_codes(codes, absmax, levels, kbit.block)

    def original(self) -> Iterator[Tensor]:
        """Yield the weight as `weight` describes it; one that is transposed as a whole."""
        dtype = DTYPES[self.dtype]
        blocks = (block.to(dtype) for block in self.restored())
        return iter([torch.cat(list(blocks)).t().contiguous()]) if self.transposed else blocks


@dataclass(frozen=True)
class Stack:
    """The layers that are matrices of one tensor of all experts, in their order."""

    name: str
    layers: list[Layer]

    @property
    def weight(self) -> TensorSpec:
        """The tensor as the source had it."""
        first = self.layers[0].weight
        return TensorSpec(self.name, first.dtype, (len(self.layers), *first.shape))

    def original(self) -> Iterator[Tensor]:
        """Yield the tensor, an expert at a time."""
        return (torch.cat(list(layer.original()))[None] for layer in self.layers)


def layers_of(checkpoint: Checkpoint, model: Any | None) -> tuple[dict[str, Layer], dict[str, Stack], set[str]]:
    """Return the layers by name, the stacks that some of them are parts of, and the names of those of experts.

    Args:
        checkpoint: an int8 checkpoint.
        model: its model on the meta device; without one no layer is taken to be transposed or an expert's.

    """
    names = {} if model is None else module_names(model, [f"{name}.weight" for name in checkpoint.records])
    modules = {tensor.removesuffix(".weight"): module.removesuffix(".weight") for tensor, module in names.items()}
    matrices = {} if model is None else {matrix.name: matrix for matrix in expert_matrices(model, checkpoint.tensors)}
    found: dict[str, Layer] = {}
    stacks: dict[str, list[Layer]] = defaultdict(list)
    for name, record in checkpoint.records.items():
        matrix = matrices.get(name)
        module = modules.get(name, name)
        conv = model is not None and name in modules and isinstance(model.get_submodule(module), Conv1D)
        found[name] = Layer(checkpoint, record, module, matrix.transposed if matrix else conv)
        if matrix is not None and matrix.shared:
            stacks[matrix.tensor].append(found[name])
    for layers in stacks.values():
        layers.sort(key=lambda layer: matrices[layer.name].expert)
    whole = {name: Stack(name, layers) for name, layers in stacks.items()}
    return found, whole, found.keys() & matrices.keys()
