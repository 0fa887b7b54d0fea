"""A model-parallel part of a checkpoint of metaseq: the tensors in its files.

A part that fairscale's FSDP has sharded has for each of its units, mostly a decoder layer, the parameters one after
the other in a flat one, of which each file holds an equal share, padded at its end. `shard_metadata` says which
parameters they are. What was put together again holds them one by one.

Nothing in a file is unpickled: whatever classes its config names stay names.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...containers.pytorch.file import View, read_saved, views
from ...containers.pytorch.pickles import Call, PickleReader
from ...containers.tensors import is_tensor_name
from ...disk.reading import check_is_no_pointer, open_regular, require_inside
from ...errors import CorruptFileError, SourceError
from .pieces import Extent, Piece, joined

# Wrappers that some versions leave in the names.
_WRAPPERS = {"_fsdp_wrapped_module", "_fpw_module"}
_UPDATES = "num_updates"
# What the config says about the model that no tensor does.
FACTS = ("decoder_attention_heads", "activation_fn")
_TENSORS = ("model", "shard_metadata", "last_optimizer_state")
_MOST_OBJECTS = 1_000_000
# Pickles that are kept: of a part, the last shards have more padding.
_KEPT = 4


@dataclass(frozen=True)
class Unit:
    """A flat parameter: what it is made of, the same in all shards."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Elements, without what pads a shard."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class _Content:
    """What the pickle of a file says: its tensors; its units, and how many elements pad each here; and other values."""

    model: dict[Any, Any]
    units: dict[str, Unit]
    padding: dict[str, int]
    values: dict[str, Any]


@dataclass(frozen=True)
class _Saved(_Content):
    """One file, and where its tensors lie in it."""

    path: Path
    size: int
    views: dict[str, View]


@dataclass(frozen=True)
class Part:
    """A model-parallel part: its tensors by metaseq's names, sizes of its files, and `FACTS` as far as it has them."""

    pieces: dict[str, Piece]
    sizes: dict[Path, int]
    facts: dict[str, Any]
    updates: Any


def read_part(directory: Path, names: list[str], reader: "PartReader") -> Part:
    """Read what the files of a part say about its tensors, and none of these; `reader` is that of the checkpoint.

    Raises:
        CorruptFileError: a broken file.
        SourceError: no checkpoint of metaseq, or files that are not of one.

    """
    first = reader.read(directory / names[0])
    extents: dict[str, list[Extent]] = {key: [] for key in first.units}
    sizes = {}
    for name in names:
        saved = first if name == names[0] else reader.read(directory / name)
        sizes[saved.path] = saved.size
        if (saved.units, saved.values.get(_UPDATES)) != (first.units, first.values.get(_UPDATES)):
            raise SourceError(f"{saved.path}: not of the same checkpoint as {names[0]}: its shard_metadata is another")
        for key, places in extents.items():
            places.append(_share(saved, first, key))
    if len(names) > 1 and not first.units:
        raise SourceError(f"{first.path}: has no shard_metadata, so its {len(names)} shards cannot be put together")
    pieces = {
        name: Piece(view.info.dtype, view.info.shape, (_extent(first, view, 0),))
        for name, view in first.views.items()
        if name not in first.units
    }
    for key, unit in first.units.items():
        flat = joined(first.views[key].info.dtype, extents[key])
        if flat.shape != (unit.numel,):
            raise SourceError(
                f"{first.path}: {key}: {flat.shape[0]} of {unit.numel} elements are there; are all shards of this part "
                f"downloaded, {names[0]} to {names[-1]}?"
            )
        start = 0
        for name, shape in zip(unit.names, unit.shapes, strict=True):
            pieces[name] = flat.part(start, shape)
            start += math.prod(shape)
    return Part(
        pieces, sizes, {key: first.values[key] for key in FACTS if key in first.values}, first.values.get(_UPDATES)
    )


def _share(saved: _Saved, first: _Saved, key: str) -> Extent:
    """Return the place of a shard's share of a flat parameter."""
    view, padding = saved.views.get(key), saved.padding[key]
    if view is None or view.info.dtype != first.views[key].info.dtype:
        raise SourceError(f"{saved.path}: {key}: missing, or of another dtype than in {first.path.name}")
    if not 0 <= padding <= math.prod(view.info.shape):
        raise CorruptFileError(f"{saved.path}: {key}: padded by {padding} of {math.prod(view.info.shape)} elements")
    return _extent(saved, view, padding)


