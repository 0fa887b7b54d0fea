"""`Int8Linear` against the formula of LLM.int8(), written here again in 64-bit arithmetic."""

import copy
import io
import pickle
from fractions import Fraction
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from llmint8.runtime import Int8Linear

SHAPES = [  # M, K, N, k
    (1, 64, 32, 0),
    (17, 95, 63, 16),
    (5, 1023, 7, 3),
    (3, 33, 1, 33),
    (2, 1, 5, 0),
    (0, 8, 4, 1),
]
shapes = pytest.mark.parametrize(("m", "k_in", "n", "k"), SHAPES, ids=lambda value: str(value))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make_linear(k_in: int, n: int, dtype: torch.dtype = torch.float16, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k_in, n, bias=bias)
    return linear.to(dtype).requires_grad_(False)


def make_layer(k_in: int, n: int, k: int, dtype: torch.dtype = torch.float16, bias: bool = True) -> Int8Linear:
    dims = torch.randperm(k_in)[:k].sort().values
    return Int8Linear.from_linear(make_linear(k_in, n, dtype, bias), dims)


def make_input(m: int, k_in: int, dtype: torch.dtype, outliers: Tensor | None = None) -> Tensor:
    x = torch.randn(m, k_in) + 0.3
    if outliers is not None:
        x[:, outliers.long()] *= 40
    return x.to(dtype)


def formula(layer: Int8Linear, x: Tensor, dims: list[int], columns: Tensor, activation: str) -> Tensor:
    """Equation 8 of arXiv 2208.07339: integers in int64, everything else in float64."""
    x = x.double()
    kept = x.clone()
    kept[:, dims] = 0
    if activation == "absmax":
        scale = kept.abs().amax(1, keepdim=True) / 127
        zero_point = torch.zeros_like(scale)
    else:
        low, high = kept.amin(1, keepdim=True).clamp(max=0), kept.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 254
        zero_point = (-127 - low / torch.where(scale == 0, 1, scale)).round()
    divisor = torch.where(scale == 0, 1, scale)
    values = ((kept / divisor).round() + zero_point).clamp(-127, 127).to(torch.int64)
    values[:, dims] = zero_point.to(torch.int64)
    product = (values - zero_point.to(torch.int64)) @ layer.unpacked_weight().to(torch.int64).T
    out = product * scale * layer.SCB.double() / 127 + x[:, dims] @ columns.double().T
    return out if layer.bias is None else out + layer.bias.double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def snapshot(layer: Int8Linear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8)


@shapes
@dtypes
@pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
def test_static_outliers_match_the_formula(
    m: int, k_in: int, n: int, k: int, dtype: torch.dtype, activation: str
) -> None:
    layer = make_layer(k_in, n, k, dtype)
    layer.activation = activation  # type: ignore[assignment]
    assert layer.outlier_dims is not None
    assert layer.outlier_weight is not None
    dims = layer.outlier_dims.tolist()
    x = make_input(m, k_in, dtype, layer.outlier_dims)
    got = layer(x)
    assert got.dtype == dtype
    assert got.shape == (m, n)
    expected = formula(layer, x, dims, layer.outlier_weight, activation)
    assert relative_error(got, expected) <= 4 * torch.finfo(dtype).eps + 1e-5


@shapes
@dtypes
def test_dynamic_outliers_match_the_formula(m: int, k_in: int, n: int, k: int, dtype: torch.dtype) -> None:
    layer = make_layer(k_in, n, 0, dtype)
    layer.outliers, layer.threshold = "dynamic", 6.0
    planted = torch.randperm(k_in)[: min(k, k_in - 1)]
    x = make_input(m, k_in, dtype, planted)
    dims = [dim for dim in range(k_in) if any(abs(value) >= 6.0 for value in x[:, dim].tolist())]
    assert m == 0 or len(dims) >= len(planted) // 2  # the search has something to find
    columns = layer.unpacked_weight()[:, dims].double() * layer.SCB.double()[:, None] / 127
    expected = formula(layer, x, dims, columns, "absmax")
    assert relative_error(layer(x), expected) <= 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("stored", [3, None], ids=["k3", "none-stored"])
