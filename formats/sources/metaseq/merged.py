"""Tensors of OPT, put together from the model-parallel parts of metaseq, under the names of transformers.

What is split by columns of its output (embedding, fc1, q, k, v) is concatenated along dimension 0, the weights whose
inputs are split (fc2, out_proj) along dimension 1; everything else is the same in all parts. `qkv_proj` holds K, V and
Q, in this order, in every part (metaseq: `scripts/reshard_mp.py`, `distributed/stitch_fsdp_ckpt.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import SourceError
from .pieces import Piece

_PREFIX = "model."
_LEFT_OUT = re.compile(r"decoder\.(version|embed_positions\._float_tensor)")
_PROJECTION, _EMBEDDING = "decoder.output_projection.weight", "decoder.embed_tokens.weight"
_RENAMED = (
    (re.compile(r"^decoder\.layer_norm\."), "decoder.final_layer_norm."),
    (re.compile(r"^decoder\.project_(in|out)_dim\."), r"decoder.project_\1."),
)
_BY_ROWS = re.compile(r"(\.|^)(embed_tokens|output_projection|fc1|(k|q|v|qkv)_proj)\.(weight|bias)$")
_BY_COLUMNS = re.compile(r"\.(fc2|out_proj)\.weight$")
_OF_OPT = re.compile(
    r"decoder\.((embed_tokens|embed_positions|project_in|project_out|output_projection)\.weight|"
    r"final_layer_norm\.(weight|bias)|"
    r"layers\.\d+\.((self_attn\.(k|v|q|qkv|out)_proj|fc1|fc2|self_attn_layer_norm|final_layer_norm)\.(weight|bias)))"
)


@dataclass(frozen=True)
class Merged:
    """A tensor in pieces, one behind the other along `dim`; and others that hold the same.

    With `tied` these are of another tensor, which OPT has not: they must be the same.
    """

    pieces: tuple[Piece, ...]
    dim: int = 0
    copies: "tuple[Merged, ...]" = ()
    tied: bool = False

    @property
    def dtype(self) -> str:
        """The dtype in safetensors' spelling."""
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        first = self.pieces[0].shape
        size = sum(piece.shape[self.dim] for piece in self.pieces)
        return (*first[: self.dim], size, *first[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> "Merged":
        """Return some of the rows of the whole."""
        copies = tuple(copy.rows(start, stop) for copy in self.copies)
        pieces, begin = [], 0
        for piece in self.pieces:
            low, high = max(start - begin, 0), min(stop - begin, piece.shape[0])
            if low < high:
                pieces.append(piece.rows(low, high))
            begin += 0 if self.dim else piece.shape[0]
        return Merged(tuple(pieces), self.dim, copies, self.tied)


def merge(where: Path, parts: Sequence[Mapping[str, Piece]]) -> dict[str, Merged]:
    """Return the tensors by the names of transformers, in the order of these.

    Args:
        where: the files, for errors.
        parts: of each model-parallel part its tensors, by metaseq's names.

    Raises:
        SourceError: a tensor that OPT has not, or parts that do not fit together.

    """
    found: dict[str, Merged] = {}
    for original in parts[0]:
        if _LEFT_OUT.fullmatch(original):
            continue
        name = original
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if not _OF_OPT.fullmatch(name):
            raise SourceError(f"{where}: {original}: not a tensor of OPT, and only OPT and OPT-IML are known")
        pieces = [part[original] for part in parts if original in part]
        if "qkv_proj" in name:
            for number, which in enumerate("kvq"):
                thirds = [_third(where, original, piece, number) for piece in pieces]
                found[name.replace("qkv_proj", f"{which}_proj")] = _whole(where, original, len(parts), thirds)
        else:
            found[name] = _whole(where, original, len(parts), pieces)
    more = {name for part in parts for name in part if not _LEFT_OUT.fullmatch(name)} - parts[0].keys()
    if more:
        raise SourceError(f"{where}: {min(more)}: not in model part 0, and in another; are they of one model?")
    if _EMBEDDING not in found:
        raise SourceError(f"{where}: {_EMBEDDING}: missing; is this a checkpoint of OPT?")
    projection, embedding = found.pop(_PROJECTION, None), found[_EMBEDDING]
    if projection is not None and projection.pieces != embedding.pieces:
        found[_EMBEDDING] = _tied(where, embedding, projection)
    return {_PREFIX + name: found[name] for name in sorted(found, key=_natural)}


def _third(where: Path, name: str, piece: Piece, number: int) -> Piece:
    rows = piece.shape[0] // 3
    if piece.shape[0] % 3:
        raise SourceError(f"{where}: {name}: {piece.shape[0]} rows, expected three times as many as K has")
    return piece.rows(number * rows, (number + 1) * rows)


def _whole(where: Path, name: str, count: int, pieces: Sequence[Piece]) -> Merged:
    """Put the pieces of one tensor together."""
    first = pieces[0]
    dim = 0 if _BY_ROWS.search(name) else 1 if _BY_COLUMNS.search(name) else None
    kept = tuple(size for number, size in enumerate(first.shape) if number != dim)
    if len(pieces) != count or len(first.shape) <= (dim or 0):
        raise SourceError(f"{where}: {name}: in {len(pieces)} of {count} model parts, with shape {list(first.shape)}")
    for number, piece in enumerate(pieces):
        others = tuple(size for place, size in enumerate(piece.shape) if place != dim)
        if (piece.dtype, others) != (first.dtype, kept):
            raise SourceError(
                f"{where}: {name}: {piece.dtype} {list(piece.shape)} in model part {number}, {first.dtype} "
                f"{list(first.shape)} in part 0; are they of one model?"
            )
    if dim is None:
        return Merged((first,), copies=tuple(Merged((piece,)) for piece in pieces[1:]))
    return Merged(tuple(pieces), dim)


def _tied(where: Path, embedding: Merged, projection: Merged) -> Merged:
    if (projection.dtype, projection.shape) != (embedding.dtype, embedding.shape):
        raise SourceError(
            f"{where}: {_PROJECTION}: {list(projection.shape)}, the embedding is {list(embedding.shape)}; OPT has one "
            "tensor for both"
        )
    return Merged(embedding.pieces, copies=(projection,), tied=True)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
