"""How a sentence encoder makes one vector of a text: as the files of SentenceTransformers beside it say.

`modules.json` names a folder for each step behind the transformer. One says what is made of the hidden states; a
normalization changes no cosine. Steps with weights of their own, such as `Dense`, are not run: they are the same in
both models, and are named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import SourceError, read_json
from llmint8.formats.disk.names import CONFIG_NAME
from llmint8.formats.disk.small_files import module_folders

_LENGTH_NAME = "sentence_bert_config.json"
_FLAG = "pooling_mode_"


def _weighted(hidden: Tensor) -> Tensor:
    weights = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
    return (hidden * weights[:, None]).sum(1) / weights.sum()


# Of hidden states [R, W, H] without padding; by the names in a config of SentenceTransformers.
_WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda hidden: hidden[:, 0],
    "max": lambda hidden: hidden.amax(1),
    "mean": lambda hidden: hidden.mean(1),
    "lasttoken": lambda hidden: hidden[:, -1],
    "weightedmean": _weighted,
}
# It differs from the mean by a factor, which no cosine sees.
_SAME = {"mean_sqrt_len": "mean", "mean_sqrt_len_tokens": "mean"}


@dataclass(frozen=True)
class Pooling:
    """What becomes of the hidden states of a text, the vectors of several ways one behind the other."""

    ways: tuple[str, ...] = ("mean",)
    longest: int | None = None  # tokens of a text; the rest is cut off
    left_out: tuple[str, ...] = ()  # folders of steps that are not run

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the vectors [R, D] of hidden states [R, W, H], which have no padding."""
        return torch.cat([_WAYS[way](hidden) for way in self.ways], dim=1)


def read_pooling(path: Path) -> Pooling:
    """Read what lies beside a model; without any such files the mean of the hidden states is taken.

    Raises:
        SourceError, CorruptFileError: a file is broken, or names a way that is not known.

    """
    ways, left_out = Pooling.ways, []
    for folder in module_folders(path):
        config = path / folder / CONFIG_NAME
        content = read_json(config) if config.is_file() else {}
        if any(key.startswith("pooling_mode") for key in content):
            ways = tuple(_known(config, way) for way in _named(content)) or ways
        elif content:
            left_out.append(folder)
    length = read_json(path / _LENGTH_NAME).get("max_seq_length") if (path / _LENGTH_NAME).is_file() else None
    return Pooling(ways, length if isinstance(length, int) and length > 0 else None, tuple(left_out))


def _named(content: dict[str, Any]) -> list[str]:
    """Return the ways that a config names: older ones have a flag for each."""
    stated = content.get("pooling_mode")
    if stated is not None:
        return [str(way) for way in (stated if isinstance(stated, list) else [stated])]
    flags = [key.removeprefix(_FLAG) for key, value in content.items() if key.startswith(_FLAG) and value is True]
    return [flag.removesuffix("_token").removesuffix("_tokens") for flag in flags]


def _known(config: Path, way: str) -> str:
    way = _SAME.get(way, way)
    if way not in _WAYS:
        raise SourceError(f"{config}: pooling_mode is {way[:40]!r}, known are {', '.join(_WAYS)}")
    return way