def test_mode_none_leaves_stored_outliers_alone(stored: int | None) -> None:
    layer = make_layer(40, 9, 3)
    layer.outliers = "none"
    if stored is None:
        layer.outlier_dims = layer.outlier_weight = None
    x = make_input(4, 40, torch.float16)
    assert relative_error(layer(x), formula(layer, x, [], torch.empty(9, 0), "absmax")) < 2e-3


def test_integer_inputs_are_exact() -> None:
    layer = make_layer(300, 20, 0, torch.float32, bias=False)
    layer.SCB.fill_(127)
    layer.prepare()
    x = torch.randint(-126, 127, (6, 300)).float()
    x[:, 7] = 127
    assert torch.equal(layer(x), (x.long() @ layer.unpacked_weight().long().T).float())


@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
def test_batched_input_is_the_same_rows(outliers: str) -> None:
    layer = make_layer(48, 11, 5)
    layer.outliers = outliers  # type: ignore[assignment]
    x = make_input(6, 48, torch.float16, layer.outlier_dims)
    got = layer(x.reshape(2, 3, 48))
    assert got.shape == (2, 3, 11)
    assert torch.equal(got.reshape(6, 11), layer(x))


@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
def test_forward_changes_nothing(outliers: str) -> None:
    layer = make_layer(48, 11, 5, torch.float32)
    layer.outliers = outliers  # type: ignore[assignment]
    x = make_input(6, 48, torch.float16, layer.outlier_dims)
    before, attributes, x_before = snapshot(layer), dict(vars(layer)), x.clone()
    first = layer(x)
    assert same(before, layer.state_dict())
    assert vars(layer) == attributes
    assert torch.equal(x, x_before)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double", "to", "type"])
def test_casting_keeps_the_quantized_weight(cast: str) -> None:
    layer = make_layer(48, 6, 5, torch.float32)
    layer.SCB[:3] = torch.tensor([1e-9, 70000.123, 1 / 3])  # no 16-bit type holds these
    before = snapshot(layer)
    target = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}.get(cast, torch.float64)
    getattr(layer, cast)(*([target] if cast in ("to", "type") else []))
    for name in ("weight", "SCB", "weight_format", "outlier_dims"):
        assert layer.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(layer.state_dict()[name], before[name])
    assert layer.outlier_weight is not None
    assert layer.bias is not None
    assert layer.outlier_weight.dtype == layer.bias.dtype == target


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double", "to", "type"])
@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
def test_a_layer_that_was_cast_computes_as_one_that_was_made_so(cast: str, outliers: Any) -> None:
    """What is computed once, like the sums of the weight's rows, is cast by nobody."""
    layer = make_layer(300, 6, 5, torch.float32)
    layer.configure(outliers=outliers, activation="zeropoint")
    target = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}.get(cast, torch.float64)
    fresh = Int8Linear(300, 6, outlier_count=5, outliers=outliers, activation="zeropoint", dtype=target)
    fresh.load_state_dict(layer.state_dict())
    getattr(layer, cast)(*([target] if cast in ("to", "type") else []))
    x = make_input(7, 300, torch.float32, layer.outlier_dims)
    assert torch.equal(layer(x), fresh(x))


def test_a_layer_runs_as_it_is_configured() -> None:
    layer, x = make_layer(96, 40, 5), make_input(3, 96, torch.float16)
    modes: list[Any] = [("static", 6.0), ("none", 6.0), ("dynamic", 1.5), ("dynamic", 3.0), ("static", 6.0)]
    for outliers, threshold in modes:
        for activation in ("absmax", "zeropoint"):
            layer.configure(outliers=outliers, threshold=threshold, activation=activation)
            fresh = Int8Linear(
                96, 40, outlier_count=5, outliers=outliers, threshold=threshold, activation=activation, dtype=x.dtype
            )
            fresh.load_state_dict(layer.state_dict())
            assert (layer.outliers, layer.threshold, layer.activation) == (outliers, threshold, activation)
            assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
@pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
def test_inputs_are_quantized_in_the_groups_that_are_configured(
    activation: Any, outliers: Any, assert_right: Any
) -> None:
    layer, x = make_layer(300, 40, 5), make_input(3, 300, torch.float16)
    x *= 4.0 ** (torch.arange(300) // 64 % 3).half()  # groups of other magnitudes
    layer.configure(outliers=outliers, activation=activation)
    plain = layer(x)
    assert layer.stored().group is None
    for group in (64, 128, 256):
        layer.configure(activation_group=group)
        weight = layer.stored()
        assert (layer.activation_group, weight.group) == (group, group)
        assert_right(x, weight, activation, layer(x))
        assert not torch.equal(layer(x), plain)
        fresh = Int8Linear(300, 40, outlier_count=5, outliers=outliers, activation=activation, activation_group=group)
        fresh.half().load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.activation_group = "row"
    assert torch.equal(layer(x), plain)


def test_settings_are_left_as_they_are_where_nothing_is_given() -> None:
    layer = make_layer(96, 40, 5)
    layer.configure(outliers="dynamic", threshold=4.0, activation_group=64)
    before = layer.prepared
    layer.configure(activation="zeropoint")
    layer.configure(outliers="dynamic", threshold=4.0)
    layer.configure(activation_group=64)
    assert (layer.outliers, layer.threshold, layer.activation) == ("dynamic", 4.0, "zeropoint")
    assert layer.activation_group == 64
    assert layer.prepared is before


@pytest.mark.parametrize(
    ("name", "value"),
    [("outliers", "some"), ("activation", "absmin"), ("activation_group", 100), ("activation_group", "all")],
)
def test_unknown_settings_are_refused(name: str, value: Any) -> None:
    layer = make_layer(30, 8, 2)
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected one of"):
        layer.configure(**{name: value})
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected one of"):
        setattr(layer, name, value)


@pytest.mark.parametrize("threshold", [0.0, -6.0, float("nan"), float("inf")])
def test_a_threshold_that_finds_nothing_or_everything_is_refused(threshold: float) -> None:
    layer = make_layer(30, 8, 2)
    with pytest.raises(ValueError, match=r"threshold is .*, expected a number above 0 with outliers='dynamic'"):
        layer.configure(outliers="dynamic", threshold=threshold)
    assert (layer.outliers, layer.threshold) == ("static", 6.0)


@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
@pytest.mark.parametrize("width", [64, 2048])
@dtypes
def test_under_autocast_the_output_is_that_of_an_input_that_was_cast(
    dtype: torch.dtype, width: int, outliers: Any
) -> None:
    """As `nn.Linear`, of every dtype; the arithmetic inside stays as it is, and so does the layer."""
    linear, dims = make_linear(width, 9, dtype), torch.tensor([3, 60])
    layer = Int8Linear.from_linear(linear, dims)
    layer.configure(outliers=outliers, activation="zeropoint")
    before = snapshot(layer)
    x = make_input(5, width, torch.float32, dims)
    for target in (torch.float16, torch.bfloat16):
        expected = layer(x.to(target))
        with torch.autocast("cpu", target):
            for given in (x, x.to(torch.float16), x.to(torch.bfloat16)):
                assert layer(given).dtype == linear(given).dtype == target
            assert torch.equal(layer(x), expected)
            assert layer(x.double()).dtype == torch.float64  # autocast leaves it alone
            made = Int8Linear.from_linear(linear, dims)
            made.configure(outliers=outliers, activation="zeropoint")
            assert torch.equal(copy.deepcopy(made)(x), expected)
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32
        assert torch.equal(made(x.to(target)), expected)
    assert same(before, layer.state_dict())


def test_autocast_of_another_device_changes_nothing() -> None:
    layer, x = make_layer(30, 8, 2), make_input(3, 30, torch.float32)
    expected = layer(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_layer_compiled_under_autocast_follows_it() -> None:
    layer, x = make_layer(30, 8, 2), make_input(3, 30, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled(x), layer(x))


def test_inputs_of_integers_are_refused() -> None:
    layer = make_layer(30, 8, 2)
    with pytest.raises(ValueError, match=r"x is torch\.int8, expected one of torch\.float16"):
        layer(torch.randn(3, 30).to(torch.int8))


def test_a_state_with_dims_that_are_not_in_the_layer_is_refused() -> None:
    layer = make_layer(30, 8, 2)
    state = layer.state_dict() | {"outlier_dims": torch.tensor([3, 10_000_000], dtype=torch.int32)}
    model = nn.ModuleDict({"a": layer})
    with pytest.raises(RuntimeError, match=r"a: outlier_dims is \[3, 10000000\], expected strictly increasing numbers"):
        model.load_state_dict({f"a.{name}": tensor for name, tensor in state.items()})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_that_was_never_filled_is_a_layer_of_zeros(device: str) -> None:
    layer = Int8Linear(30, 8, outlier_count=3, dtype=torch.float32, device=device)
    out = layer(torch.randn(3, 30, device=device))
    assert (out.shape, out.device.type) == ((3, 8), device)
    assert device == "meta" or not out.any()
    with FakeTensorMode():
        made = Int8Linear(30, 8, outlier_count=3, dtype=torch.float32)
        assert made(torch.empty(3, 30)).shape == (3, 8)


def large_layer() -> Int8Linear:
    """One whose weight is packed, where the machine has a product for that."""
    return Int8Linear.from_linear(make_linear(2048, 2048, torch.float32), torch.tensor([3, 700]))


def test_tensors_put_in_the_place_of_others_are_used() -> None:
    layer, other, x = large_layer(), large_layer(), torch.randn(2, 2048)
    expected = other(x)
    before = layer(x)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), expected)
    assert torch.equal(layer(x), before)
    layer.weight = nn.Parameter(other.unpacked_weight().clone(), requires_grad=False)
    layer.bias = nn.Parameter(other.bias.clone(), requires_grad=False)  # type: ignore[union-attr]
    for name in ("SCB", "outlier_weight"):
        setattr(layer, name, getattr(other, name).clone())
    assert same(layer.state_dict(), other.state_dict())
    assert torch.equal(layer(x), expected)
    assert same(copy.deepcopy(layer).state_dict(), other.state_dict())
    layer.prepare()
    assert torch.equal(layer(x), expected)
    assert same(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["weight", "bias", "SCB", "outlier_dims", "outlier_weight"])
