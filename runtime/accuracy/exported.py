"""An export against the int8 checkpoint that it was made of, on a text: what the other form has cost.

Each runs as its users run it: int8 forms in transformers with the package that they are for, which has to be installed;
float16 and GGUF in float32, from the weights that are in the files. llama.cpp and vLLM round inputs in ways of their
own, which come on top.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.converter.calibration.text import read_text
from llmint8.converter.gguf.source import open_local
from llmint8.converter.model.build import model_class, quiet_transformers
from llmint8.converter.model.config import load_config
from llmint8.formats import LLMInt8Error

from ..model.load import load
from .compare import load_reference
from .evaluate import Evaluation, Logits, measure, token_windows
from .reference import check_window, tokenizer_beside

# What runs a form in transformers, where it does not do it alone.
_PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


class Measuring:
    """The text and the checkpoint, ready before anything is written."""

    def __init__(self, checkpoint: Path, to: str, text: Path, tokens: int, window: int) -> None:
        """Cut the text into windows.

        Raises:
            LLMInt8Error: there is no tokenizer, or the model does not predict the next token.
            ValueError: too short a text, or a window longer than the model takes.

        """
        self._checkpoint, self._to = checkpoint, to
        config = load_config(checkpoint)
        cls = None if config is None else model_class(config)
        if cls is None or config is None or config.is_encoder_decoder or not cls.can_generate():
            raise LLMInt8Error(f"{checkpoint}: no causal language model, and only of these a loss is measured")
        check_window(window, config, checkpoint)
        tokenizer = tokenizer_beside(checkpoint, checkpoint)
        self._cls, self._window = cls, window
        self._windows = token_windows(tokenizer, read_text(text), tokens, window)

    @property
    def passes(self) -> int:
        """How often `progress` will be called."""
        return len(self._windows)

    @property
    def why_not(self) -> str | None:
        """Why the form cannot run here; None where it can."""
        package = _PACKAGES.get(self._to)
        missing = package is not None and find_spec(package) is None
        return f"{self._to} is not installed, which runs it in transformers" if missing else None

    def run(self, dest: Path, progress: Callable[[str, int], None]) -> Evaluation:
        """Compare the export in DEST with the checkpoint. Raises LLMInt8Error: the form is not loaded."""
        expected = load(self._checkpoint, dtype=torch.float32)
        got = self._exported(dest)
        return measure(self._each(expected, got), progress=lambda name: progress(name, self.passes))

    def _exported(self, dest: Path) -> Any:
        if self._to not in _PACKAGES:
            return load_reference(open_local(dest), self._window, "cpu")
        with quiet_transformers():
            return self._cls.from_pretrained(dest, local_files_only=True, trust_remote_code=False)

    def _each(self, expected: Any, got: Any) -> Iterator[tuple[Tensor, Logits, dict[str, Logits]]]:
        for window in self._windows:
            with torch.no_grad():
                logits = [model(window[None]).logits[0] for model in (expected, got)]
            yield window, partial(_at, logits[0]), {self._to: partial(_at, logits[1])}


def _at(logits: Tensor, places: slice) -> Tensor:
    return logits[places]
