"""The tokenizer beside a checkpoint."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmint8.formats.disk.small_files import small_files

log = logging.getLogger("llmint8")


def load_tokenizer(source: Path, trust_remote_code: bool = False) -> Any | None:
    """Return the tokenizer, or None where there is none. transformers makes up an empty one for some models.

    Raises:
        SourceError: a file beside the weights is a link out of the directory.

    """
    small_files(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise whatever they like when a file is missing
        log.debug("no tokenizer: %s", error)
        return None
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
