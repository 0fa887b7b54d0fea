"""The two containers of torch.save: where the state's pickle is, and where the storages lie.

Since torch 1.6 that is a zip archive with an entry for each storage, none of them packed; before it was a row of
pickles, the last of which lists the storages that follow. What is declared is held against the file.
"""

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..tensors import DTYPES
from .pickles import Label, PickleReader, Reference

# The pickles of a file, and the directory of an archive: a tensor takes some 200 bytes in each.
MAX_PICKLE_BYTES = 16 << 20
_MAGIC_NUMBER, _PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001
# What torch.load(weights_only=True) allows too. None of it is ever called.
_ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|torch(\.cuda|\.storage)?\.\w+Storage|torch\._utils\._rebuild_\w+|"
    r"torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout|"
    r"torch\.(Tensor|Size|device|per_\w+|\w*float\w+|\w*int\w+|bool|half|double|complex\w+)|_codecs\.encode|"
    r"(builtins|__builtin__)\.(set|complex|bytearray)"
)
_STORAGE_DTYPES = {
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Double": "F64",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "Untyped": "U8",
}


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle refers to it: `nbytes` are declared, and `part` is where the tensor's part of it begins."""

    key: str
    dtype: str
    nbytes: int
    part: int


@dataclass(frozen=True)
class Place:
    """Bytes that the file does have."""

    offset: int
    nbytes: int


def parse_strictly(raw: bytes) -> Any:
    """Return what a pickle says that names nothing but tensors. Raises ValueError."""
    return PickleReader(raw, _may_name).read()


def read_container(
    file: Any, size: int, parse: Callable[[bytes], Any] = parse_strictly
) -> tuple[Any, dict[str, Place]]:
    """Return what was saved in a file of `size` bytes, and each storage's place by its key.

    `parse` reads the pickle of an archive; those of the layout before torch 1.6 are always read strictly.

    Raises:
        Exception: of many kinds, as zipfile and pickletools meet what is broken.

    """
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    state, places = _read_zip(file, parse) if zipped else _read_legacy(file)
    for place in places.values():
        if place.offset + place.nbytes > size:
            raise ValueError(f"cut short: {size} bytes, a storage ends at {place.offset + place.nbytes}")
    return state, places


def storage_of(reference: Any) -> Storage:
    """Read what a pickle says about a storage. Raises ValueError."""
    entry = reference.key if isinstance(reference, Reference) else None
    if not isinstance(entry, tuple) or len(entry) not in (5, 6) or _text(entry[0]) != "storage":
        raise ValueError("it has no storage")
    label, key, _, count, *view = entry[1:]
    kind = label.name.rpartition(".")[2].removesuffix("Storage") if isinstance(label, Label) else ""
    dtype = _STORAGE_DTYPES.get(kind, kind)
    part: Any = 0
    if view and view[0] is not None:  # a part of a storage, as torch had them before 0.4
        part = view[0][1] if isinstance(view[0], tuple) and len(view[0]) == 3 else None
    if type(count) is not int or type(part) is not int or min(count, part) < 0:
        raise ValueError("the size of its storage is not a number >= 0")
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
    return Storage(_text(key), dtype, count * itemsize, part * itemsize)


def _read_zip(file: Any, parse: Callable[[bytes], Any]) -> tuple[Any, dict[str, Place]]:
    with zipfile.ZipFile(_InSmallPieces(file)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two entries of the archive have one name")
        mains = [name for name in entries if name.endswith("/data.pkl")]
        if len(mains) != 1:
            raise ValueError(f"the archive has {len(mains)} entries data.pkl, expected one")
        folder = mains[0].removesuffix("data.pkl")
        places = {
            name.removeprefix(f"{folder}data/"): _place(file, entry)
            for name, entry in entries.items()
            if name.startswith(f"{folder}data/")
        }
        order = entries.get(f"{folder}byteorder")
        if order is not None and _content(file, order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return parse(_content(file, entries[mains[0]])), places


def _content(file: Any, entry: zipfile.ZipInfo) -> bytes:
    place = _place(file, entry)
    if place.nbytes > MAX_PICKLE_BYTES:
        raise ValueError(f"{entry.filename[:80]!r} has {place.nbytes} bytes, at most {MAX_PICKLE_BYTES} are allowed")
    file.seek(place.offset)
    content: bytes = file.read(place.nbytes)
    return content


def _place(file: Any, entry: zipfile.ZipInfo) -> Place:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"{entry.filename[:80]!r} is packed, which torch.save never does")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{entry.filename[:80]!r} is not where the archive's directory has it")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return Place(entry.header_offset + 30 + lengths, entry.file_size)


class _InSmallPieces:
    """A file read in bounded pieces: zipfile takes an archive's directory at once, however large it says it is."""

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int = -1) -> Any:
        data = self._file.read(min(count, MAX_PICKLE_BYTES + 1) if count >= 0 else MAX_PICKLE_BYTES + 1)
        if len(data) > MAX_PICKLE_BYTES:
            raise ValueError(f"the archive's directory takes more than {MAX_PICKLE_BYTES} bytes")
        return data


def _read_legacy(file: Any) -> tuple[Any, dict[str, Place]]:
    reader = PickleReader(file.read(MAX_PICKLE_BYTES), _may_name)
    if reader.read() != _MAGIC_NUMBER or reader.read() != _PROTOCOL_VERSION:
        raise ValueError("it does not begin as a torch.save file does")
    system = reader.read()
    if not isinstance(system, dict) or system.get("little_endian", system.get(b"little_endian")) is not True:
        raise ValueError("it was written on a big-endian machine")
    state, keys = reader.read(), reader.read()
    storages = {storage.key: storage for storage in map(storage_of, reader.references)}
    places, offset = {}, reader.position
    for key in map(_text, keys if isinstance(keys, list) else []):
        if key not in storages:
            raise ValueError(f"storage {key[:80]!r} belongs to no tensor")
        dtype = storages[key].dtype
        file.seek(offset)
        count = int.from_bytes(file.read(8), "little")
        places[key] = Place(offset + 8, count * (DTYPES[dtype].itemsize if dtype in DTYPES else 1))
        offset += 8 + places[key].nbytes
    return state, places


def _text(value: Any) -> str:
    """Return a string of a pickle, which is one of bytes where Python 2 wrote it."""
    if not isinstance(value, str | bytes | int):
        raise ValueError(f"a {type(value).__name__} is where a string should be")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _may_name(name: str) -> bool:
    return _ALLOWED.fullmatch(name) is not None
