"""Llama 3's scaling of rotary frequencies, told by what GGUF stores of it: by what each frequency is divided."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from llmint8.formats import SourceError
from llmint8.formats.containers.gguf.header import GgufHeader
from llmint8.formats.containers.gguf.rows import Rows
from llmint8.formats.sources.gguf import GgufFile

from .facts import ROPE_FREQUENCIES, rope, rope_frequencies

_ORIGINAL = 8192


def llama_3_parameters(header: GgufHeader, config: Any, factors: Iterable[float]) -> dict[str, Any]:
    """Return the parameters that give the file's divisors. Raises SourceError: it is none of those that are known."""
    stored = GgufFile(header, {ROPE_FREQUENCIES: ROPE_FREQUENCIES}, lambda tensor: Rows()).read(ROPE_FREQUENCIES)
    for factor in factors:
        parameters = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        parameters["original_max_position_embeddings"] = _ORIGINAL
        tried = copy.deepcopy(config)
        tried.rope_parameters = {**rope(config), **parameters}
        divisors = rope_frequencies(tried)
        if divisors is not None and divisors.shape == stored.shape and torch.allclose(divisors, stored, rtol=1e-4):
            return parameters
    raise SourceError(f"{header.path}: {ROPE_FREQUENCIES} is not that of a Llama 3.1 or 3.2")
