"""The layer as a PyTorch operator: its schema and fake, compilers, graphs; and on a GPU that nothing waits for it."""

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmint8.kernels import linear, operators, reference
from llmint8.kernels.cpu import native
from llmint8.kernels.operands import Operands
from llmint8.runtime import Int8Linear


def weight(threshold: float | None = None, bias: bool = True, k: int = 64) -> reference.Int8Weight:
    """With inputs in groups of 64, so that a larger k has several; one that is not searched is rotated."""
    random = torch.Generator().manual_seed(0)
    full = torch.randn(48, k, generator=random).half()
    dims = torch.tensor([3, 40], dtype=torch.int32)
    shift = torch.randn(48, generator=random).half() if bias else None
    rotation: reference.Rotation | None = 64 if threshold is None else None
    quantized = reference.quantize_weight(full, rotation)
    return reference.Int8Weight(*quantized, dims, full[:, dims.long()], shift, threshold, 64, rotation)


def arguments(device: str, m: int = 5, zeropoint: bool = True, bias: bool = True, k: int = 64) -> tuple[Any, ...]:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).half()
    *parts, _, group, rotation = Operands.prepare(weight(bias=bias, k=k))
    return *(None if part is None else part.to(device) for part in (x, *parts)), group, rotation, zeropoint


def dynamic_arguments(
    device: str, m: int = 5, zeropoint: bool = True, bias: bool = True, k: int = 64
) -> tuple[Any, ...]:
    """Of the operator that searches: two or more of the columns hold an outlier."""
    x, values, scale, row_sum, dims, _, shift, group, *_ = arguments(device, m, bias=bias, k=k)
    x[:, dims.long()] = 7.0
    return x, values, scale, row_sum, shift, 3.0, group, zeropoint


@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_passes(device_type: str, zeropoint: bool) -> None:
    for m, bias, k in ((0, True, 64), (1, True, 64), (5, True, 130), (2, False, 64)):
        torch.library.opcheck(operators.int8_linear, arguments(device_type, m, zeropoint, bias, k))


@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_passes_with_a_search(device_type: str, zeropoint: bool) -> None:
    for m, bias, k in ((0, True, 64), (1, True, 64), (5, True, 130), (2, False, 64)):
        torch.library.opcheck(operators.dynamic_int8_linear, dynamic_arguments(device_type, m, zeropoint, bias, k))


@pytest.mark.parametrize("threshold", [None, 3.0], ids=["stored", "searched"])
def test_a_compiler_gets_the_operator_and_an_eager_call_the_kernels(
    threshold: float | None, device: torch.device
) -> None:
    pytest.importorskip("triton")
    kept = weight(threshold)
    parts = (kept.values, kept.absmax, kept.outlier_dims, kept.outlier_weight, kept.bias)
    prepared = operators.GpuWeight.prepare(reference.Int8Weight(*(part.to(device) for part in parts), threshold))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(linear.int8_linear, backend=keep, fullgraph=True)(x, prepared, "zeropoint")
    wanted = operators.int8_linear if threshold is None else operators.dynamic_int8_linear
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [wanted]
    torch.testing.assert_close(compiled, linear.int8_linear(x, prepared, "zeropoint"))

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(func)
            return func(*args, **(kwargs or {}))

    heard: list[Any] = []
    with Listening():
        linear.int8_linear(x, prepared, "zeropoint")
    assert wanted in heard


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_compiles_into_one_graph_for_every_number_of_rows(device_type: str, search: bool) -> None:
    operator = operators.dynamic_int8_linear if search else operators.int8_linear
    made = dynamic_arguments if search else arguments
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    _, *layer = made(device_type)

    def double(x: Tensor) -> Tensor:
        return 2 * operator(x, *layer)

    compiled = torch.compile(double, backend=keep, fullgraph=True, dynamic=True)
    for m in (5, 7, 32):
        x = made(device_type, m)[0]
        assert torch.equal(compiled(x), double(x))
    assert len(graphs) == 1
    assert operator in {node.target for node in graphs[0].graph.nodes}


def test_the_layer_works_where_triton_is_not_installed() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from llmint8.runtime import Int8Linear\n"
        "print(tuple(Int8Linear.from_linear(torch.nn.Linear(8, 4))(torch.ones(2, 8)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(2, 4)\n", done.stderr


def test_without_triton_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    operators.has_triton.cache_clear()
    assert not operators.has_triton()
    assert not operators.has_triton()
    assert ["Triton is not installed" in record.getMessage() for record in caplog.records] == [True]
    operators.has_triton.cache_clear()


