"""The calibrated pass: every layer is measured and quantized when the forward pass reaches it.

How many columns a layer keeps in 16 bit is known only when all layers have been seen. Until then its candidate columns
are put aside in the journal of the conversion, so that no weight is read twice. With them go what the choice needs to
know of the weight, and the layer's output where that is small: a conversion that goes on after an interruption runs
the pass again, but reads and multiplies by few of the weights that it had reached.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmint8.formats import LLMInt8Error
from llmint8.formats.writing.journal import Journal, Record

from ..coding import Grid
from ..machine import return_freed_memory, same_random_numbers
from ..model.buffers import nobodys_notice
from ..model.build import meta_model
from ..model.config import in_float32
from ..model.experts import ExpertMatrix, in_order
from ..model.inputs import runs
from ..model.names import fused_parameters, parameter_tensors
from ..outliers.choosing import select
from ..outliers.measuring import Curve, InputStatistics, column_norms
from ..planning.plan import ConversionPlan
from ..planning.selected import SelectedLayer, kept_output_bytes
from ..words import first_line, rounded
from .columns import Outliers, ProxyColumns, known_columns
from .gptq import Gptq, Round, Rounding
from .streaming import LinearCall, streamed
from .text import Calibration

log = logging.getLogger("llmint8")

# Statistics of so many candidates go into the manifest, of a layer's chosen ones in any case.
_RECORDED_CANDIDATES = 64
_FLOAT16_MAX = torch.finfo(torch.float16).max

Quantize = Callable[[SelectedLayer, Tensor, Round | None], tuple[Tensor, Grid]]


class Calibrator:
    """Runs the pass and chooses the outliers."""

    def __init__(
        self,
        plan: ConversionPlan,
        batch: Calibration,
        device: torch.device,
        journal: Journal,
        rounding: Rounding | None = None,
    ) -> None:
        """Take the plan, what to show to the model, where to run, and where to put columns aside.

        `rounding` finds the codes of weights; that which the plan's options name by default.
        """
        self._plan, self._batch, self._device, self._journal = plan, batch, device, journal
        self._statistics = InputStatistics(plan.criterion, plan.options.scheme, self._remember_curve)
        self._notices: list[str] = []
        self._overflow = 0.0, ""
        gptq = plan.options.rounding == "gptq"
        proxy = ProxyColumns(plan).dims if plan.criterion.kind == "proxy" else None
        self._rounding = rounding or (Gptq(plan.criterion, plan.options.scheme, proxy) if gptq else None)
        self.shown: dict[str, int] = {}

    def run(self, read: Callable[[str], Tensor], quantize: Quantize, has: Callable[[SelectedLayer], bool]) -> None:
        """Run the model on what it takes, until all layers are reached; `shown` then has on what, and how many tokens.

        What the model's code raises ends a run early, and is noted where layers were left out, not raised.

        Args:
            read: returns a tensor of the source.
            quantize: quantizes and writes a layer's weight [N, K], its codes found by a function of weight and grid
                where one is given; returns the codes [N, K] and their grid.
            has: tells whether an earlier run has written a layer.

        """
        selection = self._plan.selection
        model: Any = meta_model(in_float32(self._plan.config))
        module_of = selection.module_of
        layers = {module_of[name]: layer for name, layer in selection.multiplied.items()}
        order = in_order(model, layers, selection.experts.values())
        done = {name: record for name in order if (record := self._earlier(layers[name], has)) is not None}
        not_finite: dict[str, None] = {}
        tensor_of = parameter_tensors(model, self._plan.source.tensors)
        reached: set[str] = set()
        finished: set[str] = set()
        failed: list[bool] = []

        @contextmanager
        def ours() -> Iterator[None]:
            try:
                yield
            except BaseException:
                failed.append(True)
                raise

        @ours()
        def on_linear(call: LinearCall) -> None:
            return_freed_memory()
            layer = layers[call.name]
            finite = bool(call.rows.isfinite().all())
            reached.add(layer.name)
            if self._plan.dtype == "F16":
                for what, values in (("input", call.rows), ("output", call.out)):
                    self._large(what, layer.name, values)
            if not finite:
                not_finite[layer.name] = None
            # Of an earlier run, or of an earlier call.
            record = self._earlier(layer, has)
            if record is not None:
                if finite:
                    norms = self._journal.load(record.tensors[1]).to(self._device)
                    self._statistics.see(layer.name, call.x, call.rows, (norms[0], norms[1]), call.out)
                return
            assert call.weight is not None
            rounding = self._rounding.of(layer.name, call.x, call.rows) if self._rounding and finite else None
            codes, grid = quantize(layer, call.weight, rounding)
            if finite:
                norms = torch.stack(column_norms(call.weight, codes, grid, self._plan.options.scheme.rotation))
                dims = self._statistics.see(layer.name, call.x, call.rows, (norms[0], norms[1]), call.out)
                # What is put aside stands for the first call.
                self._put_aside(layer, call.weight, dims, norms, None if layer.name in not_finite else call.out)

        known = {n: partial(self._journal.load, r.tensors[2]) for n, r in done.items() if len(r.tensors) > 2}
        fused = fused_parameters(model, self._plan.source.tensors)
        weights = {name: layers[name].weight.name for name in order if layers[name].name not in selection.experts}
        experts: dict[str, list[tuple[ExpertMatrix, SelectedLayer]]] = defaultdict(list)
        for matrix in selection.experts.values():
            experts[matrix.experts].append((matrix, selection.layers[matrix.name]))
        ended: dict[str, str] = {}  # what the model was shown -> why that came to no end
        with (
            same_random_numbers(self._device),
            streamed(model, tensor_of, fused, weights, experts, known, ours()(read), on_linear, self._device) as call,
        ):
            for run in runs(model, self._batch.tokens.to(self._device), self._batch.given):
                before = len(reached)
                if before == len(layers) or run.what in finished:
                    continue
                try:
                    call(run.method, run.arguments)
                    finished.add(run.what)
                except (LLMInt8Error, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
                    raise
                except Exception as error:  # the model's code may raise anything
                    if failed or "DefaultCPUAllocator" in str(error):  # out of memory has no type of its own there
                        raise
                    log.debug("calibration pass, %s", run.what, exc_info=True)
                    ended.setdefault(run.what, first_line(error))
                if len(reached) > before:
                    self.shown[run.what] = max(self.shown.get(run.what, 0), run.tokens)
        if len(reached) < len(layers):
            early = [
                error if what == "text" else f"{what}: {error}" for what, error in ended.items() if what not in finished
            ]
            self._notices += [f"the calibration pass ended early ({'; '.join(early)})"] if early else []
        self._notices += selection.starved(reached)
        if self._rounding and self._rounding.wide:
            self._notices.append(self._rounding.notice)
        if nobodys := nobodys_notice(model, tensor_of.keys()):
            self._notices.append(nobodys)
        self._conclude(list(not_finite))

    def _conclude(self, not_finite: Sequence[str]) -> None:
        value, where = self._overflow
        if value:
            self._notices.append(
                f"{where} reaches {value:.4g} in the calibration, and float16 holds {_FLOAT16_MAX:g} at most: the "
                "model may give NaN in float16; convert it with --dtype bfloat16"
            )
        if not_finite:
            more = f" and {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
            self._notices.append(
                f"the input of {not_finite[0]}{more} holds NaN or infinity and was not measured; is the source whole?"
            )

    def _large(self, what: str, name: str, values: Tensor) -> None:
        """Remember the largest value that float16 cannot hold; what is not a number has a notice of its own."""
        low, high = torch.aminmax(values)
        value = max(-float(low), float(high))
        if _FLOAT16_MAX < value < float("inf") and value > self._overflow[0]:
            self._overflow = value, f"the {what} of {name}"

    def _earlier(self, layer: SelectedLayer, has: Callable[[SelectedLayer], bool]) -> Record | None:
        """Return what was put aside of a layer that is written."""
        record = self._journal.get("layer", layer.name)
        return record if record is not None and has(layer) else None

    def _put_aside(self, layer: SelectedLayer, weight: Tensor, dims: Tensor, norms: Tensor, out: Tensor | None) -> None:
        """Record the columns of a weight [N, K] at `dims`, as rows; the norms [2, K]; and maybe the output [M, N]."""
        tensors = [weight[:, dims.to(weight.device)].t(), norms]
        if out is not None and kept_output_bytes(layer, len(out)):
            tensors.append(out)
        self._journal.put("layer", layer.name, dims.tolist(), [tensor.cpu().contiguous() for tensor in tensors])

    def _remember_curve(self, layers: str, measure: Callable[[], Curve]) -> Curve:
        return self._journal.remember("curve", layers, measure)  # type: ignore[no-any-return]

    def _columns(self, layer: SelectedLayer, dims: Tensor) -> Tensor:
        """Return the columns [N, k] of a weight; those that were put aside, or of the weight itself."""
        record = self._journal.get("layer", layer.name)
        rows = {dim: row for row, dim in enumerate(record.value)} if record else {}
        if record is None or not rows.keys() >= set(dims.tolist()):
            # Another machine began this: its rounding, and so its order of the candidates, may be another.
            weight = self._plan.source.read(layer.weight.name)
            return (weight.t() if layer.transposed else weight)[:, dims]
        columns = record.tensors[0]
        return torch.cat([self._journal.load(columns.rows(rows[dim], rows[dim] + 1)) for dim in dims.tolist()]).t()

    def choose(self) -> Outliers:
        """Choose the outliers of all layers seen, or those that were known before."""
        groups = self._statistics.finish()
        known = None if self._plan.criterion.measured else known_columns(self._plan)
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
                "kept_absmax": group.kept_absmax(count),
                "ks": group.ks,
                "errors": rounded(group.errors),
            }

        dims_of = {name: group.dims for group in groups for name in group.layers}

        def load(name: str) -> tuple[Tensor, Tensor]:
            dims = dims_of[name][positions[name]].sort().values
            return dims.to(torch.int32), self._columns(self._plan.selection.layers[name], dims)

        if known is not None:
            return Outliers(known.counts, statistics, self._notices, known.load)
        return Outliers(counts, statistics, self._notices, load)
