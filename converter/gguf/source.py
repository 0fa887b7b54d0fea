"""A GGUF file opened as a source: transformers says what model it holds, gguf-py what its tensors are called.

The file's header has been read and bounded before either sees it. transformers makes config and tokenizer; what its
reader leaves out of them, and would be another model without, is added here from the same facts, or refused.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmint8.formats import Source, SourceError, open_source
from llmint8.formats.containers.gguf.header import GgufHeader, read_gguf
from llmint8.formats.containers.gguf.library import gguf_py
from llmint8.formats.disk.names import CONFIG_NAME, WEIGHT_NAMES
from llmint8.formats.disk.reading import require_inside
from llmint8.formats.disk.small_files import small_files
from llmint8.formats.sources.gguf import GgufFile, gguf_source, is_packed

from ..model.build import meta_model
from ..words import count
from .dialects import Dialect, dialect_of
from .facts import ROPE_FREQUENCIES
from .made import made_config, made_tokenizer

GGUF_SUFFIX = ".gguf"
_SPLIT = "split.count"


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or the one in a directory without other weights; None where there is none.

    Raises:
        SourceError: there are several, or a link leads away.

    """
    if path.is_file():
        return path if path.suffix.lower() == GGUF_SUFFIX else None
    if not path.is_dir() or any((path / name).exists() for name in WEIGHT_NAMES):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == GGUF_SUFFIX)
    if len(found) > 1:
        named = ", ".join(file.name for file in found[:5])
        raise SourceError(f"{path}: {count(len(found), 'GGUF file')}, {named}; name the one to read")
    if found:
        require_inside(found[0], path)
    return found[0] if found else None


def open_local(path: Path) -> Source:
    """Open a source that is on the disk: a directory as `open_source` does, or a GGUF file.

    Raises:
        LLMInt8Error: what `open_source` raises; or a GGUF file of an architecture that is not known.

    """
    file = gguf_of(path)
    return open_source(path) if file is None else open_gguf(file)


def open_gguf(path: Path) -> Source:
    """Open a GGUF file. Raises LLMInt8Error."""
    header = read_gguf(path)
    dialect = dialect_of(header.architecture, path)
    if header.facts.get(_SPLIT, 1) != 1:
        raise SourceError(f"{path}: one of {header.facts[_SPLIT]} files; join them with llama-gguf-split --merge")
    if header.facts.get(f"{dialect.name}.expert_count", 0):
        raise SourceError(f"{path}: a mixture of experts, which is not read from GGUF")
    config = made_config(header, dialect)
    file = _file(header, dialect, config)
    beside = TemporaryDirectory(prefix="llmint8-")
    notices = _fill(beside, header, config)
    packed = [tensor for tensor in header.tensors.values() if is_packed(tensor)]
    quantized = f"GGUF {_file_type(header)}" if packed else ""
    if packed:
        notices.append(
            f"{count(len(packed), 'tensor')} of the source are quantized ({quantized}), and are read as the float32 "
            "that they stand for; what that rounding has cost stays, and int8 comes on top. What does not become int8 "
            "stays float32, unless --dtype casts it"
        )
    return gguf_source(file, json.loads((Path(beside.name) / CONFIG_NAME).read_text()), beside, quantized, notices)


def _file(header: GgufHeader, dialect: Dialect, config: Any) -> GgufFile:
    """Return the file with the names of a model of this config. Raises SourceError: they do not belong together."""
    model = meta_model(config)
    if model is None:
        raise SourceError(f"{header.path}: transformers has no model of type {config.model_type}")
    state = model.state_dict()
    there = {name: key for key, name in dialect.names(state, config.num_hidden_layers).items()}
    unknown = header.tensors.keys() - there.keys() - {ROPE_FREQUENCIES}
    if unknown:
        raise SourceError(f"{header.path}: {min(unknown)} has no place in a {type(model).__name__}")
    names = {name: there[name] for name in header.tensors if name in there}
    file = GgufFile(header, names, lambda tensor: dialect.rows(tensor.name, tensor.shape, config))
    for key, info in file.tensors.items():
        if info.shape != tuple(state[key].shape):
            raise SourceError(
                f"{header.path}: {key} is {list(info.shape)}, {list(state[key].shape)} in a {type(model).__name__} of "
                "this file's values"
            )
    return file


def _fill(beside: TemporaryDirectory[str], header: GgufHeader, config: Any) -> list[str]:
    """Put config, tokenizer and what lies beside the file into a directory; return what there is to say."""
    home, folder = Path(beside.name), header.path.parent
    others = [path for path in folder.iterdir() if path.suffix.lower() == GGUF_SUFFIX]
    # Of a file among others nobody knows what belongs to it.
    for file in small_files(folder) if len(others) == 1 and not (folder / CONFIG_NAME).exists() else ():
        place = home / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    (home / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    return made_tokenizer(header, home)


def _file_type(header: GgufHeader) -> str:
    """Return the name of the kind of file, such as Q4_K_M."""
    try:
        name = str(gguf_py().LlamaFileType(header.facts.get("general.file_type", -1)).name)
    except ValueError:
        return "of another kind"
    return name.removeprefix("MOSTLY_")