def test_each_of_them_is(name: str) -> None:
    layer, other, x = make_layer(64, 48, 3), make_layer(64, 48, 3), make_input(2, 64, torch.float16)
    before = layer(x)
    found = other.state_dict()[name].clone()
    setattr(layer, name, nn.Parameter(found, requires_grad=False) if name in ("weight", "bias") else found)
    fresh = Int8Linear(64, 48, outlier_count=3, dtype=torch.float16)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_a_layer_that_is_offloaded_later_is_brought_for_each_call_and_kept_by_nobody() -> None:
    model, x = nn.Sequential(make_layer(64, 48, 3, torch.float32)), torch.randn(2, 64)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(x), expected)
    assert model[0].weight.is_meta
    assert model[0].prepared is None


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_that_nobody_wrote_is_to_be_loaded() -> None:
    layer, x = make_layer(64, 48, 3), make_input(2, 64, torch.float16)
    expected, state = layer(x), layer.state_dict()
    layer.to_empty(device="cpu")
    with pytest.raises(ValueError, match="outlier_dims is"):
        layer(x)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_copies_of_layers_that_share_their_weight_share_it() -> None:
    one, other = make_layer(64, 48, 3), make_layer(64, 48, 3)
    one.weight = other.weight = nn.Parameter(one.unpacked_weight(), requires_grad=False)
    copied = copy.deepcopy(nn.ModuleList([one, other]))
    assert copied[0].unpacked_weight() is copied[1].unpacked_weight()


def test_a_state_without_some_tensors_is_loaded_where_that_is_allowed() -> None:
    layer, other = make_layer(64, 48, 3), make_layer(64, 48, 3)
    state = other.state_dict()
    part = {name: state[name] for name in ("weight", "SCB")}
    missing, _ = layer.load_state_dict(part, strict=False)
    assert sorted(missing) == ["bias", "outlier_dims", "outlier_weight", "weight_format"]
    x = make_input(2, 64, torch.float16)
    fresh = copy.deepcopy(layer)
    fresh.prepare()
    assert torch.equal(layer(x), fresh(x))


def test_moving_moves_everything_and_keeps_dtypes() -> None:
    layer = make_layer(48, 6, 5)
    dtypes_before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    layer.to("meta", torch.bfloat16)
    after = layer.state_dict()
    assert {tensor.device.type for tensor in after.values()} == {"meta"}
    cast = {"outlier_weight", "bias"}
    assert {n: t.dtype for n, t in after.items()} == {
        n: torch.bfloat16 if n in cast else dtype for n, dtype in dtypes_before.items()
    }


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("there", [0, 2, 7, None], ids=lambda k: f"into-k{k}")
def test_state_dict_round_trip_takes_on_k(there: int | None, assign: bool) -> None:
    source = make_layer(30, 8, 2)
    target = Int8Linear(30, 8, outlier_count=there, dtype=torch.float16)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert same(source.state_dict(), target.state_dict())
    x = make_input(3, 30, torch.float16)
    assert torch.equal(source(x), target(x))


