"""The layer as a PyTorch operator: its schema and fake, compilers, graphs; and on a GPU that nothing waits for it."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from llmint8.kernels import linear, operators, reference
from llmint8.runtime import Int8Linear


def arguments(device: str, m: int = 5, zeropoint: bool = True) -> tuple[Tensor | bool | None, ...]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=random).half()
    values, absmax = reference.quantize_weight(weight)
    dims = torch.tensor([3, 40], dtype=torch.int32)
    x, bias = torch.randn(m, 64, generator=random).half(), torch.randn(48, generator=random).half()
    row_sum = values.sum(1, dtype=torch.int32)
    tensors = x, values, absmax, dims, weight[:, dims.long()], bias, row_sum
    return *(tensor.to(device) for tensor in tensors), zeropoint


def dynamic_arguments(device: str, m: int = 5, zeropoint: bool = True) -> tuple[Tensor | float | None, ...]:
    """Of the operator that searches: two or more of the columns hold an outlier."""
    x, values, absmax, dims, _, bias, row_sum, _ = arguments(device, m)
    x[:, dims.long()] = 7.0
    return x, values, absmax, bias, row_sum, 3.0, zeropoint


@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_passes(device_type: str, zeropoint: bool) -> None:
    for m in (0, 1, 5):
        torch.library.opcheck(operators.int8_linear, arguments(device_type, m, zeropoint))
    bare = list(arguments(device_type, 2, zeropoint))
    bare[5] = bare[6] = None
    torch.library.opcheck(operators.int8_linear, tuple(bare))


@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_passes_with_a_search(device_type: str, zeropoint: bool) -> None:
    for m in (0, 1, 5):
        torch.library.opcheck(operators.dynamic_int8_linear, dynamic_arguments(device_type, m, zeropoint))
    bare = list(dynamic_arguments(device_type, 2, zeropoint))
    bare[3] = bare[4] = None
    torch.library.opcheck(operators.dynamic_int8_linear, tuple(bare))


def test_the_operator_is_the_reference_on_the_cpu() -> None:
    x, values, absmax, dims, columns, bias, _, _ = arguments("cpu")
    expected = reference.int8_linear(x, values, absmax, dims, columns, bias, "zeropoint")
    assert torch.equal(operators.int8_linear(*arguments("cpu")), expected)
    x, values, absmax, bias, row_sum, threshold, zeropoint = dynamic_arguments("cpu")
    expected = linear.dynamic_int8_linear(x, values, absmax, threshold, bias, "zeropoint", row_sum)
    found = operators.dynamic_int8_linear(x, values, absmax, bias, row_sum, threshold, zeropoint)
    torch.testing.assert_close(found, expected)


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


def test_without_triton_the_reference_runs_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    operators._has_triton.cache_clear()
    expected, searched = (
        operators.int8_linear(*arguments("cpu")),
        operators.dynamic_int8_linear(*dynamic_arguments("cpu")),
    )
    for _ in range(2):
        assert torch.equal(operators._gpu(*arguments("cpu")), expected)
        assert torch.equal(operators._dynamic_gpu(*dynamic_arguments("cpu")), searched)
    assert [record.getMessage() for record in caplog.records if "Triton is not installed" in record.getMessage()]
    assert len(caplog.records) == 1
    operators._has_triton.cache_clear()


def test_shapes_depend_on_values_where_a_search_runs_on_the_cpu_and_not_on_the_gpu() -> None:
    """Tensors without values show it, and no GPU has to be there."""
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
    made.activation, made.outliers, made.threshold = "zeropoint", request.param, 2.5
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
        given = layer.weight, layer.weight_absmax, layer.outlier_dims, layer.outlier_weight, layer.bias, "zeropoint"
        expected = linear.int8_linear(x, *given)
        found = linear.int8_linear(x.cuda(), *(v.cuda() if isinstance(v, Tensor) else v for v in given)).cpu()
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_search_on_the_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 64, 64), (100, 4096, 4096), (513, 1000, 4100)):
        torch.manual_seed(m)
        layer = Int8Linear.from_linear(nn.Linear(k, n).to(dtype))
        layer.outliers, layer.threshold, layer.activation = "dynamic", 4.5, "zeropoint"
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
