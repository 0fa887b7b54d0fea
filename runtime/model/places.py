"""Where the layers of a checkpoint belong in a model, and whether they fit there; and what goes along with a place."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.converter.model.experts import ExpertMatrix, expert_matrices
from llmint8.formats import Int8Record, LLMInt8Error


def linear_for(model: nn.Module, name: str, record: Int8Record) -> nn.Linear | Conv1D:
    """Return the layer an int8 record stands for.

    Raises:
        LLMInt8Error: there is none, it is not a plain linear layer, or its shape is another.

    """
    where = _where(model, record)
    if not name:
        raise LLMInt8Error(f"{where} has no layer of its own for it")
    module = model.get_submodule(name)
    if isinstance(module, Conv1D):
        out_features, in_features = module.nf, module.nx
    elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        out_features, in_features = module.out_features, module.in_features
    else:
        raise LLMInt8Error(f"{where} has {type(module).__name__} there, expected Linear or Conv1D")
    if (out_features, in_features) != (record.out_features, record.in_features):
        raise _another_shape(model, record, out_features, in_features)
    return module


def embedding_for(model: Any, name: str, record: Int8Record) -> tuple[nn.Embedding, str | None]:
    """Return the embedding that an int8 table stands for, and the name of the head that multiplies by it, if one does.

    Raises:
        LLMInt8Error: there is no embedding, its shape is another, or the head is not tied to it.

    """
    embedding = model.get_submodule(name) if name else None
    if not isinstance(embedding, nn.Embedding):
        raise LLMInt8Error(f"{_where(model, record)} has {type(embedding).__name__} there, expected Embedding")
    if (embedding.num_embeddings, embedding.embedding_dim) != (record.out_features, record.in_features):
        raise _another_shape(model, record, embedding.num_embeddings, embedding.embedding_dim)
    if record.scheme.lookup == "only":
        return embedding, None
    tied = (one for pair in model.all_tied_weights_keys.items() if f"{name}.weight" in pair for one in pair)
    heads = {one.removesuffix(".weight") for one in tied} - {name}
    if len(heads) != 1 or not isinstance(model.get_submodule(*heads), nn.Linear):
        raise LLMInt8Error(f"{_where(model, record)} has no output head that is tied to it; expected one")
    return embedding, heads.pop()


def check_in_one_place(name: str, device_map: Any) -> None:
    """Refuse to put an embedding that its head shares anywhere but on one device, in memory. Raises LLMInt8Error."""
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
    if len(places) > 1 or "disk" in places:  # accelerate moves module by module, and the two have one set of tensors
        raise LLMInt8Error(
            f"{name}: int8, and the output head multiplies by it: such a model is neither split over devices nor "
            "offloaded; load it on one device, or convert without --quantize-embeddings"
        )


def _where(model: nn.Module, record: Int8Record) -> str:
    return f"{record.name}: int8 in the checkpoint, but {type(model).__name__}"


def _another_shape(model: nn.Module, record: Int8Record, out_features: int, in_features: int) -> LLMInt8Error:
    found = [record.out_features, record.in_features]
    return LLMInt8Error(f"{_where(model, record)} wants shape {[out_features, in_features]}, not {found}")


def matrices_of(model: nn.Module, records: Iterable[Int8Record], tensors: Collection[str]) -> dict[str, ExpertMatrix]:
    """Return the matrices of experts that are layers of the checkpoint, by their names in it."""
    names = {record.name for record in records}
    matrices = expert_matrices(model, tensors)
    return {matrix.name: matrix for matrix in matrices} if any(m.name in names for m in matrices) else {}


def check_matrix(model: nn.Module, matrix: ExpertMatrix, record: Int8Record) -> None:
    """Hold a matrix of an expert against the model. Raises LLMInt8Error: its shape is another."""
    stack = model.get_submodule(matrix.experts).get_parameter(matrix.projection)
    inputs, outputs = (stack.shape[1], stack.shape[2]) if matrix.transposed else (stack.shape[2], stack.shape[1])
    if record.in_features != inputs or record.out_features > outputs:
        raise _another_shape(model, record, outputs, inputs)


def check_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]], names: dict[str, str]) -> None:
    """Find a tensor of another shape before transformers does: depending on its version it may say nothing."""
    expected = model.state_dict()
    for tensor, name in names.items():
        if shapes[tensor] != tuple(expected[name].shape):
            wanted = list(expected[name].shape)
            raise LLMInt8Error(f"{tensor}: shape {list(shapes[tensor])}, {type(model).__name__} wants {wanted}")


def take_hook(layer: nn.Module, made: nn.Module) -> None:
    """Let accelerate move the inputs of a layer as it moved those of the one before it, in a model on many devices."""
    if (hook := getattr(layer, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(made, hook)
