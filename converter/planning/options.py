"""What a user can ask of a conversion."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmint8.formats import LAYOUTS, Layout, Scheme
from llmint8.formats.int8.schemes import BITS, DataType, KBit, Lookup
from llmint8.kernels.reference import Activation, Group, Rotation

from ..words import parse_size

OnNonfinite = Literal["error", "keep"]
Rounding = Literal["nearest", "gptq"]

# How inputs are quantized, and in which blocks rotated, by measured KL (docs/accuracy.md).
ACTIVATION: Activation = "zeropoint"
ACTIVATION_GROUP: Group = 128
_ROTATION: Rotation = 64
# How weights of k bits are, by measured KL (docs/kbit.md), and how many columns stay in 16 bit beside which weights.
_BITS, _BLOCK_SIZE = 4, 64
_DATA_TYPES: dict[int, DataType] = {3: "quantile", 4: "nf4"}  # of more bits int
_COLUMNS = {"int8": "top-k=16", "k bits": "none"}
_MAX_JOBS = 8
# And the calibration, of which the content counts and not the name.
_OF_THE_PASS = ("format", "rotate", "rounding", "outliers", "calibration_tokens", "trust_remote_code")
_OF_K_BITS = ("bits", "data_type", "block_size", "target_size")
_OF_FORMAT_2 = {"rotate": "--rotate", "quantize_embeddings": "--quantize-embeddings"}


@dataclass(frozen=True)
class Options:
    """Everything beside the source that decides what a conversion writes, and `jobs`.

    Attributes:
        format: 1, which bitsandbytes loads too, or 2, the layout of our own.
        rotate: rotate inputs and weights, which takes format 2.
        bits: of a weight; 3 to 8 with inputs in 16 bit, which takes format 2. By default, and with 8 alone, weights and
            inputs are int8.
        data_type: of weights of so many bits: `int`, `float`, `dynamic`, `quantile` or `nf4`.
        block_size: how many elements of a row share a scale then, 32 to 4096, or `row`.
        target_size: bytes, or a string such as `100MB`, that the tensors of the result take at most; each layer gets
            the bits with which its measured error is worth its size.
        rounding: how the values are found: `nearest`, or `gptq`, which makes up for the rounding of a column in those
            after it, and takes format 2.
        outliers: which columns stay in 16 bit, `top-k=16`, `threshold=6.0`, `systematic`, `proxy=0.02`, which takes
            format 2, or `none`; see `Criterion`. With the last two there is no forward pass, unless rounding takes one.
            By default `top-k=16` for int8, and `none` for other weights.
        calibration: text for the pass, a `.jsonl` file with a `text` field or any text file; the packaged text by
            default. Or a directory of images or sounds, for a model that takes them, in place of made-up ones.
        calibration_tokens: how much of the text.
        device: where the pass runs, and where weights are quantized.
        dtype: `float16` or `bfloat16` to cast what stays unquantized, None to leave it.
        skip: regular expressions of layer names to leave in 16 bit.
        only: regular expressions of layer names to quantize, instead of all.
        quantize_head: quantize the output head too; an embedding that is the same tensor stays beside it.
        quantize_embeddings: look tokens up in int8 too, which takes format 2; a head that is the same tensor becomes
            int8 with the embedding, and the pair is stored once.
        max_shard_size: bytes, or a string such as `5GB`.
        on_nonfinite: `error`, or `keep` to leave weights with NaN or infinity in 16 bit (reads the weights twice).
        trust_remote_code: run the model code that the source holds, where its config.json names any.
        jobs: how many tensors are converted at a time, apart from the pass; by default one per core, up to 8.

    """

    format: int = 1
    rotate: bool = False
    bits: int | None = None
    data_type: DataType | None = None
    block_size: int | str | None = None
    target_size: str | int | None = None
    rounding: Rounding = "nearest"
    outliers: str = ""
    calibration: str | Path | None = None
    calibration_tokens: int = 512
    device: str | torch.device = "cpu"
    dtype: str | None = None
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    quantize_head: bool = False
    quantize_embeddings: bool = False
    max_shard_size: str | int = "5GB"
    on_nonfinite: OnNonfinite = "error"
    trust_remote_code: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that do not go together, or a number that is none. Raises ValueError."""
        if self.format not in LAYOUTS:
            raise ValueError(f"format {self.format!r}, expected 1 or 2")
        if not self.outliers:
            object.__setattr__(self, "outliers", self.default_outliers)
        needs_2 = [option for name, option in _OF_FORMAT_2.items() if getattr(self, name)]
        of_k_bits = f"--target-size {self.target_size}" if self.target_size else f"--bits {self.bits or _BITS}"
        needs_2 += [of_k_bits] if self.kbit else []
        needs_2 += [f"--outliers {self.outliers}"] if self.outliers.startswith("proxy") else []
        needs_2 += [f"--rounding {self.rounding}"] if self.rounding != "nearest" else []
        if self.format == 1 and needs_2:
            option = needs_2[0]
            raise ValueError(f"{option} takes --format 2: bitsandbytes, which loads format 1, knows nothing of it")
        if self.target_bytes and (self.bits or self.data_type == "nf4"):
            raise ValueError("--target-size chooses the bits; leave --bits and nf4 out")
        if self.kbit and self.rotate:
            raise ValueError(f"--rotate is for int8: inputs of weights of {self.kbit.bits} bits stay in 16 bit")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs {self.jobs}, expected at least 1")
        if self.calibration_tokens < 1:
            raise ValueError(f"calibration tokens {self.calibration_tokens}, expected at least 1")

    @property
    def layout(self) -> Layout:
        """What files and tensors are called in the result."""
        return LAYOUTS[self.format]

    @property
    def scheme(self) -> Scheme:
        """How the layers are coded."""
        return self.scheme_of(None)

    @property
    def kbit(self) -> KBit | None:
        """How weights are coded that are not int8 by row. Raises ValueError: there is no such way."""
        nothing = self.data_type is None and self.block_size is None and self.target_size is None
        return None if nothing and self.bits in (None, 8) else self._with(_BITS if self.bits is None else self.bits)

    @property
    def target_bytes(self) -> int:
        """What the tensors may take at most, where that is said. Raises ValueError."""
        return parse_size(self.target_size or 0)

    @property
    def candidates(self) -> list[KBit]:
        """How a layer may be coded where `target_size` decides, by rising size."""
        return [self._with(bits) for bits in BITS]

    def _with(self, bits: int) -> KBit:
        size = _BLOCK_SIZE if self.block_size is None else self.block_size
        size = int(size) if isinstance(size, str) and size.isdecimal() else size
        return KBit(bits, self.data_type or _DATA_TYPES.get(bits, "int"), None if size == "row" else size)  # type: ignore[arg-type]

    @property
    def coding(self) -> str:
        """How layers are coded, in words."""
        if self.target_size:
            return "3 to 8 bits"
        return f"{self.kbit.bits}-bit {self.kbit.data_type}" if self.kbit else "int8"

    @property
    def default_outliers(self) -> str:
        """The columns that stay in 16 bit where nothing is said of them."""
        return _COLUMNS["k bits" if self.kbit else "int8"]

    def scheme_of(self, lookup: Lookup | None) -> Scheme:
        """Return how a layer is coded, or an embedding: one that nobody multiplies by as it is."""
        return scheme_with(self.kbit, lookup, _ROTATION if self.rotate else None)

    @property
    def threads(self) -> int:
        """How many tensors are converted at a time."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.jobs or min(_MAX_JOBS, cores)

    def spelled(self) -> dict[str, str]:
        """Return option -> value as the command line has them, of those that decide what the pass finds out.

        With others a conversion goes on: a tensor that is finished is the same with all of them, or is not wanted.
        """
        names = _OF_THE_PASS + (_OF_K_BITS if self.kbit else ())
        return {f"--{name.replace('_', '-')}": str(getattr(self, name)) for name in names}


def scheme_with(kbit: KBit | None, lookup: Lookup | None = None, rotation: Rotation | None = None) -> Scheme:
    """Return the scheme of a layer whose weight is coded so, or int8; of an embedding the one name that it has."""
    if kbit is not None and not (lookup == "only" and kbit == KBit(8, "int", None)):
        return Scheme(lookup=lookup, kbit=kbit)
    return Scheme(lookup="only") if lookup == "only" else Scheme(ACTIVATION, ACTIVATION_GROUP, rotation, lookup)
