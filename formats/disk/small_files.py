"""What lies beside the weights and goes along: tokenizer, generation config, chat template, licence."""

from pathlib import Path

from ..errors import SourceError
from .names import ADAPTER_CONFIG_NAME, CONFIG_NAME, LEGACY_QUANTIZATION_NAME
from .reading import check_is_no_pointer, open_regular, require_inside

WEIGHT_SUFFIXES = tuple(
    ".partial .safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .ggml .onnx .ot .npz .tflite .pkl .pdparams".split()  # noqa: SIM905
)
MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES_BYTES = 512 << 20  # together; they are in memory together


def small_files(path: Path) -> list[Path]:
    """Return tokenizer, generation config, chat template, licence and whatever else is small and not weights.

    Raises:
        SourceError: a link out of the directory, a name that cannot be printed, or too much of it.

    """
    folders = [path, path / "additional_chat_templates"]
    candidates = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir())
    found = [file for file in candidates if _is_small_file(file, path)]
    size = sum(file.stat().st_size for file in found)
    if size > MAX_SMALL_FILES_BYTES:
        raise SourceError(f"{path}: {size} bytes beside the weights, at most {MAX_SMALL_FILES_BYTES} are copied")
    return found


def large_files(path: Path) -> list[Path]:
    """Return what lies beside the weights, is none of them, and is too large to go along."""
    return [file for file in sorted(path.iterdir()) if _is_beside(file) and file.stat().st_size > MAX_SMALL_FILE_BYTES]


def _is_beside(file: Path) -> bool:
    name = file.name
    # Adapters stay behind: their weights are not converted. What quantized the source once did not quantize this.
    not_copied = (CONFIG_NAME, ADAPTER_CONFIG_NAME, LEGACY_QUANTIZATION_NAME)
    if name in not_copied or name.endswith(".index.json") or name.startswith((".", "llmint8_")) or not file.is_file():
        return False
    return file.suffix.lower() not in WEIGHT_SUFFIXES


def _is_small_file(file: Path, directory: Path) -> bool:
    if not _is_beside(file) or file.stat().st_size > MAX_SMALL_FILE_BYTES:
        return False
    if not file.name.isprintable():
        raise SourceError(
            f"{directory}: {file.name[:80]!r} is not a name that can be printed; rename or remove the file"
        )
    require_inside(file, directory)
    with open_regular(file) as opened:
        check_is_no_pointer(file, opened.read(64) or b"")
    return True