def test_state_dict_of_a_container_names_what_is_missing() -> None:
    model = nn.Sequential(make_layer(30, 8, 2), make_layer(8, 4, 0))
    state = model.state_dict()
    del state["1.SCB"]
    with pytest.raises(RuntimeError, match=r"1\.SCB"):
        copy.deepcopy(model).load_state_dict(state)


def test_a_floating_point_weight_is_refused_and_nothing_overwritten() -> None:
    layer = make_layer(30, 8, 2)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"weight is torch\.float16, expected torch\.int8"):
        layer.load_state_dict(make_linear(30, 8).state_dict())
    assert same(before, layer.state_dict())


def test_outlier_columns_of_another_height_are_refused() -> None:
    layer, other = make_layer(30, 8, 2), make_layer(30, 8, 3)
    state = other.state_dict()
    state["outlier_weight"] = torch.zeros(9, 3)
    with pytest.raises(RuntimeError, match="size mismatch for outlier_weight"):
        layer.load_state_dict(state)


def by_pickle(layer: Int8Linear) -> Int8Linear:
    result: Int8Linear = pickle.loads(pickle.dumps(layer))
    return result


def by_torch_save(layer: Int8Linear) -> Int8Linear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    result: Int8Linear = torch.load(buffer, weights_only=False)
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
def test_copies_are_equal_and_independent(duplicate: object) -> None:
    layer = make_layer(30, 8, 2)
    layer.outliers, layer.threshold, layer.activation = "dynamic", 0.5, "zeropoint"
    other = duplicate(layer)  # type: ignore[operator]
    assert same(layer.state_dict(), other.state_dict())
    x = make_input(3, 30, torch.float16)
    assert torch.equal(layer(x), other(x))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    other.unpacked_weight().zero_()
    assert layer.unpacked_weight().any()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@dtypes
def test_from_linear_rounds_half_to_even(kind: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[127, 0.5, 1.5, -2.5, 3.25], [-0.5, 0.25, 0.125, 0.0, 0.375], [0, 0, 0, 0, 0]], dtype=dtype)
    if kind == "Linear":
        linear = make_linear(5, 3, dtype)
        linear.weight.copy_(rows)
    else:
        linear = Conv1D(3, 5).to(dtype).requires_grad_(False)
        linear.weight.copy_(rows.T)
    layer = Int8Linear.from_linear(linear)
    expected = []
    for row in rows.double().tolist():
        top = max(abs(Fraction(value)) for value in row)
        expected.append([round(127 * Fraction(value) / top) if top else 0 for value in row])
    assert layer.unpacked_weight().tolist() == expected
    assert layer.SCB.tolist() == [127.0, 0.5, 0.0]
    assert (layer.in_features, layer.out_features) == (5, 3)
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]


@dtypes
def test_from_linear_keeps_outlier_columns_bit_for_bit(dtype: torch.dtype) -> None:
    linear = make_linear(30, 8, dtype)
    layer = Int8Linear.from_linear(linear, torch.tensor([0, 3, 29]))
    assert layer.outlier_dims is not None
    assert layer.outlier_dims.dtype == torch.int32
    assert layer.outlier_weight is not None
    assert torch.equal(layer.outlier_weight, linear.weight[:, [0, 3, 29]])
    given = torch.randn(8, 3, dtype=dtype)
    layer = Int8Linear.from_linear(linear, torch.tensor([0, 3, 29]), given)
    assert torch.equal(layer.outlier_weight, given)  # type: ignore[arg-type]
    assert layer.weight[:, [0, 3, 29]].any()  # the int8 weight has all columns


def test_from_linear_shares_no_memory() -> None:
    linear, dims = make_linear(30, 8), torch.tensor([0, 3], dtype=torch.int32)
    columns = linear.weight[:, [0, 3]].clone()
    layer = Int8Linear.from_linear(linear, dims, columns)
    before = snapshot(layer)
    for tensor in (linear.weight, linear.bias, dims, columns):
        tensor.fill_(1)
    assert same(before, layer.state_dict())