def test_transforms_and_traces_get_the_operator(device: torch.device) -> None:
    pytest.importorskip("triton")
    kept = weight()
    parts = (kept.values, kept.absmax, kept.outlier_dims, kept.outlier_weight, kept.bias)
    prepared = operators.GpuWeight.prepare(reference.Int8Weight(*(part.to(device) for part in parts)))
    x = torch.randn(3, 2, 64).to(device)
    expected = torch.stack([linear.int8_linear(part, prepared, "zeropoint") for part in x])
    by_vmap = torch.vmap(lambda part: linear.int8_linear(part, prepared, "zeropoint"))(x)
    torch.testing.assert_close(by_vmap, expected)
    traced = torch.jit.trace(lambda part: prepared.linear(part, "zeropoint"), x[0], check_trace=False)
    torch.testing.assert_close(traced(x[1]), expected[1])


def test_the_operator_runs_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "has_triton", lambda: False)
    x = torch.randn(3, 64).half()
    for kept in (weight(3.0), weight()):
        operands = Operands.prepare(kept)
        expected = reference.int8_linear(x, kept, "zeropoint")
        found = reference.int8_linear(x, operands.stored(), "zeropoint")
        torch.testing.assert_close(found, expected)
    operands = Operands(*(part.to("meta") if isinstance(part, Tensor) else part for part in operands))
    out = operators._run(x.to("meta"), operands, True)
    assert (out.shape, out.dtype, out.device.type) == ((3, 48), torch.float16, "meta")


def test_on_a_gpu_without_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_triton", lambda: False)
    with FakeTensorMode():
        kept = reference.Int8Weight(
            torch.zeros(48, 64, dtype=torch.int8, device="cuda"),
            torch.zeros(48, device="cuda"),
            torch.zeros(0, dtype=torch.int32, device="cuda"),
            torch.zeros(48, 0, device="cuda"),
        )
        assert linear.prepare(kept).runs_on == "plain PyTorch on cuda"


def test_shapes_depend_on_values_where_plain_torch_searches_on_the_cpu_and_not_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors without values show it, and no GPU has to be there."""
    monkeypatch.setattr(native, "kinds", list)
    for device, outcome in (("cpu", pytest.raises(DynamicOutputShapeException)), ("cuda", nullcontext())):
        with FakeTensorMode(), outcome:
            layer = Int8Linear(64, 48, outliers="dynamic", device=device, dtype=torch.float16)
            out = layer(torch.empty(2, 5, 64, dtype=torch.float16, device=device))
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 48), torch.float16, "cuda")


@pytest.fixture(params=["static", "dynamic"])
def layer(request: pytest.FixtureRequest) -> Int8Linear:
    """A layer on the GPU that has run, so that its kernels are compiled."""
    torch.manual_seed(0)
    made = Int8Linear.from_linear(nn.Linear(256, 384).half(), torch.tensor([7, 100])).to("cuda")
    made.configure(activation="zeropoint", outliers=request.param, threshold=2.5)
    made(torch.randn(3, 256, device="cuda", dtype=torch.float16))
    return made


@pytest.mark.gpu
def test_a_layer_does_not_wait_for_the_gpu(layer: Int8Linear) -> None:
    x = torch.ones(3, 256, device="cuda", dtype=torch.float16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_layer_is_captured_in_a_cuda_graph(layer: Int8Linear) -> None:
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_facade_on_the_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 64, 64), (100, 4096, 4096), (513, 1000, 4100)):
        torch.manual_seed(m)
        layer = Int8Linear.from_linear(nn.Linear(k, n).to(dtype), torch.tensor([1, 33]))
        x = torch.randn(2, m, k).to(dtype)
        layer.configure(activation="zeropoint")
        expected = layer(x)
        found = layer.to("cuda")(x.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_search_on_the_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 64, 64), (100, 4096, 4096), (513, 1000, 4100)):
        torch.manual_seed(m)
        layer = Int8Linear.from_linear(nn.Linear(k, n).to(dtype))
        layer.configure(outliers="dynamic", threshold=4.5, activation="zeropoint")
        x = torch.randn(2, m, k).to(dtype)
        expected = layer(x)
        found = layer.to("cuda")(x.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ["static"], indirect=True)  # a search makes the rows of a call depend on each other
def test_a_row_does_not_depend_on_the_rows_it_is_called_with(layer: Int8Linear) -> None:
    x = torch.randn(16, 256, device="cuda", dtype=torch.float16)
    together = layer(x)
    assert all(torch.equal(together[i : i + 1], layer(x[i : i + 1])) for i in range(16))
    assert torch.equal(together[3:7], layer(x[3:7]))