def _extent(saved: _Saved, view: View, padding: int) -> Extent:
    info = view.info
    if not view.contiguous:
        raise SourceError(f"{saved.path}: {info.name}: not contiguous; save it with .contiguous()")
    itemsize = info.nbytes // max(1, math.prod(info.shape))
    return Extent(saved.path, info.offset, info.nbytes - padding * itemsize)


class PartReader:
    """Reads what the files of a checkpoint say. Of many shards the pickles are the same, which are then read once."""

    def __init__(self) -> None:
        """Begin with nothing read."""
        self._parse = lru_cache(_KEPT)(_parse)

    def read(self, path: Path) -> "_Saved":
        """Read a file. Raises CorruptFileError, and SourceError: it is no checkpoint of metaseq."""
        require_inside(path, path.parent)
        size = path.stat().st_size
        with open_regular(path) as file:
            check_is_no_pointer(path, file.read(64) or b"")
            file.seek(0)
            content, places = read_saved(path, file, size, self._parse)
        if not isinstance(content, _Content):
            raise SourceError(f"{path}: no checkpoint of metaseq: it has no `model`")
        found = {_clean(name): view for name, view in views(path, content.model, places).items()}
        if missing := sorted(content.units.keys() - found.keys()):
            raise SourceError(f"{path}: {missing[0]}: missing, and shard_metadata names it")
        return _Saved(**vars(content), path=path, size=size, views=found)


def _parse(raw: bytes) -> "_Content | None":
    """Read a pickle; None where it is of no checkpoint. Raises ValueError."""
    state = PickleReader(raw, lambda name: True).read()
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        return None
    units: dict[str, Unit] = {}
    padding: dict[str, int] = {}
    for key, unit, padded in _units(state.get("shard_metadata")):
        units[key], padding[key] = unit, padded
    others = {key: value for key, value in state.items() if key not in _TENSORS}
    return _Content(model, units, padding, _values(others))


def _units(metadata: Any) -> Iterator[tuple[str, Unit, int]]:
    """Yield the flat parameters: what each is called, what it is made of, and how many elements pad it here."""
    if metadata is None:
        return
    try:
        for module in metadata["param_metadata"]:
            for flat, described in module["params"].items():
                names = tuple(described["names"])
                shapes = tuple(_sizes(shape) for shape in described["shapes"])
                padding = described["padding"]
                if len(names) != len(shapes) or not all(map(is_tensor_name, names)) or type(padding) is not int:
                    raise ValueError(f"{flat}: names, shapes and padding do not go together")
                prefix = f"{module['fsdp_path']}." if module["fsdp_path"] else ""
                yield _clean(prefix + flat), Unit(tuple(_clean(prefix + name) for name in names), shapes), padding
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"shard_metadata is not fairscale's: {type(error).__name__}: {error}") from None


def _sizes(shape: Any) -> tuple[int, ...]:
    value = shape.arguments[0] if isinstance(shape, Call) and shape.function.name == "torch.Size" else shape
    if not isinstance(value, tuple | list) or not all(type(size) is int and 0 <= size < 2**40 for size in value):
        raise ValueError(f"{str(value)[:80]} is no shape")
    return tuple(value)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _values(state: Mapping[str, Any]) -> dict[str, Any]:
    """Find `FACTS` and how often the model was updated, however deep in the objects of a config they are."""
    wanted, found = {*FACTS, _UPDATES}, {}
    seen: set[int] = set()
    waiting: deque[Any] = deque([state])
    while waiting and len(seen) < _MOST_OBJECTS:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            waiting.extend([value.arguments, value.state, value.items])
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                plain = _plain(item)
                if key in wanted and plain is not None:
                    found[key] = plain
            waiting.extend(value.values())
    return found


def _plain(value: Any) -> int | str | None:
    """Return a number or a string, also where omegaconf has it in a node; None for anything else."""
    if isinstance(value, Call) and isinstance(value.state, dict):
        value = value.state.get("_val")
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
