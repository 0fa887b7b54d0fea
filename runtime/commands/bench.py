"""The command `llmint8 bench`: times int8 layers on this GPU, and finds the fastest kernels for it."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.progress import pass_bar
from llmint8.converter.words import count

if TYPE_CHECKING:
    from ..layers.arguments import ActivationGroup

MEASURED_M = (1, 16, 128, 2048)


class Shape(NamedTuple):
    """Layers of one size in a model."""

    out_features: int
    in_features: int
    outliers: int
    layers: int


# The layers of a model of 8 billion parameters, Llama 3's, for those who name no checkpoint.
COMMON = [Shape(4096, 4096, 16, 64), Shape(1024, 4096, 16, 64), Shape(14336, 4096, 16, 64), Shape(4096, 14336, 16, 32)]


@click.command("bench", cls=Command)
@click.argument("checkpoint", required=False)
@click.option("--tune", is_flag=True, help="First find the fastest kernels for this GPU, and keep them in the cache.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def bench_command(checkpoint: str | None, tune: bool, quiet: bool) -> None:
    """Time the layers of CHECKPOINT on this GPU, in int8 and in float16.

    CHECKPOINT is a directory or a Hub repo id; without it the layers are those of Llama 3 8B. Inputs are quantized in
    the groups that it records, or that llmint8-convert would.
    """
    set_up_logging(False)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("no GPU here: `llmint8 bench` times the GPU kernels, and PyTorch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    shapes, group = layers_of(checkpoint)
    if tune:
        _tune(shapes, device, quiet)
    echo_result(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, times in microseconds")
    echo_result(
        f"{'out':>7}{'in':>7}{'layers':>8}{'16-bit columns':>16}{'M':>7}{'int8':>10}{'float16':>10}{'ratio':>8}"
    )
    for shape in shapes:
        for m in MEASURED_M:
            int8, float16 = layer_times(shape, m, device, group)
            echo_result(
                f"{shape.out_features:>7}{shape.in_features:>7}{shape.layers:>8}{shape.outliers:>16}{m:>7}"
                f"{int8:>10.1f}{float16:>10.1f}{float16 / int8:>8.2f}"
            )


def layers_of(checkpoint: str | None) -> tuple[list[Shape], "ActivationGroup"]:
    """Return the sizes of a checkpoint's int8 layers, each with its layers' mean number of outlier columns.

    And how many dimensions of an input share a scale there. Of no checkpoint: common layers, and what the converter
    records.
    """
    from llmint8.converter.hub.resolve import resolve
    from llmint8.converter.planning.options import ACTIVATION_GROUP
    from llmint8.formats import open_checkpoint

    from ..layers.arguments import recorded_group

    if checkpoint is None:
        return COMMON, ACTIVATION_GROUP
    opened = open_checkpoint(resolve(checkpoint, None, "int8").path)
    records = [record for record in opened.records.values() if record.scheme.lookup != "only"]
    if any(record.scheme.kbit is not None for record in records):
        raise ValueError(f"{checkpoint}: has weights of k bits, which bench does not time; see docs/kbit.md")
    layers = Counter((record.out_features, record.in_features) for record in records)
    columns: Counter[tuple[int, int]] = Counter()
    for record in records:
        columns[record.out_features, record.in_features] += record.outlier_count or 0
    shapes = [Shape(n, k, round(columns[n, k] / count), count) for (n, k), count in sorted(layers.items())]
    return shapes, recorded_group(opened.quantization)


def _tune(shapes: Sequence[Shape], device: Any, quiet: bool) -> None:
    """Try the kernels for every size, and write the fastest into the user's cache after each."""
    from llmint8.formats.disk.durable import write_durably
    from llmint8.kernels.gpu import tiles, tune

    path = tiles.cache_path()
    if path is None:
        raise ValueError("no home directory to keep the fastest kernels in; set XDG_CACHE_HOME to a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = sorted({(shape.out_features, shape.in_features) for shape in shapes})
    with pass_bar("Tuning", quiet) as progress:
        for n, k in sizes:
            fastest = tune.tune(device, n, k, partial(progress, f"{n} x {k}", len(sizes) * len(tune.TUNED_M)))
            found = {(e.architecture, e.n, e.k, e.m): e for e in [*tiles.cached_table(), *fastest]}
            write_durably(path, tiles.write_table(list(found.values())).encode())
            tiles.forget()
    click.echo(f"The fastest kernels for {count(len(sizes), 'size')} of layers are in {path}", err=True)


def layer_times(shape: Shape, m: int, device: Any, group: "ActivationGroup") -> tuple[float, float]:
    """Return the microseconds of a layer in int8 and in float16, for calls of so many rows."""
    import torch
    from torch.nn.functional import linear

    from llmint8.kernels.gpu.measure import interleaved, weight_copies
    from llmint8.kernels.gpu.tune import scattered_dims

    from ..layers.layer import Int8Linear

    n, k, outliers, _ = shape
    dims = scattered_dims(outliers, k, device)
    made = []
    for _ in range(weight_copies(n * k, device)):
        weight = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.float16)
        layer = Int8Linear.from_linear(weight, dims)
        layer.configure(activation="zeropoint", activation_group=group)
        made.append((layer, weight.weight))
    x = torch.randn(m, k, dtype=torch.float16, device=device)
    with torch.no_grad():
        times = interleaved(
            {
                "int8": [partial(layer, x) for layer, _ in made],
                "float16": [partial(linear, x, weight) for _, weight in made],
            }
        )
    return times["int8"].median, times["float16"].median
