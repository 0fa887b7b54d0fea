"""What was measured, one JSON object a line: a run is written down when it is done, and never done again.

A run is known by the scheme and by two hashes: of config.json and the weights, and of the tokens of the text in their
windows, whatever files and models are called. What a killed process left of a line is cut off.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmint8.formats import LLMInt8Error
from llmint8.formats.disk.durable import named_errors, open_output, write_all
from llmint8.formats.disk.strict_json import finite, parse_json

from .schemes import Scheme


@dataclass(frozen=True)
class Measured:
    """What was run: a model on a text."""

    model: str
    source_sha256: str  # of config.json and the weights
    text: str
    text_sha256: str  # of its tokens, int64, in their windows
    tokens: int
    window: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same; names do not."""
        return self.source_sha256, self.text_sha256, self.tokens, self.window


@dataclass(frozen=True)
class Run:
    """One scheme on one model. KL from the model in 16 bit is in nats; a number is None where it was not finite."""

    measured: Measured
    scheme: Scheme
    weights: int  # that are quantized
    weight_bits: int  # that these take
    total_bits: int  # that the model takes
    perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    top1_agreement: float | None

    @property
    def bits_per_weight(self) -> float:
        """Of the weights that are quantized."""
        return self.weight_bits / self.weights

    @property
    def label(self) -> str:
        """What it is called: `4-bit float, block 64, of tiny`."""
        return f"{self.scheme.label}, of {self.measured.model}"


def encoded(run: Run) -> bytes:
    """Return the line of a run."""
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    line = asdict(run.measured) | run.scheme.values
    line |= {name: value for name, value in values.items() if name not in ("measured", "scheme")}
    return json.dumps(finite(line)).encode() + b"\n"


class RunFile:
    """The file of runs in a directory; it is made with the first."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            LLMInt8Error: it cannot be read, or a line is none of a run.
            OutputError: what was left of a line cannot be cut off.

        """
        self.path = path
        self._runs: dict[tuple[Any, ...], Run] = {}
        for run in self._read():
            self._runs[run.measured.key, run.scheme] = run

    def _read(self) -> Iterator[Run]:
        if not self.path.exists():
            return
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise LLMInt8Error(f"{self.path}: cannot be read: {error.strerror}") from None
        whole, newline, rest = content.rpartition(b"\n")
        if rest:
            with named_errors(self.path), open_output(self.path) as file:
                file.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                yield _decoded(parse_json(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise LLMInt8Error(
                    f"{self.path}: line {number} is none of a run ({type(error).__name__}: {error}); remove the line"
                ) from None

    def has(self, measured: Measured, scheme: Scheme) -> bool:
        """Tell whether a run is done."""
        return (measured.key, scheme) in self._runs

    def of(self, measured: Measured) -> list[Run]:
        """Return all runs of a model on a text, by their bits."""
        found = [run for (key, _), run in self._runs.items() if key == measured.key]
        return sorted(found, key=lambda run: (run.total_bits, run.scheme.label))

    def add(self, runs: Iterable[Run]) -> None:
        """Write runs down. Raises OutputError."""
        new = list(runs)
        with named_errors(self.path), open_output(self.path) as file:
            file.seek(0, os.SEEK_END)
            write_all(file, b"".join(map(encoded, new)))
            os.fsync(file.fileno())
        self._runs |= {(run.measured.key, run.scheme): run for run in new}


def _decoded(line: dict[str, Any]) -> Run:
    measured = Measured(**{field.name: line.pop(field.name) for field in fields(Measured)})
    scheme = Scheme(**{field.name: line.pop(field.name) for field in fields(Scheme)})
    run = Run(measured, scheme, **line)
    numbers = (run.perplexity, run.kl_mean, run.kl_median, run.kl_p99, run.top1_agreement)
    if not all(value is None or (_is_number(value) and math.isfinite(value)) for value in numbers):
        raise ValueError("a measure is no number")
    if not all(type(value) is int and value > 0 for value in (run.weights, run.weight_bits, run.total_bits)):
        raise ValueError("a number of bits or weights is none")
    texts = measured.model, measured.source_sha256, measured.text, measured.text_sha256
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name or a hash is none")
    if not all(type(value) is int for value in (measured.tokens, measured.window)):
        raise ValueError("a number of tokens is none")
    scheme.check()
    return run


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
