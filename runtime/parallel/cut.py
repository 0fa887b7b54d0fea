"""The part of a layer that one of several processes holds, cut out of the whole and put together again.

A layer is cut by its outputs (rows of the weight, with their scales, their bias and their part of the outlier columns)
or by its inputs (columns of the weight, and the outlier columns whose dimensions are among them). The scales are those
of whole rows, which are as right for a part of a row. Of a layer that is cut by its inputs the first process has the
bias: what they compute is added up, and so it is added once.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmint8.formats import LLMInt8Error
from llmint8.kernels.reference import outliers_among

from ..layers.layer import Int8Linear

_PARTS = ("outlier_dims", "outlier_weight")


@dataclass(frozen=True)
class Cut:
    """How a layer is cut.

    Attributes:
        by: `outputs` or `inputs`.
        shape: out_features and in_features of the whole layer.
        pieces: the outputs or inputs that are here, in order. Two pieces where two matrices stand one behind the other
            in the layer, and each is cut.
        mesh: the processes, in one dimension.
        placements: how torch's `DTensor` calls it, of the weight.

    """

    by: Literal["outputs", "inputs"]
    shape: tuple[int, int]
    pieces: tuple[range, ...]
    mesh: Any
    placements: tuple[Any, ...] = ()

    @property
    def width(self) -> int:
        """How many outputs or inputs are here."""
        return sum(len(piece) for piece in self.pieces)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Return what is here of a tensor with an entry for each output, in memory of its own."""
        return torch.cat([tensor[piece.start : piece.stop] for piece in self.pieces])


def cut_of(layer: nn.Module) -> Cut | None:
    """Return how a layer is cut, or None where this process holds all of it."""
    found: Cut | None = vars(layer).get("_cut")
    return found


def cut_layers(model: nn.Module) -> dict[str, tuple[Int8Linear, Cut]]:
    """Return the int8 layers of a model that are cut, by their names."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    return {name: (layer, cut) for name, layer in layers.items() if (cut := cut_of(layer)) is not None}


def plan_cut(layer: Int8Linear, by: Literal["outputs", "inputs"], matrices: int, mesh: Any) -> None:
    """Settle which part of a layer this process will hold: equal parts, rounded up, as torch cuts tensors.

    Args:
        layer: on the meta device, whole.
        by: what is cut.
        matrices: how many stand one behind the other in its outputs.
        mesh: the processes, in one dimension.

    Raises:
        LLMInt8Error: some process would hold nothing, or a rotated block would be cut.

    """
    sizes = layer.out_features, layer.in_features
    size, ranks, rank = sizes[by == "inputs"] // matrices, mesh.size(), mesh.get_local_rank()
    each = -(-size // ranks)
    what = f"{layer.name}: {size * matrices} {by} cannot be cut for {ranks} processes"
    if size * matrices != sizes[by == "inputs"]:
        raise LLMInt8Error(f"{what}: they are those of {matrices} matrices of one size")
    if each * (ranks - 1) >= size:
        raise LLMInt8Error(f"{what}: one would have none; start fewer")
    if by == "inputs" and layer.rotation is not None and each % layer.rotation:
        raise LLMInt8Error(
            f"{what}: each would have {each}, and it is rotated in blocks of {layer.rotation}; start another number of "
            "processes, or convert without --rotate"
        )
    start, stop = min(rank * each, size), min((rank + 1) * each, size)
    pieces = tuple(range(matrix * size + start, matrix * size + stop) for matrix in range(matrices))
    vars(layer)["_cut"] = Cut(by, sizes, pieces, mesh)


def settle_cuts(model: nn.Module) -> None:
    """Leave in each layer that is cut what belongs here, as plain tensors in memory of their own.

    By now transformers has read of the weight and the bias what belongs here, and of all else the whole.
    """
    for layer, cut in cut_layers(model).values():
        weight: Any = layer._parameters["weight"]
        bias: Any = layer._parameters["bias"]
        vars(layer)["_cut"] = cut = replace(cut, placements=tuple(weight.placements))
        layer._parameters["weight"] = nn.Parameter(_own(weight), requires_grad=False)
        if cut.by == "outputs":
            layer.out_features = cut.width
            _cut_outputs(layer, cut)
        else:
            layer.in_features = cut.width
            _cut_inputs(layer, cut)
        holds_bias = bias is not None and (cut.by == "outputs" or cut.mesh.get_local_rank() == 0)
        layer._parameters["bias"] = nn.Parameter(_own(bias), requires_grad=False) if holds_bias else None


def _own(tensor: Any) -> Tensor:
    """Return this process's part, in memory of its own: what is left of the file in memory is the whole of it."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().clone(memory_format=torch.contiguous_format)


def _cut_outputs(layer: Int8Linear, cut: Cut) -> None:
    buffers = layer._buffers
    buffers[layer._layout.absmax] = cut.of_rows(layer.row_absmax)
    if layer.outlier_dims is not None and layer.outlier_weight is not None:
        buffers["outlier_dims"] = layer.outlier_dims.clone()
        buffers["outlier_weight"] = cut.of_rows(layer.outlier_weight)


def _cut_inputs(layer: Int8Linear, cut: Cut) -> None:
    (piece,), buffers = cut.pieces, layer._buffers
    buffers[layer._layout.absmax] = layer.row_absmax.clone()
    if layer.outlier_dims is not None and layer.outlier_weight is not None:
        dims, columns = outliers_among(layer.outlier_dims, layer.outlier_weight, piece)
        buffers["outlier_dims"], buffers["outlier_weight"] = dims, columns.contiguous()


def whole_tensors(layer: Int8Linear, cut: Cut) -> dict[str, Tensor]:
    """Put the tensors of a layer together again, as they were in the checkpoint; every process of the mesh calls it.

    Returns:
        The tensors by their names in the layer, those that are cut. The bias of a layer that is cut by its inputs
        is not among them: the first process has it.

    """

    def whole(tensor: Tensor, placements: tuple[Any, ...], *shape: int) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        made = DTensor.from_local(
            tensor.contiguous(), cut.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return made.full_tensor()

    outputs, placements = cut.shape[0], cut.placements
    found = {"weight": whole(layer.unpacked_weight(), placements, *cut.shape)}
    if cut.by == "outputs":
        found[layer._layout.absmax] = whole(layer.row_absmax, placements, outputs)
        if layer.bias is not None:
            found["bias"] = whole(layer.bias.detach(), placements, outputs)
        if layer.outlier_weight is not None:
            found["outlier_weight"] = whole(layer.outlier_weight, placements, outputs, layer.outlier_weight.shape[1])
    elif layer.outlier_dims is not None and layer.outlier_weight is not None:
        dims = _joined(layer.outlier_dims + cut.pieces[0].start, cut.mesh)
        found |= zip(_PARTS, (dims, _joined(layer.outlier_weight.t(), cut.mesh).t().contiguous()), strict=True)
    return found


def _joined(rows: Tensor, mesh: Any) -> Tensor:
    """Return the rows of all processes, which may have different numbers of them."""
    group = mesh.get_group()
    count = torch.tensor(len(rows), device=rows.device)
    counts = [torch.empty_like(count) for _ in range(mesh.size())]
    dist.all_gather(counts, count, group=group)
    most = max(int(one) for one in counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(one)] for part, one in zip(parts, counts, strict=True)])
