"""The calibrated pass: every layer is measured and quantized when the forward pass reaches it.

How many columns a layer keeps in 16 bit is known only when all layers have been seen. Until then its candidate columns
are put aside in a temporary file beside the result, so that no weight is read twice.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import LLMInt8Error
from llmint8.formats.tensors import as_bytes
from llmint8.kernels.reference import Activation

from .models import first_line, meta_model, text_inputs
from .names import fused_parameters, parameter_tensors
from .outliers import InputStatistics, column_norms, rounded, select
from .plan import ConversionPlan
from .select import SelectedLayer
from .streaming import LinearCall, stream_forward

log = logging.getLogger("llmint8")

# How rows of activations are quantized unless the user asks otherwise: lower KL than absmax (docs/accuracy.md).
ACTIVATION: Activation = "zeropoint"
# Statistics of so many candidates go into the manifest, of a layer's chosen ones in any case.
_RECORDED_CANDIDATES = 64

Quantize = Callable[[SelectedLayer, Tensor], tuple[Tensor, Tensor]]


def _no_columns(name: str) -> tuple[Tensor, Tensor]:
    raise KeyError(name)


@dataclass(frozen=True)
class Outliers:
    """The outlier columns chosen; none by default.

    `counts` has the calibrated layers only, `statistics` is for the manifest, `notices` are for the user, and `load`
    returns a layer's dims, int32 [k], and columns [N, k].
    """

    counts: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    load: Callable[[str], tuple[Tensor, Tensor]] = _no_columns


class Calibrator:
    """Runs the pass and chooses the outliers. A context manager: the columns put aside go with it."""

    def __init__(self, plan: ConversionPlan, tokens: Tensor, device: torch.device) -> None:
        """Take the plan and a batch of token ids [rows, length]."""
        self._plan, self._tokens, self._device = plan, tokens, device
        self._statistics = InputStatistics(plan.criterion, ACTIVATION)
        self._spool = _ColumnSpool(plan.out)
        self._notices: list[str] = []

    def __enter__(self) -> "Calibrator":
        """Return the calibrator."""
        return self

    def __exit__(self, *error: object) -> None:
        """Drop the columns that were put aside."""
        self._spool.close()

    def run(self, read: Callable[[str], Tensor], quantize: Quantize) -> None:
        """Run the forward pass. What the model's code raises ends it early, and is noted, not raised.

        Args:
            read: returns a tensor of the source.
            quantize: quantizes and writes a layer's weight [N, K]; returns int8 [N, K] and absmax float32 [N].

        """
        selection = self._plan.selection
        model: Any = meta_model(self._plan.config)
        module_of = selection.module_of
        layers = {module_of[name]: layer for name, layer in selection.layers.items()}
        order = [name for name, _ in model.named_modules() if name in layers]

        not_finite: list[str] = []

        def on_linear(call: LinearCall) -> None:
            layer = layers[call.name]
            values, absmax = quantize(layer, call.weight)
            if not bool(call.rows.isfinite().all()):
                not_finite.append(layer.name)
                return
            norms = column_norms(call.weight, values, absmax)
            dims = self._statistics.see(layer.name, call.x, call.rows, norms, call.out)
            self._spool.put(layer.name, call.weight[:, dims.to(call.weight.device)])

        try:
            stream_forward(
                model,
                text_inputs(model, self._tokens.to(self._device)),
                parameter_tensors(model, self._plan.source.tensors),
                fused_parameters(model, self._plan.source.tensors),
                {name: layers[name].weight.name for name in order},
                read,
                on_linear,
                self._device,
            )
        except (LLMInt8Error, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's code may raise anything
            log.debug("calibration pass", exc_info=True)
            self._notices.append(
                f"the calibration pass ended early ({first_line(error)}); "
                "layers it did not reach have no outlier columns"
            )
        if not_finite:
            self._notices.append(
                f"the input of {not_finite[0]} and {len(not_finite) - 1} more holds NaN or infinity, so they are not "
                "calibrated; is the source whole?"
            )

    def choose(self) -> Outliers:
        """Choose the outliers of all layers seen."""
        groups = self._statistics.finish()
        chosen = select(groups, self._plan.criterion)
        counts: dict[str, int] = {}
        statistics: dict[str, dict[str, Any]] = {}
        positions: dict[str, Tensor] = {}
        for group, count in zip(groups, chosen, strict=True):
            for name in group.layers:
                counts[name] = count
                positions[name] = group.order[:count]
                statistics[name] = {"shares_input_with": group.layers[0]}
            recorded = max(count, _RECORDED_CANDIDATES)
            statistics[group.layers[0]] = {
                **{key: v[:recorded] if isinstance(v, list) else v for key, v in group.statistics.items()},
                "ks": group.ks,
                "errors": rounded(group.errors),
            }

        dims_of = {name: group.dims for group in groups for name in group.layers}

        def load(name: str) -> tuple[Tensor, Tensor]:
            dims, order = dims_of[name][positions[name]].sort()
            return dims.to(torch.int32), self._spool.get(name, positions[name][order])

        return Outliers(counts, statistics, self._notices, load)


class _ColumnSpool:
    """Columns of weights in an unnamed temporary file, one block [C, N] for each layer."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0

    def put(self, name: str, columns: Tensor) -> None:
        columns = columns.t().cpu().contiguous()
        data = as_bytes(columns)
        self._places[name] = (self._end, columns.dtype, columns.shape)
        self._file.seek(self._end)
        self._end += len(data)
        while data:
            data = data[self._file.write(data) :]

    def get(self, name: str, positions: Tensor) -> Tensor:
        """Return the columns [N, k] at some positions of what was put."""
        start, dtype, (_, rows) = self._places[name]
        columns = torch.empty(len(positions), rows, dtype=dtype)
        for column, position in zip(columns, positions.tolist(), strict=True):
            self._file.seek(start + position * rows * dtype.itemsize)
            view = as_bytes(column)
            if self._file.readinto(view) != len(view):
                raise OSError("the temporary file with outlier columns is cut short")
        return columns.t()

    def close(self) -> None:
        self._file.close()
