"""A 16-bit model whose weights are quantized when a layer is reached, in many ways at once, and forgotten then.

The model is streamed as the converter's calibrated pass streams it: memory holds one layer, and activations in float32.
A batch has the windows of the text once for each scheme, so a weight is read once for all that run together, and
multiplied by what each scheme makes of it (`layers.py`). Inputs are not quantized. Weights are those that
`llmint8-convert` would quantize by default in format 2: all linear layers and experts, without the output head and the
embeddings.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmint8.converter.calibration.streaming import LinearCall, blockwise_linear, streamed
from llmint8.converter.machine import return_freed_memory
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.config import in_float32
from llmint8.converter.model.experts import ExpertMatrix, in_order
from llmint8.converter.model.names import fused_parameters, parameter_tensors
from llmint8.converter.planning.plan import ConversionPlan
from llmint8.converter.planning.selected import SelectedLayer
from llmint8.formats import LLMInt8Error

from ..accuracy.evaluate import Measurement, measure
from ..accuracy.halves import Halves
from ..accuracy.methods import NotRowsError, parted_rows
from .layers import Weights
from .schemes import BASE, Scheme

# Activations of all that run together, of which there are so many copies, and how many run together at most: when they
# are done, what was measured is written down.
_ACTIVATION_BYTES = 1 << 30
_COPIES = 8
_MOST_TOGETHER = 4
# Logits are asked for at so many positions at least, or at as many as give so many logits.
_POSITIONS, _LOGITS = 64, 1 << 22

Progress = Callable[[str, int], None]
Found = Mapping[Scheme, Measurement]


class Simulation:
    """A model of a plan, on windows of token ids int64 [windows, W]."""

    def __init__(
        self, plan: ConversionPlan, windows: Tensor, calibration: Tensor, device: torch.device, progress: Progress
    ) -> None:
        """Take also windows to calibrate GPTQ with, where it runs, and whom to tell of each layer in each scheme.

        `progress` is called with the name of a layer and how many weights it has.
        """
        self._plan, self._windows, self._calibration = plan, windows, calibration
        self._device, self._progress = device, progress
        self._model: Any = meta_model(in_float32(plan.config))
        selection = plan.selection
        self._layers = {selection.module_of[name]: layer for name, layer in selection.multiplied.items()}
        self._order = in_order(self._model, self._layers, selection.experts.values())
        self._weights = Weights(plan, self._layers, self._order)
        self._schemes: Sequence[Scheme] = ()  # what the batch has, after what calibrates
        self._first = windows[:0]
        self._together = True

    def measure(self, schemes: Sequence[Scheme], found: Callable[[Found], None]) -> None:
        """Measure schemes against the model as it is; `found` is called with some of them after the other.

        Raises:
            LLMInt8Error: the model cannot be run without its weights, or gives what is not finite.

        """
        with self._streamed() as call:
            call(self._measure, {"schemes": schemes, "found": found})

    def _measure(self, schemes: Sequence[Scheme], found: Callable[[Found], None]) -> None:
        halves = Halves(self._model, self._windows[0])
        expected = self._hidden(halves, [BASE])[0]
        if BASE in schemes:
            found(self._compared(halves, expected, {BASE: expected}))
        left = [scheme for scheme in schemes if scheme != BASE]
        while left:
            some = [scheme for scheme in left if scheme.rounding == left[0].rounding][: self._count()]
            try:
                hidden = self._hidden(halves, some)
            except NotRowsError as error:
                if not self._together:
                    why = "so GPTQ cannot be calibrated for it beside the text; leave --rounding gptq out"
                    raise LLMInt8Error(f"{error}, {why}") from None
                self._together = False
                continue
            found(self._compared(halves, expected, dict(zip(some, hidden, strict=True))))
            left = [scheme for scheme in left if scheme not in some]

    def _count(self) -> int:
        """Return how many schemes run together."""
        widest = max(max(layer.in_features, layer.out_features) for layer in self._layers.values())
        fitting = _ACTIVATION_BYTES // (4 * _COPIES * self._windows.numel() * widest)
        return min(_MOST_TOGETHER, max(1, fitting)) if self._together else 1

    def _hidden(self, halves: Halves, schemes: Sequence[Scheme]) -> Tensor:
        """Return the hidden states [schemes, windows, W, H]."""
        self._schemes, self._first = schemes, self._calibration if schemes[0].rounding == "gptq" else self._windows[:0]
        try:
            hidden = halves.hidden(torch.cat([self._first, self._windows.repeat(len(schemes), 1)]))
        finally:
            self._schemes = ()
        return hidden[len(self._first) :].reshape(len(schemes), *self._windows.shape, -1)

    def _compared(self, halves: Halves, expected: Tensor, hidden: Mapping[Scheme, Tensor]) -> Found:
        """Compare hidden states [windows, W, H] by the logits that they give."""
        runs = (
            (
                window,
                partial(_at, halves, expected[number]),
                {scheme.label: partial(_at, halves, states[number]) for scheme, states in hidden.items()},
            )
            for number, window in enumerate(self._windows)
        )
        vocabulary = getattr(self._model.config.get_text_config(), "vocab_size", _LOGITS)
        positions = max(_POSITIONS, min(self._windows.shape[1], _LOGITS // vocabulary))
        return dict(zip(hidden, measure(runs, positions).measurements, strict=True))

    def _multiply(self, name: str, x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply the rows of each scheme by what it makes of a weight [N, K]."""
        self._weights.see(name, weight)
        if not self._schemes:  # the model is only tried
            return blockwise_linear(rows, weight)
        count, first = len(self._schemes), len(self._first)
        calibration = rows[:0]
        if count > 1 or first:
            windows = first + count * len(self._windows)
            parted_rows(name, x, windows)
            each = len(rows) // windows
            calibration, rows = rows[: first * each], rows[first * each :]
        found = [blockwise_linear(calibration, weight)] if first else []
        for scheme, part in zip(self._schemes, rows.chunk(count), strict=True):
            made = self._weights.simulated(name, scheme, weight, x, calibration)
            found.append(blockwise_linear(part, made))
            self._progress(name, weight.numel())
        return torch.cat(found)

    @contextmanager
    def _streamed(self) -> Iterator[Callable[[Any, Mapping[str, Any]], None]]:
        """Return what calls a function in which the model runs, layer by layer."""
        plan, selection, model = self._plan, self._plan.selection, self._model
        read = plan.source.read
        tensor_of = parameter_tensors(model, plan.source.tensors)
        experts: dict[str, list[tuple[ExpertMatrix, SelectedLayer]]] = defaultdict(list)
        for matrix in selection.experts.values():
            experts[matrix.experts].append((matrix, selection.layers[matrix.name]))
        weights = {name: self._layers[name].weight.name for name in self._order}
        weights = {name: weight for name, weight in weights.items() if self._layers[name].name not in selection.experts}
        fused = fused_parameters(model, plan.source.tensors)
        what = model, tensor_of, fused, weights, experts
        outputs: dict[str, Callable[[], Tensor]] = {}
        with streamed(*what, outputs, read, _forget, self._device, self._multiply) as call:
            head: Any = model.get_output_embeddings()
            vars(head).pop("forward", None)  # the pass of a conversion has no use for logits
            is_plain = type(head) is nn.Linear
            if is_plain:
                own = next(name for name, module in model.named_modules() if module is head)
                named = {
                    part: tensor_of[f"{own}.{part}"] for part in ("weight", "bias") if f"{own}.{part}" in tensor_of
                }
                if "weight" in named:  # it is used for every few positions
                    wide = {part: read(name).to(self._device).float() for part, name in named.items()}
                    head.forward = partial(functional.linear, **wide)
            yield call


def _forget(call: LinearCall) -> None:
    return_freed_memory()


def _at(halves: Halves, hidden: Tensor, places: slice) -> Tensor:
    return halves.logits(hidden[places])
