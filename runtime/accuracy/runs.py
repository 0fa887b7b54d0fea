"""The models that are compared, run on each window: the source with its simulated methods, the checkpoint in its modes.

Methods run together, as rows of a batch, so that a layer's weight is read and quantized once for all of them and is not
kept. Modes of the checkpoint lay its layers out anew, so each runs over several windows before the next begins. What is
kept meanwhile are hidden states.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from llmint8.converter.words import activations
from llmint8.kernels.reference import Activation

from ..layers.arguments import ActivationGroup, Outliers, kernels_group
from ..layers.linear import QuantizedLinear
from .evaluate import Logits
from .halves import Halves
from .methods import Method, NotRowsError, Simulation

# Positions of all rows of a pass, and bytes of hidden states that are kept.
_PASS_POSITIONS = 8192
_HIDDEN_BYTES = 256 << 20

HEAD_OF_THE_SOURCE = "head in 16 bit"


class Mode(NamedTuple):
    """How int8 layers run; see `runtime.load`."""

    outliers: Outliers
    threshold: float
    activation: Activation
    activation_group: ActivationGroup

    @property
    def label(self) -> str:
        """What the table calls it."""
        outliers = f"dynamic {self.threshold:.1f}" if self.outliers == "dynamic" else self.outliers
        return f"{outliers}, {activations(self.activation, kernels_group(self.activation_group))}"


class Runs:
    """Runs a source and its int8 checkpoint on windows."""

    def __init__(
        self, reference: Any, model: Any, modes: Mapping[str, Mode], methods: tuple[Method, ...], windows: Tensor
    ) -> None:
        """Take both models, the checkpoint's modes and the methods to simulate, and token ids int64 [windows, W].

        Raises:
            LLMInt8Error: an int8 layer of the checkpoint is no linear layer of the source.

        """
        self._source, self._int8 = Halves(reference, windows[0]), Halves(model, windows[0])
        self._layers = int8_layers(model)
        # Those that were not calibrated search where the others take what is stored: as the model was loaded.
        self._searching = {layer for layer in self._layers.values() if layer.outliers == "dynamic"}
        self._simulation = Simulation(reference, self._layers if methods else ())
        self._head = model.get_output_embeddings()
        self._source_head = reference.get_output_embeddings()
        self._modes, self._methods, self._windows = modes, methods, windows
        self._together = True

    @property
    def int8_head(self) -> bool:
        """Whether the output head is in int8. Its input is then quantized, for all positions of a window at once."""
        return isinstance(self._head, QuantizedLinear)

    @property
    def positions(self) -> dict[str, int]:
        """How many logits `measure` has to ask for at a time, where that matters."""
        return {"positions": self._windows.shape[1]} if self.int8_head else {}

    @property
    def passes(self) -> int:
        """How often `progress` will be called, if `measure` calls it after each window."""
        return len(self._windows) * (2 + len(self._modes))

    def each(self, progress: Callable[[str], None]) -> Iterator[tuple[Tensor, Logits, dict[str, Logits]]]:
        """Yield each window with the logits of the source and of every candidate; `progress` is told of each pass."""
        size = len(self._modes) * self._windows.shape[1] * self._int8.width * 4
        count = max(1, _HIDDEN_BYTES // size)
        for start in range(0, len(self._windows), count):
            group = self._windows[start : start + count]
            hidden = {name: self._in_mode(name, group, progress) for name in self._modes}
            for number, window in enumerate(group):
                expected, *rows = self._source_rows(window)
                progress("")
                candidates: dict[str, Logits] = {
                    method.name: partial(self._simulated, method, row)
                    for method, row in zip(self._methods, rows, strict=True)
                }
                for name, mode in self._modes.items():
                    candidates[name] = partial(self._int8_logits, mode, hidden[name][number])
                if self.int8_head:
                    own = next(iter(self._modes))
                    other = partial(self._with_source_head, hidden[own][number])
                    candidates[f"{own}, {HEAD_OF_THE_SOURCE}"] = other
                yield window, partial(_at, self._source, expected), candidates

    def _in_mode(self, name: str, windows: Tensor, progress: Callable[[str], None]) -> list[Tensor]:
        """Return the int8 model's hidden states [W, H] of each window."""
        run_in_mode(self._layers.values(), self._searching, self._modes[name])
        found = []
        for window in windows:  # a search for outliers looks at one window
            found.append(self._int8.hidden(window[None])[0])
            progress(name)
        return found

    def _source_rows(self, window: Tensor) -> list[Tensor]:
        """Return the source's hidden states [W, H] of a window, as it is and by every method."""
        ways = [None, *self._methods]
        count = max(1, _PASS_POSITIONS // len(window)) if self._together else 1
        try:
            found = []
            for start in range(0, len(ways), count):
                some = ways[start : start + count]
                with self._simulation.applied(*some):
                    found += list(self._source.hidden(window.expand(len(some), -1)))
        except NotRowsError:
            self._together = False
            return self._source_rows(window)
        return found

    def _simulated(self, method: Method, hidden: Tensor, places: slice) -> Tensor:
        with self._simulation.applied(method) if self.int8_head else nullcontext():
            return _at(self._source, hidden, places)

    def _int8_logits(self, mode: Mode, hidden: Tensor, places: slice) -> Tensor:
        if self.int8_head:
            run_in_mode([self._head], self._searching, mode)
        return _at(self._int8, hidden, places)

    def _with_source_head(self, hidden: Tensor, places: slice) -> Tensor:
        self._head.forward = self._source_head.forward
        try:
            return _at(self._int8, hidden, places)
        finally:
            del self._head.forward


def run_in_mode(layers: Iterable[QuantizedLinear], searching: set[QuantizedLinear], mode: Mode) -> None:
    """Have layers run in a mode; those that search for outliers, as the model was loaded, do so where others do not."""
    for layer in layers:
        searches = mode.outliers == "static" and layer in searching
        layer.configure(**mode._replace(outliers="dynamic" if searches else mode.outliers)._asdict())


def int8_layers(model: Any) -> dict[str, QuantizedLinear]:
    """Return the int8 layers of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def stored_columns(layers: Collection[QuantizedLinear]) -> float:
    """Return the share of the input columns of layers that are stored in floating point, 0 to 1."""
    stored = sum(0 if layer.outlier_dims is None else len(layer.outlier_dims) for layer in layers)
    return stored / max(1, sum(layer.in_features for layer in layers))


def _at(halves: Halves, hidden: Tensor, places: slice) -> Tensor:
    return halves.logits(hidden[places])
