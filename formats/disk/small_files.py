"""What lies beside the weights and goes along: tokenizer, generation config, chat template, licence.

And what a sentence encoder is made of beside its transformer: `modules.json` names a folder for each part, with a
config and perhaps with weights of its own, which stay as they are.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import SourceError
from .names import ADAPTER_CONFIG_NAME, CONFIG_NAME, LEGACY_QUANTIZATION_NAME
from .reading import check_is_no_pointer, is_pointer, open_regular, require_inside
from .strict_json import parse_json

WEIGHT_SUFFIXES = tuple(
    ".partial .safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .ggml .onnx .ot .npz .tflite .pkl .pdparams".split()  # noqa: SIM905
)
MODULES_NAME = "modules.json"
MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES_BYTES = 512 << 20  # together; they are in memory together
_TEMPLATES = "additional_chat_templates"
_MODULE_WEIGHTS = (".safetensors", ".bin")
_READ_SUFFIXES = (".json", ".jsonl", ".model", ".jinja", ".txt", ".py", ".bpe", ".spm", ".tiktoken", ".vocab", ".yaml")
_MOST_MODULES = 100


def small_files(path: Path) -> list[Path]:
    """Return tokenizer, generation config, chat template, licence and whatever else is small and not weights.

    Raises:
        SourceError: a link out of the directory, a name that cannot be printed, a folder outside, or too much of it.
        CorruptFileError: a pointer of git-lfs in place of a file that something reads.

    """
    found = sorted(file for file in _candidates(path) if _is_small_file(file, path))
    size = sum(file.stat().st_size for file in found)
    if size > MAX_SMALL_FILES_BYTES:
        raise SourceError(f"{path}: {size} bytes beside the weights, at most {MAX_SMALL_FILES_BYTES} are copied")
    return found


def left_behind(path: Path) -> list[str]:
    """Say what lies beside the weights, is none of them, and does not go along."""
    too_large = [
        f"{file.relative_to(path).as_posix()} ({file.stat().st_size / 1e6:.1f} MB) stays behind: only files of up to "
        "64 MiB are copied"
        for file in _candidates(path)
        if _is_beside(file, path) and file.stat().st_size > MAX_SMALL_FILE_BYTES
    ]
    pointers = [
        f"{file.relative_to(path).as_posix()} stays behind: a pointer of git-lfs in place of the file"
        for file in _candidates(path)
        if _is_idle_pointer(file, path)
    ]
    taken = {_TEMPLATES, *(folder.partition("/")[0] for folder in module_folders(path))}
    folders = [file for file in sorted(path.iterdir()) if file.is_dir()]
    left = [file.name for file in folders if file.name not in taken and not file.name.startswith((".", "__"))]
    return too_large + pointers + [f"{name}/ stays behind: a folder that no {MODULES_NAME} names" for name in left]


def module_folders(path: Path, there: bool = True) -> list[str]:
    """Return the folders that `modules.json` of a sentence encoder names, relative to its directory.

    Args:
        path: the directory.
        there: leave out those that are not there.

    Raises:
        SourceError: one is outside of the directory, or has a name that cannot be printed.

    """
    file = path / MODULES_NAME
    if not file.is_file() or file.stat().st_size > MAX_SMALL_FILE_BYTES:
        return []
    require_inside(file, path)
    with open_regular(file) as opened:
        raw = opened.readall()
    try:
        modules = parse_json(raw)
    except ValueError:  # it is somebody else's file, and is copied as it is
        return []
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    folders = [name for name in named if name not in (None, "", ".")][:_MOST_MODULES]
    for name in folders:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name):
            raise SourceError(f"{file}: path is {str(name)[:80]!r}, expected a folder in this directory")
    return [name for name in dict.fromkeys(folders) if not there or (path / name).is_dir()]


def _candidates(path: Path) -> Iterator[Path]:
    yield from sorted(path.iterdir())
    if (path / _TEMPLATES).is_dir():
        yield from sorted((path / _TEMPLATES).iterdir())
    for folder in module_folders(path):
        yield from sorted((path / folder).iterdir())


def _is_beside(file: Path, directory: Path) -> bool:
    name, in_module = file.name, file.parent != directory and file.parent.name != _TEMPLATES
    # Adapters stay behind: their weights are not converted. What quantized the source once did not quantize this.
    not_copied = () if in_module else (CONFIG_NAME, ADAPTER_CONFIG_NAME, LEGACY_QUANTIZATION_NAME)
    if name in not_copied or name.endswith(".index.json") or name.startswith((".", "llmint8_")) or not file.is_file():
        return False
    suffix = file.suffix.lower()
    return suffix not in WEIGHT_SUFFIXES or (in_module and suffix in _MODULE_WEIGHTS)


def _is_small_file(file: Path, directory: Path) -> bool:
    if not _is_beside(file, directory) or file.stat().st_size > MAX_SMALL_FILE_BYTES:
        return False
    if not file.name.isprintable():
        raise SourceError(
            f"{directory}: {file.name[:80]!r} is not a name that can be printed; rename or remove the file"
        )
    require_inside(file, directory)
    if _is_read(file):
        with open_regular(file) as opened:
            check_is_no_pointer(file, opened.read(64) or b"")
    return not _is_idle_pointer(file, directory)


def _is_read(file: Path) -> bool:
    """Tell whether something that loads the model may read a file: then a pointer in its place is refused."""
    name, suffix = file.name.lower(), file.suffix.lower()
    if suffix in _MODULE_WEIGHTS:  # those of a model are none of the small files
        return True
    # Vocabularies have any ending: `merges.txt`, `vocab.bpe`, `source.spm`, `qwen.tiktoken`.
    return suffix in _READ_SUFFIXES or name.startswith(("tokenizer", "vocab", "merges", "spiece"))


def _is_idle_pointer(file: Path, directory: Path) -> bool:
    if _is_read(file) or not _is_beside(file, directory):
        return False
    with open_regular(file) as opened:
        return is_pointer(opened.read(64) or b"")
