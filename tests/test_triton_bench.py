"""What measures the kernels, on the CPU: everything but the clock runs, in Triton's interpreter; on a GPU all of it."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmint8 import converter
from llmint8.kernels.gpu import measure, tiles, tune
from llmint8.runtime.commands import bench
from llmint8.runtime.commands.main import main

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu_linear(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("gpu_linear")


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> dict[str, list[Any]]:
    """Every call runs once, and the n-th variant takes n microseconds; the results by variant."""
    results: dict[str, list[Any]] = {}

    def interleaved(
        variants: Mapping[str, Sequence[Callable[[], Any]]], eager: Collection[str] = ()
    ) -> dict[str, measure.Timing]:
        assert set(eager) <= set(variants)
        results.update({name: [call() for call in calls] for name, calls in variants.items()})
        return {name: measure.Timing(number, number, number) for number, name in enumerate(variants, 1)}

    for module in (measure, tune):
        monkeypatch.setattr(module, "interleaved", interleaved)
        monkeypatch.setattr(module, "weight_copies", lambda nbytes, device: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return results


class FakeGpu:
    """A GPU whose calls take as long as they say; a graph takes what was captured into it, and 3 us to start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.graphs = 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time = 0.0

            def record(self) -> None:
                self.time = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return float(other.time - self.time) / 1000

        class Graph:
            duration = 0.0

            def replay(self) -> None:
                gpu.now += 3 + self.duration

        @contextmanager
        def capture(graph: Graph, pool: object) -> Iterator[None]:
            gpu.graphs += 1
            before = gpu.now
            yield
            graph.duration, gpu.now = gpu.now - before, before

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": object}
        for name, fake in (fakes | {"synchronize": lambda: None}).items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self, duration: float) -> Callable[[], None]:
        def run() -> None:
            self.now += duration

        return run


def test_times_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    quick, slow = [gpu.call(10.0), gpu.call(30.0)], [gpu.call(9000.0)] * 40
    times = measure.interleaved({"quick": quick, "slow": slow, "as it is": quick}, eager={"as it is"})
    assert gpu.graphs == 2
    # A graph holds at least 16 calls, so its start counts for little.
    assert times["quick"].median == pytest.approx(20 + 3 / 16)
    assert times["slow"].median == pytest.approx(9000 + 3 / 40)
    assert times["as it is"] == pytest.approx((20, 20, 20))


def test_a_timing_is_a_median_with_percentiles() -> None:
    assert measure.summary([float(number) for number in range(11)]) == (5, 1, 9)


