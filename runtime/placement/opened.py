"""SOURCE of a plan, opened: a size that is known by name, or a checkpoint in 16 bit or in int8, here or on the Hub.

Of weight files the headers are read, and nothing else.
"""

from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from llmint8.converter.hub.origin import Resolved
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.model.architecture import settle_class
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.config import load_config
from llmint8.formats import (
    Checkpoint,
    CheckpointError,
    Quantization,
    Source,
    SourceError,
    TensorInfo,
    open_checkpoint,
    open_source,
    read_json,
)
from llmint8.formats.disk.names import CONFIG_NAME
from llmint8.formats.sources.quantized import stored_quantization

from .known import KNOWN, known_config
from .sized import Sized, sized_checkpoint, sized_source


def open_sized(source: str) -> Sized:
    """Open SOURCE: what lies in a directory of this name comes first, then a size that is known by it, then the Hub.

    Raises:
        SourceError, CheckpointError, CorruptFileError: it is none of what it may be.

    """
    name, here = source.lower(), Path(source).expanduser().exists()
    if name in KNOWN and not here:
        config = known_config(name)
        return sized_source(name, "a size known by name", _made_of(config, name), config)
    try:
        origin = resolve(source, weights=False)
    except SourceError as error:
        if "/" in source or here:
            raise
        raise SourceError(f"{error}; sizes that are known by name: {', '.join(KNOWN)}") from None
    where = "a directory" if origin.repo is None else f"on the Hub, commit {str(origin.commit)[:12]}"
    stated = _stated(origin.path)
    if "llmint8" in (*stated, stated.get("quant_method")):
        return sized_checkpoint(origin.name, where, _checkpoint(origin), load_config(origin.path))
    if (checkpoint := _of_bitsandbytes(origin, stated)) is not None:
        return sized_checkpoint(origin.name, where, checkpoint, load_config(origin.path))
    opened = _opened(origin)
    config = load_config(opened.beside)
    config, said = (None, []) if config is None else settle_class(config, opened)
    sized = sized_source(origin.name, where, opened, config)
    sized.notices[:0] = [*opened.notices, *said]
    return sized


def _stated(path: Path) -> dict[str, Any]:
    """Return what a directory says of its being quantized; nothing where it is not, or has something else there."""
    if not (path / CONFIG_NAME).exists():
        return {}
    stated = stored_quantization(path, read_json(path / CONFIG_NAME))
    return stated if isinstance(stated, dict) else {}


def _of_bitsandbytes(origin: Resolved, stated: dict[str, Any]) -> Checkpoint | None:
    """Return an int8 checkpoint that bitsandbytes wrote; None for what is none, though its config may say so."""
    try:
        found = _checkpoint(origin) if stated and Quantization.from_dict(stated) else None
    except (ValueError, CheckpointError):
        return None
    return found if found and found.records else None


def _opened(origin: Resolved) -> Source:
    if not origin.remote:
        return open_source(origin.path)
    from llmint8.converter.hub.low_disk import open_remote

    return open_remote(origin, origin.path)  # where nothing is ever fetched to


def _checkpoint(origin: Resolved) -> Checkpoint:
    if not origin.remote:
        return open_checkpoint(origin.path)
    from llmint8.converter.hub.remote import read_remote_header

    return open_checkpoint(origin.path, lambda name: read_remote_header(origin, name)[1])


def _made_of(config: Any, name: str) -> Source:
    """Return the source that a model of this config would be saved as, in float16; it has no files."""
    model = meta_model(config)
    tied = model.all_tied_weights_keys  # type: ignore[union-attr]
    own = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}  # type: ignore[union-attr]
    saved = revert_weight_conversion(model, own)
    tensors = {key: TensorInfo(key, "F16", tuple(tensor.shape), "", 0) for key, tensor in saved.items()}
    return Source(Path(name), config.to_dict(), [], tensors, [])
