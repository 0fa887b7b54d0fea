"""What transformers wants beside the weights, made of what a checkpoint of metaseq has."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ...disk.names import CONFIG_NAME
from ...disk.reading import require_inside
from ...disk.small_files import small_files
from .config import derive_config
from .model import MetaseqModel
from .tokenizer import tokenizer_files


def describe(directory: Path, model: MetaseqModel) -> tuple[TemporaryDirectory[str], list[str]]:
    """Return a directory with config.json, the tokenizer and copies of all other small files; and notices.

    A config.json of the user's own is taken as it is.

    Raises:
        SourceError, CorruptFileError: a config cannot be derived, or a file is not what its name says.

    """
    made, used, notices = tokenizer_files(directory)
    if not (directory / CONFIG_NAME).exists():
        config, guessed = derive_config(model.path, model.tensors, model.facts)
        made[CONFIG_NAME] = config
        notices = guessed + notices
    beside = TemporaryDirectory(prefix="llmint8-")
    home = Path(beside.name)
    copied = [file for file in small_files(directory) if file.name not in used]
    if CONFIG_NAME not in made:
        require_inside(directory / CONFIG_NAME, directory)
        copied.append(directory / CONFIG_NAME)
    for file in copied:
        place = home / file.relative_to(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    for name, content in made.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (home / name).write_text(text, encoding="utf-8", newline="")
    return beside, notices