@pytest.mark.parametrize("m", [1, 17])
def test_every_variant_of_the_benchmark_computes_the_layer(
    m: int, gpu_linear: ModuleType, no_clock: dict[str, list[Any]]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the benchmark itself shows it")
    torch.manual_seed(0)
    rows = gpu_linear.measured_rows("a device", m, 64, 128, CPU)
    expected = no_clock["fp16"]
    assert len(expected) == 2
    assert not torch.equal(*expected)
    for name, found in no_clock.items():
        if name.startswith("quantize"):
            assert found[0].values.shape == (m, 128)
            continue
        for one, other in zip(found, expected, strict=True):
            error = (one.float() - other.float()).norm() / other.float().norm()
            assert error < (0.03 if name.startswith("ours") else 0.2), name
    assert ("int_mm" in no_clock) == (m > 16)
    assert [row["outliers"] for row in rows] == [0, 16, 64]
    assert [row["ours_us"] for row in rows] == [1, 2, 3]
    assert [row["quantize_us"] for row in rows] == [4, 5, 6]
    assert all(row["fp16_us"] == 7 and row["int_mm_us"] == (8 if m > 16 else None) for row in rows)


def test_the_floors_are_those_of_the_memory_and_of_the_tensor_cores(gpu_linear: ModuleType) -> None:
    assert gpu_linear.floor_us(1, 4096, 4096) == pytest.approx(3.9, abs=0.05)
    assert gpu_linear.floor_us(128, 28672, 7168) == pytest.approx(49.7, abs=0.5)
    assert gpu_linear.floor_us(8192, 49152, 12288) == pytest.approx(6263, abs=5)


def test_a_run_writes_every_case_with_the_names_that_were_agreed(
    gpu_linear: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = []

    def measured(name: str, m: int, n: int, k: int, device: object) -> list[dict[str, Any]]:
        shapes.append((m, n, k))
        row = {"device": name, "model": None, "layer": None, "M": m, "N": n, "K": k, "outliers": 0, "ours_us": 2.0}
        return [row | dict.fromkeys(("quantize_us", "fp16_us", "floor_us"), 1.0) | {"bnb_us": None}]

    monkeypatch.setattr(gpu_linear, "measured_rows", measured)
    file = tmp_path / "results" / "gpu_linear-x.json"
    rows = gpu_linear.run(["OPT-6.7B", "Llama-3-8B"], [1, 16], CPU, "X", file)
    assert len(rows) == 2 * (3 + 4)
    assert len(shapes) == len(set(shapes)) == 2 * (3 + 3)  # both have a layer of 4096 x 4096
    assert json.loads(file.read_text()) == rows
    gpu_linear.run(["OPT-6.7B"], [16, 64], CPU, "X", file)
    again = json.loads(file.read_text())
    assert len(again) == len(rows) + 3
    assert [line.split()[0] for line in gpu_linear.table(again)][:2] == ["model", "OPT-6.7B"]
    assert {(row["model"], row["layer"]) for row in again} >= {("OPT-6.7B", "fc1"), ("Llama-3-8B", "gate, up")}


def test_the_rows_have_the_fields_that_were_agreed(gpu_linear: ModuleType, no_clock: dict[str, list[Any]]) -> None:
    if torch.cuda.is_available():
        pytest.skip("bitsandbytes would be called on the GPU")
    fields = [
        "device",
        "model",
        "layer",
        "M",
        "N",
        "K",
        "outliers",
        "ours_us",
        "quantize_us",
        "fp16_us",
        "int_mm_us",
        "bnb_us",
        "bnb0_us",
        "floor_us",
    ]
    (row, *_) = gpu_linear.measured_rows("a device", 2, 16, 64, CPU)
    assert list(row) == fields


@pytest.mark.soak
def test_the_tuner_takes_the_fastest_tile_and_keeps_what_was_there(
    no_clock: dict[str, list[Any]], interpreter: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(tune, "TUNED_M", (6, 7))
    monkeypatch.setattr(tune, "AMPERE", tune.AMPERE[:1])
    monkeypatch.setattr(tune, "FEW_ROWS", tune.FEW_ROWS[:1])
    monkeypatch.setattr(tune, "SPLITS", (1, 2))
    tiles.forget()
    bench._tune([bench.Shape(64, 128, 3, 1)], CPU, True)
    first = tiles.read_table(tiles.cache_path().read_text())
    assert [(row.architecture, row.n, row.k, row.m) for row in first] == [("any", 64, 128, m) for m in (6, 7)]
    assert [row.tile for row in first] == [tune.candidates(m, (8, 0))[0] for m in (6, 7)]
    assert tiles.choose_tile(CPU, 5, 64, 128) == first[0].tile
    monkeypatch.setattr(tune, "candidates", lambda m, capability: [tiles.MatmulTile(16, 16, 32, 1, 4, 2)])
    bench._tune([bench.Shape(32, 128, 3, 1), bench.Shape(64, 128, 3, 1)], CPU, True)
    second = tiles.read_table(tiles.cache_path().read_text())
    assert {(row.n, row.m) for row in second} == {(64, 6), (64, 7), (32, 6), (32, 7)}
    assert all(row.tile.block_n == 16 for row in second)
    tiles.forget()


def test_a_tile_that_does_not_fit_is_left_out() -> None:
    def call() -> None:
        raise RuntimeError("out of resource: shared memory")

    assert not tune._fits(call)


def test_outlier_dims_lie_all_over_the_row() -> None:
    dims = tune.scattered_dims(16, 4096, CPU)
    assert dims.dtype == torch.int32
    assert bool((dims.diff() > 0).all())
    assert int(dims.diff().min()) != int(dims.diff().max())
    assert len({int(dim) // 1024 for dim in dims}) == 4
    assert tune.scattered_dims(16, 3, CPU).tolist() == [0, 1, 2]


def test_the_layers_of_a_checkpoint_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="none")
    found, group = bench.layers_of(str(tmp_path / "out"))
    assert group == bench.layers_of(None)[1] == 128
    assert found == [(32, 32, 0, 8), (32, 48, 0, 2), (48, 32, 0, 4)]


def test_layer_times_are_those_of_the_layer_and_of_float16(
    no_clock: dict[str, list[Any]], device: torch.device
) -> None:
    assert bench.layer_times(bench.Shape(48, 64, 3, 1), 5, device, 128) == (1, 2)
    for found, expected in zip(no_clock["int8"], no_clock["float16"], strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [[], ["--tune"], ["/nowhere"]])
def test_without_a_gpu_there_is_one_line(options: list[str]) -> None:
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no GPU here")
    assert result.stderr.count("\n") == 1


@pytest.mark.gpu
def test_the_command_times_and_tunes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "COMMON", [bench.Shape(512, 512, 16, 1)])
    monkeypatch.setattr(tune, "TUNED_M", (64, 256))
    tiles.forget()
    result = CliRunner().invoke(main, ["bench", "--tune"])
    assert result.exit_code == 0, result.output
    assert len(tiles.read_table(tiles.cache_path().read_text())) == 2
    assert len(result.stdout.splitlines()) == 2 + len(bench.MEASURED_M)
    tiles.forget()


@pytest.mark.parametrize("m", [1, 17])
def test_every_variant_of_the_benchmark_of_k_bits_computes_the_layer(
    m: int, benchmark: Callable[[str], ModuleType], no_clock: dict[str, list[Any]]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the benchmark itself shows it")
    gpu_kbit = benchmark("gpu_kbit")
    torch.manual_seed(0)
    rows = gpu_kbit.measured_rows("a device", m, 32, 64, CPU, (3, 4, 8))
    assert [row["bits"] for row in rows] == [3, 4, 8]
    assert [row["ours_us"] for row in rows] == [1, 2, 3]
    assert [row["columns_us"] for row in rows] == [None, 4, None]
    assert all(row["bf16_us"] == 5 and row["int8_us"] == 6 for row in rows)
    for name, found in no_clock.items():
        for one, other in zip(found, no_clock["bf16"], strict=True):
            error = (one.float() - other.float()).norm() / other.float().norm()
            assert error < (0.3 if "3" in name else 0.15), name
    assert gpu_kbit.floor_us(1, 4096, 4096, 4) == pytest.approx(2.07, abs=0.02)
    lines = list(gpu_kbit.table([row | {"model": "OPT-6.7B", "layer": "fc1"} for row in rows]))
    assert lines[2].split()[:9] == ["OPT-6.7B", "fc1", str(m), "32", "64", "4", "2.0", "4.0", "6.0"]
