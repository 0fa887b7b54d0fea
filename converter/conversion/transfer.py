"""Every tensor of the source on its way into the result: read, quantized or not, written once, forgotten."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from llmint8.formats import DTYPES, CheckpointWriter, SourceError, TensorInfo, outlier_specs

from ..calibration.columns import Outliers
from ..calibration.gptq import Round
from ..coding import Grid, levels_of_rows, round_to_nearest
from ..planning.plan import ConversionPlan, in_file_order, output_dtype
from ..planning.selected import SelectedLayer

Progress = Callable[[str, int], None]


class Transfer:
    """A conversion under way: every tensor of the source is written once, whoever comes by it first."""

    def __init__(
        self, plan: ConversionPlan, writer: CheckpointWriter, device: torch.device, progress: Progress
    ) -> None:
        """Take the plan, the writer with its shards laid out, where to quantize, and whom to tell of what is done."""
        self._plan, self._writer, self._device, self._progress = plan, writer, device, progress
        self._layer_of = plan.selection.layer_of
        # What is to be done with each tensor; with the embedding of a tied head that becomes int8, both.
        self._to_quantize = set(self._layer_of)
        self._to_copy = {name for name in plan.source.tensors if self._is_copied(name)}
        self._lock = threading.Lock()

    def _is_copied(self, name: str) -> bool:
        layer = self._layer_of.get(name)
        return layer is None or layer.tied

    def read(self, name: str) -> Tensor:
        """Read a tensor; write it if it is one that is not quantized. What is written already is read from there."""
        info = self._plan.source.tensors[name]
        written = self._is_copied(name) and self._writer.has(name)
        if written and info.dtype == output_dtype(info.dtype, self._plan.dtype):
            tensor = self._writer.read(name)
        else:
            tensor = self._plan.source.read(name)
        if name in self._to_copy:
            if not written:
                # To cast a tensor, an embedding for example, takes several times its size; so its blocks are cast.
                blocks = torch.split(tensor, info.rows_per_block) if tensor.ndim and tensor.numel() else (tensor,)
                self._writer.write_rows(name, (self._cast(block, info) for block in blocks))
            self._finish(name, self._to_copy)
        return tensor

    def quantize(self, layer: SelectedLayer, weight: Tensor, rounding: Round | None = None) -> tuple[Tensor, Grid]:
        """Quantize a weight [N, K], write it, and return its codes and their grid.

        `rounding` finds the codes, of the weight and its grid, where they are not those that are nearest.
        """
        with _one_thread():
            codes, grid = self._quantized(layer, weight, 0)
        if rounding is not None:
            codes = rounding(weight, grid)
        self._writer.write(f"{layer.name}.weight", grid.stored(codes))
        self._write_scales(layer, grid)
        return codes, grid

    def has(self, layer: SelectedLayer) -> bool:
        """Tell whether an earlier run has written a layer; then it is done."""
        suffixes = self._plan.options.layout.weight_suffixes(self._plan.scheme_of(layer))
        found = self._writer.has(*(f"{layer.name}.{suffix}" for suffix in suffixes))
        if found:
            self._finish(layer.weight.name, self._to_quantize)
        return found

    def convert_rest(self) -> None:
        """Convert what has not been reached yet, from the front of the files to their end, several tensors at a time.

        Each thread has torch for itself on one core: blocks of cache size are quantized faster than a disk reads, and
        nothing ever waits at the barriers of OpenMP, which stall when something else uses the cores.
        """
        rest = [info.name for info in in_file_order(self._plan.source)]
        with _one_thread(), ThreadPoolExecutor(self._plan.options.threads, initializer=_use_one_thread) as pool:
            for _ in pool.map(self._convert, rest):
                pass

    def _convert(self, name: str) -> None:
        if name in self._to_copy:
            self._copy(name)
        if name in self._to_quantize and not self.has(self._layer_of[name]):
            self._convert_layer(self._layer_of[name])

    def _copy(self, name: str) -> None:
        info = self._plan.source.tensors[name]
        if not self._writer.has(name):
            blocks = self._plan.source.read_rows(name)
            self._writer.write_rows(name, (self._cast(block, info) for block in blocks))
        self._finish(name, self._to_copy)

    def _convert_layer(self, layer: SelectedLayer) -> None:
        """Quantize a weight in blocks of its rows, so that memory does not depend on its size.

        Where a layer has levels of its own they are found first, for which the weight is read twice.
        """
        shape, how = (layer.out_features, layer.in_features), self._plan.scheme_of(layer).kbit
        levels = levels_of_rows(self._rows(layer), shape, how) if how and how.has_codebook else None
        grids: list[Grid] = []

        def quantized() -> Iterator[Tensor]:
            first_row = 0
            for block in self._rows(layer):
                codes, grid = self._quantized(layer, block, first_row, levels)
                grids.append(grid)
                first_row += len(codes)
                yield grid.stored(codes)

        self._writer.write_rows(f"{layer.name}.weight", quantized())
        self._write_scales(layer, grids[0].with_absmax(torch.cat([grid.absmax for grid in grids])))

    def _rows(self, layer: SelectedLayer) -> Iterator[Tensor]:
        return (block.to(self._device) for block in layer.read_rows(self._plan.source))

    def _quantized(
        self, layer: SelectedLayer, weight: Tensor, first_row: int, levels: Tensor | None = None
    ) -> tuple[Tensor, Grid]:
        codes, grid = round_to_nearest(weight, self._plan.scheme_of(layer), levels)
        if not bool(grid.absmax.isfinite().all()):
            row = int((~grid.absmax.isfinite()).nonzero()[0][0])
            if bool(weight[row].isfinite().all()):
                what = f"reaches {float(weight[row].abs().max()):g}, and scales of k bits hold 65504 at most; --skip it"
            else:
                what = "holds NaN or infinity; go on with --on-nonfinite keep, which leaves it as it is"
            raise self._refused(layer.weight, f"output row {first_row + row} {what}")
        return codes, grid

    def _write_scales(self, layer: SelectedLayer, grid: Grid) -> None:
        for suffix, tensor in grid.scales(self._plan.options.layout).items():
            self._writer.write(f"{layer.name}.{suffix}", tensor)
        self._finish(layer.weight.name, self._to_quantize)

    def write_outliers(self, outliers: Outliers) -> None:
        """Write the outlier tensors of every layer, empty ones where none were chosen."""
        specs = {}
        for name, layer in self._plan.selection.layers.items():
            stored = output_dtype(layer.weight.dtype, self._plan.dtype)
            specs[name] = outlier_specs(name, layer.out_features, outliers.counts.get(name, 0), stored)
        if self._plan.criterion.measured:
            self._writer.plan(specs.values())
        for name, (dims_spec, columns_spec) in specs.items():
            layer = self._plan.selection.layers[name]
            if outliers.counts.get(name):
                dims, columns = outliers.load(name)
            else:
                dims = torch.empty(0, dtype=torch.int32)
                columns = torch.empty(columns_spec.shape, dtype=DTYPES[layer.weight.dtype])
            self._writer.write(dims_spec.name, dims)
            self._writer.write(columns_spec.name, self._cast(columns, layer.weight))

    def _cast(self, tensor: Tensor, info: TensorInfo) -> Tensor:
        """Cast to the dtype in which a source tensor is stored; what would become infinite is an error."""
        stored = DTYPES[output_dtype(info.dtype, self._plan.dtype)]
        result = tensor.to(stored)
        overflow = tensor.isfinite() & ~result.isfinite() if stored != tensor.dtype else None
        if overflow is not None and bool(overflow.any()):
            value = float(tensor[overflow].abs().max())
            dtype = str(stored).removeprefix("torch.")
            other = "with --dtype bfloat16 or without --dtype" if dtype == "float16" else "without --dtype"
            raise self._refused(info, f"{value:g} does not fit {dtype}; go on {other}")
        return result

    def _finish(self, name: str, to_do: set[str]) -> None:
        with self._lock:
            if name not in to_do:
                return
            to_do.remove(name)
            if name not in self._to_copy and name not in self._to_quantize:
                self._plan.source.release(name)
                self._progress(name, self._plan.source.tensors[name].nbytes)

    def _refused(self, info: TensorInfo, what: str) -> SourceError:
        return SourceError(f"{self._plan.source.path / info.file}: {info.name}: {what}")


_use_one_thread = partial(torch.set_num_threads, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread, here and in threads begun meanwhile; see `Transfer.convert_rest`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