@pytest.mark.parametrize(
    "dims", [[3, 3], [4, 2], [-1], [30], [[1, 2]], [2_000_000_000, -2_000_000_000], [2**62, -(2**62) - 1]], ids=str
)
def test_from_linear_refuses_outlier_dims(dims: list[int]) -> None:
    with pytest.raises(ValueError, match="strictly increasing numbers from 0 to 29"):
        Int8Linear.from_linear(make_linear(30, 8), torch.tensor(dims))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_from_linear_takes_dims_of_every_integer_type(dtype: torch.dtype) -> None:
    linear = make_linear(300, 8)
    layer = Int8Linear.from_linear(linear, torch.tensor([3, 29], dtype=dtype))
    assert layer.outlier_dims is not None
    assert layer.outlier_dims.tolist() == [3, 29]
    with pytest.raises(ValueError, match=r"outlier_dims is torch\.float32, expected integers"):
        Int8Linear.from_linear(linear, torch.tensor([1.5, 2.5]))


def test_from_linear_refuses_what_does_not_fit() -> None:
    linear = make_linear(30, 8)
    with pytest.raises(ValueError, match=r"shape \[8, 2\], expected \[8, 1\]"):
        Int8Linear.from_linear(linear, torch.tensor([1]), torch.zeros(8, 2))
    with pytest.raises(ValueError, match="outlier_weight"):
        Int8Linear.from_linear(linear, None, torch.zeros(8, 2))
    linear.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Int8Linear.from_linear(linear)


def test_a_derivative_in_forward_mode_is_refused_and_not_zero() -> None:
    layer = Int8Linear.from_linear(nn.Linear(30, 8))
    x, tangent = torch.randn(3, 30), torch.randn(3, 30)
    words = r"^there is no derivative in forward mode \(jvp\) through Int8Linear yet$"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.jvp(layer, (x,), (tangent,))
    with pytest.raises(NotImplementedError, match=words):
        torch.func.jacfwd(layer)(x)
    with torch.autograd.forward_ad.dual_level():
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(NotImplementedError, match=words):
                layer(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.equal(layer(x), layer(x.clone()))  # what has no tangent passes


def test_dequantize() -> None:
    linear = make_linear(30, 8, torch.float32)
    layer = Int8Linear.from_linear(linear, torch.tensor([2, 9]))
    weight = layer.dequantize()
    assert torch.equal(weight[:, [2, 9]], linear.weight[:, [2, 9]])
    half_step = layer.SCB[:, None] / 127 / 2
    assert ((weight - linear.weight).abs() <= half_step * 1.0001).all()
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_tensors_are_named_as_on_disk_and_frozen() -> None:
    state = make_layer(30, 8, 2).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.int8, (8, 30)),
        "SCB": (torch.float32, (8,)),
        "weight_format": (torch.uint8, ()),
        "outlier_dims": (torch.int32, (2,)),
        "outlier_weight": (torch.float16, (8, 2)),
        "bias": (torch.float16, (8,)),
    }
    assert not any(parameter.requires_grad for parameter in make_layer(30, 8, 2).parameters())
    assert "bias" not in make_layer(30, 8, 2, bias=False).state_dict()


def test_repr_says_how_the_layer_runs() -> None:
    layer = make_layer(30, 8, 2, bias=False)
    shape = "Int8Linear(in_features=30, out_features=8, bias=False"
    assert repr(layer) == f"{shape}, outlier_dims=2, outliers='static', activation='absmax', activation_group='row')"
    layer.outliers, layer.threshold, layer.activation = "dynamic", 5.5, "zeropoint"
    assert "outliers='dynamic', threshold=5.5, activation='zeropoint', activation_group='row'" in repr(layer)
    layer.activation_group = 64
    assert repr(layer).endswith("activation='zeropoint', activation_group=64)")
    layer.outlier_dims = layer.outlier_weight = None
    assert repr(layer).startswith(f"{shape}, outliers='dynamic'")
    assert repr(Int8Linear(64, 8, rotation=64)).endswith(
        "bias=True, outlier_dims=0, outliers='static', activation='absmax', activation_group='row', rotation=64)"
    )
