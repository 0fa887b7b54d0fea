"""GGUF of an int8 checkpoint: Q8_0 for what is int8 there, and all else as it is stored.

A weight is made whole first, with its exact columns and without its rotation, a block of rows at a time, and is then
rounded anew: in blocks of 32 along a row, each with a scale of its own. So the outlier columns are rounded from what
they were, and not from int8. What Q8_0 has no place for, a row that is no multiple of 32, and the layers that stay in
16 bit, have the dtype that they had; vectors are float32, as llama.cpp wants them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from llmint8.formats import Checkpoint, LLMInt8Error, OutputError
from llmint8.formats.containers.gguf.library import gguf_py
from llmint8.formats.containers.gguf.rows import Rows
from llmint8.formats.containers.gguf.writing import Q8_0, GgufOutput, packs, write_gguf
from llmint8.formats.disk.durable import named_errors, temporary_name, write_durably
from llmint8.formats.disk.names import CARD_NAME
from llmint8.formats.writing.writer import require_writable

from ..gguf.dialects import Dialect, dialect_for
from ..gguf.facts import ROPE_FREQUENCIES, add_facts, check_told, rope_frequencies
from ..gguf.vocabulary import add_tokenizer
from .layers import Layer

GGUF_NAME = "model-Q8_0.gguf"
_KINDS = {"F16": "F16", "BF16": "BF16"}
_MOSTLY = {"Q8_0": 7, "F16": 1, "BF16": 32}


def require_gguf_dest(dest: Path) -> None:
    """Refuse a directory that holds something else than what an interrupted export left. Raises OutputError."""
    left = temporary_name(dest / GGUF_NAME)
    if dest.is_dir() and [path.name for path in dest.iterdir()] == [left.name] and not left.is_symlink():
        return
    require_writable(dest)


def write(
    checkpoint: Checkpoint,
    dest: Path,
    config: Any | None,
    layers: dict[str, Layer],
    restored: set[str],
    card: str,
    progress: Callable[[str, int], None],
) -> tuple[int, list[str]]:
    """Write the file and a card beside it; return the bytes of its tensors, and what is said of it.

    Args:
        checkpoint: what is written.
        dest: the directory.
        config: of its model.
        layers: its int8 layers by name.
        restored: those of them that are written in 16 bit.
        card: the text beside the file.
        progress: called with the name and bytes of each tensor of the checkpoint that is done.

    Raises:
        LLMInt8Error: the architecture is none of those that are written, or has what llama.cpp cannot be told.
        OutputError: DEST holds something else, or cannot be written.

    """
    where = checkpoint.path
    dialect = dialect_for(checkpoint.config, where)
    if config is None:
        raise LLMInt8Error(f"{where}: transformers does not know its model, whose values GGUF has to have")
    notices = check_told(dialect, config, where)
    outputs = list(_outputs(checkpoint, dialect, config, layers, restored, progress))
    header, said = _header(where, dialect, config, outputs)
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{dest}: cannot be used as a directory: {error.strerror}") from None
    write_gguf(dest / GGUF_NAME, header, outputs)
    with named_errors(dest / CARD_NAME):
        write_durably(dest / CARD_NAME, card.encode())
    return sum(output.nbytes for output in outputs), notices + said


def _outputs(
    checkpoint: Checkpoint,
    dialect: Dialect,
    config: Any,
    layers: dict[str, Layer],
    restored: set[str],
    progress: Callable[[str, int], None],
) -> Iterator[GgufOutput]:
    """Yield the tensors of the file in the order of the checkpoint's. Raises LLMInt8Error where one has no name."""
    layer_of = {tensor: layer for layer in layers.values() for tensor in layer.tensors}
    whole = {f"{layer.name}.weight": layer for layer in layers.values()}
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    written = [info.name for info in infos if info.name not in layer_of or info.name in whole]
    names = dialect.names(written, config.num_hidden_layers)
    frequencies = rope_frequencies(config)
    if frequencies is not None:
        yield GgufOutput(ROPE_FREQUENCIES, tuple(frequencies.shape), "F32", [frequencies])
    tied = bool(config.tie_word_embeddings) and names.get("model.embed_tokens.weight") is not None
    for name in written:
        if name not in names:
            raise LLMInt8Error(f"{checkpoint.path}: {name} has no name in GGUF's {dialect.name}")
        if tied and names[name] == "output.weight":
            continue  # the embedding is it
        layer, info = whole.get(name), checkpoint.tensors[name]
        shape = (layer.record.out_features, layer.record.in_features) if layer else info.shape
        dtype = layer.dtype if layer else info.dtype
        kind = _KINDS.get(dtype, "F32") if len(shape) > 1 else "F32"
        if layer is not None and layer.name not in restored and packs(shape):
            kind = Q8_0
        parts = layer.tensors if layer else [name]
        nbytes = sum(checkpoint.tensors[part].nbytes for part in parts)
        read = layer.restored if layer else partial(checkpoint.read_rows, name)
        rows = dialect.rows(names[name], shape, config)
        yield GgufOutput(names[name], shape, kind, _read(read, rows, partial(progress, name, nbytes)))


def _read(read: Callable[[], Iterator[Tensor]], rows: Rows, done: Callable[[], None]) -> Iterator[Tensor]:
    """Yield a tensor as GGUF has it; it is read when it is asked for."""
    yield from rows.to_gguf(read())
    done()


def _header(where: Path, dialect: Dialect, config: Any, outputs: list[GgufOutput]) -> tuple[bytes, list[str]]:
    """Return what stands before the tensors, as gguf-py writes it, and what of the tokenizer is left out."""
    gguf = gguf_py()
    kinds = {output.kind for output in outputs}
    with TemporaryDirectory(prefix="llmint8-") as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, dialect.name)
        writer.add_name(where.resolve().name)
        writer.add_file_type(next((_MOSTLY[kind] for kind in _MOSTLY if kind in kinds), 0))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_facts(writer, dialect, config)
        notices = add_tokenizer(writer, where, config.vocab_size)
        for output in outputs:
            raw = gguf.GGMLQuantizationType[output.kind]
            writer.add_tensor_info(output.name, output.shape, float, output.nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes(), notices
