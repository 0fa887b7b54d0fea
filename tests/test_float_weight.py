"""Model code that takes the weight of a layer in hand gets what a float weight would have given, or an error."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from llmint8 import runtime
from llmint8.formats import KBit, LLMInt8Error
from llmint8.runtime import Int8Linear
from llmint8.runtime.layers import float_weight, writing

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# The inputs of layers that are called are quantized; integers in the place of a weight are off by 300 % and more.
QUANTIZED = 0.06


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(4)
    float_weight._tell_once.cache_clear()


def make_layer(k: int = 30, n: int = 8, dtype: torch.dtype = torch.float32) -> Int8Linear:
    layer = Int8Linear.from_linear(nn.Linear(k, n, dtype=dtype).requires_grad_(False), torch.tensor([3, k - 1]))
    layer.name = "model.blocks.3.proj"
    return layer


def int8_and_float(model: Any) -> tuple[Any, Any]:
    """Put int8 layers into a model, and return with it the same model with the weights that they stand for."""
    model = model.eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = Int8Linear.from_linear(module, torch.arange(0, module.in_features, 9))
            layer.name = name
            model.set_submodule(name, layer)
            twin.get_submodule(name).weight.copy_(layer.dequantize())
    return model, twin


def assert_near(found: Tensor, expected: Tensor, most: float = QUANTIZED) -> None:
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) <= most


X = torch.linspace(-2, 2, 4 * 30).reshape(4, 30)
OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: F.linear(X.to(w.dtype), w),
    "x @ w.T": lambda w: X.to(w.dtype) @ w.T,
    "mm": lambda w: torch.mm(X.to(w.dtype), w.t()),
    "einsum": lambda w: torch.einsum("bi,oi->bo", X.to(w.dtype), w),
    "slice": lambda w: w[:4, 1:],
    "index": lambda w: w[torch.tensor([5, 1])],
    "cat": lambda w: torch.cat([w, w]),
    "view": lambda w: w.view(2, 4, 30),
    "to": lambda w: w.to(torch.float64),
    "half": lambda w: w.half(),
    "data": lambda w: w.data + 0,
    "detach": lambda w: w.detach() * 2,
    "to itself": lambda w: w.to(w.dtype) + w.to(w.device),
    "clone": lambda w: w.clone(),
    "copied": lambda w: torch.zeros(w.shape, dtype=w.dtype).copy_(w),
    "norm": lambda w: w.float().norm(dim=1),
    "w * w": lambda w: w * w,
    "embedding": lambda w: F.embedding(torch.tensor([[0, 7]]), w),
    "rows": lambda w: torch.stack(list(w)),
    "numpy": lambda w: torch.from_numpy(w.float().numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_get_the_dequantized_weight(operator: str, mode: Any, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    expected = OPERATORS[operator](layer.dequantize(dtype))
    with mode():
        found = OPERATORS[operator](layer.weight)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("outliers", ["static", "dynamic", "none"])
def test_its_outlier_columns_are_exact_however_the_layer_runs(outliers: Any) -> None:
    linear = nn.Linear(30, 8, dtype=torch.float16).requires_grad_(False)
    layer = Int8Linear.from_linear(linear, torch.tensor([3, 29]))
    layer.configure(outliers=outliers)
    assert torch.equal(layer.weight[:, [3, 29]], linear.weight[:, [3, 29]])
    assert not torch.equal(layer.weight[:, :3], linear.weight[:, :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_looks_like_a_float_parameter(dtype: torch.dtype) -> None:
    for count in (2, None):
        layer = Int8Linear(30, 8, outlier_count=count, bias=False, dtype=torch.float32).to(dtype)
        weight = layer.weight
        assert (weight.dtype, weight.shape, weight.device.type) == (dtype, (8, 30), "cpu")
        assert weight.is_floating_point()
        assert not weight.requires_grad
        assert isinstance(weight, nn.Parameter)
        assert isinstance(nn.ModuleDict({"a": layer}).get_parameter("a.weight"), nn.Parameter)
        assert weight.element_size() == dtype.itemsize
        assert "shape=[8, 30]" in repr(weight)
        assert torch.promote_types(weight.dtype, torch.float16) == torch.promote_types(dtype, torch.float16)


def test_asking_for_it_computes_nothing_and_using_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = make_layer(), make_layer()
    other.name = "model.blocks.17.proj"
    monkeypatch.setattr(float_weight, "dequantized", lambda *arguments: pytest.fail("dequantized"))
    assert X.to(layer.weight.dtype).device == layer.weight.data.device
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING, "llmint8"):
        for one in (layer, other, layer):
            F.linear(X, one.weight)
    assert [record.getMessage() for record in caplog.records] == [
        "model.blocks.*.proj: the model's code, or an adapter, uses the weight itself, which is dequantized for it in "
        "every call; "
        "--skip at conversion keeps the layer in 16 bit"
    ]


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "init": nn.init.normal_,
    "out=": lambda w: torch.mul(torch.ones(8, 30), 2, out=w),
    "detached": lambda w: w.detach().mul_(2),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_would_write_into_it_is_an_error_that_names_the_layer(write: str) -> None:
    layer = make_layer()
    before = layer.unpacked_weight().clone()
    with torch.no_grad(), pytest.raises(LLMInt8Error, match=r"^model\.blocks\.3\.proj: .* int8 and frozen; --skip"):
        WRITES[write](layer.weight)
    assert torch.equal(layer.unpacked_weight(), before)


def test_what_is_no_layers_data_is_not_written_into_either() -> None:
    moved = make_layer().weight._moved(torch.device("cpu", 0))  # type: ignore[attr-defined]
    with pytest.raises(LLMInt8Error, match=r"^model\.blocks\.3\.proj: an assignment to the data of its weight"):
        moved.data = torch.ones(8, 30)
    with pytest.raises(LLMInt8Error, match="int8 and frozen"):
        moved.data.add_(1)


@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
def test_other_libraries_get_the_float_weight(take: Any) -> None:
    layer = make_layer()
    assert torch.equal(torch.as_tensor(take(layer.weight)), layer.dequantize())


@pytest.mark.parametrize("what", ["share_memory_", "untyped_storage"])
def test_it_has_no_memory_to_hand_over(what: str) -> None:
    with pytest.raises(LLMInt8Error, match=rf"^model\.blocks\.3\.proj: {what} of its weight, which is int8"):
        getattr(make_layer().weight, what)()


def test_those_who_move_tensors_by_name_see_the_int8_parameter() -> None:
    layer = make_layer()
    assert layer.state_dict()["weight"].dtype == torch.int8
    assert {name: p.dtype for name, p in layer.named_parameters()} == {"bias": torch.float32, "weight": torch.int8}
    assert sum(p.numel() for p in layer.parameters()) == 8 * 30 + 8
    # Model code takes the dtype of the first one; `t.Swinv2Model` casts its coordinates to it.
    assert next(layer.parameters()).dtype == torch.float32
    assert layer.to("meta").weight.dtype == torch.int8  # there are no numbers


def test_gradients_through_it_are_those_of_the_float_weight() -> None:
    layer = make_layer()
    x = X.clone().requires_grad_()
    F.linear(x, layer.weight, layer.bias).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(4, 30), atol=1e-6)


@pytest.mark.parametrize("size", [32, 2048])  # the second is packed, where the machine has a product for that
def test_compilers_take_it(size: int) -> None:
    linear = nn.Linear(size, size).requires_grad_(False)
    layer = Int8Linear.from_linear(linear, torch.tensor([3]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x.to(self.proj.weight.dtype)) + F.linear(x, self.proj.weight)

    model, x = Model(), torch.randn(2, size)
    with torch.no_grad():
        expected = F.linear(x, layer.dequantize()) + layer(x)
        assert_near(model(x), expected, 1e-5)
        assert_near(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, 1e-5)
        assert_near(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def test_an_offloaded_layer_keeps_its_int8_values() -> None:
    model, x = nn.Sequential(make_layer(), make_layer(8, 8)), torch.randn(2, 30)
    expected, state = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert all(p.is_meta and p.dtype == torch.int8 for n, p in model.named_parameters() if "weight" in n)
    accelerate.hooks.remove_hook_from_submodules(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])


def test_a_layer_that_is_moved_by_this_attribute_keeps_its_int8_values() -> None:
    """As accelerate does, which then puts what it got in the place of the parameter."""
    layer, x = make_layer(), torch.randn(2, 30)
    expected, state = layer(x), layer.state_dict()
    moved = layer.weight._moved(torch.device("cpu", 0))  # type: ignore[attr-defined]
    assert moved.dtype == torch.float32
    assert torch.equal(moved[:], layer.dequantize())
    assert layer.weight.to("meta").dtype == torch.int8
    assert type(layer.weight.to("cpu", copy=True)) is Tensor  # a copy is no layer's
    layer._parameters["weight"] = nn.Parameter(moved, requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.state_dict()["weight"], state["weight"])
    layer.prepare()
    assert torch.equal(layer(x), expected)
    assert layer._parameters["weight"].dtype == torch.int8  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [False, True], ids=["fast-path", "slow-path"])
def test_attention_of_pytorch(training: bool) -> None:
    int8, float_ = int8_and_float(nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        found, expected = (model.train(training)(x, x, x)[0] for model in (int8, float_))
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_of_pytorch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    int8, float_ = int8_and_float(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        assert_near(int8(x), float_(x), 1e-6)  # the fused path takes the weights, and calls no layer


class ImageAndText(nn.Module):
    """One branch calls the layer, the other one multiplies by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(30, 16)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.out_proj(text), F.linear(image, self.out_proj.weight)


def test_a_branch_that_multiplies_by_the_weight() -> None:
    int8, float_ = int8_and_float(ImageAndText())
    x = torch.randn(3, 30)
    (text, image), expected = int8(x, x), float_(x, x)
    assert_near(text, expected[0])
    assert torch.equal(image, expected[1])


def siglip2() -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        text_config={**sizes, "vocab_size": 64, "projection_size": 32},
        vision_config={**sizes, "num_patches": 16, "patch_size": 4},
    )
    inputs = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    return transformers.Siglip2Model(config), inputs


def falcon() -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.FalconConfig(vocab_size=64, initializer_range=0.2, **sizes)
    return transformers.FalconForCausalLM(config), {"input_ids": torch.arange(12)[None]}


def mamba() -> tuple[Any, dict[str, Any]]:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    return transformers.MambaForCausalLM(config), {"input_ids": torch.arange(12)[None]}


def t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    ids = torch.arange(12)[None]
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def swinv2() -> tuple[Any, dict[str, Any]]:
    config = transformers.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.Swinv2Model(config), {"pixel_values": torch.randn(1, 3, 16, 16)}


@pytest.mark.parametrize("make", [siglip2, falcon, mamba, t5, swinv2], ids=lambda make: make.__name__)
def test_models_that_ask_for_weights(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    model, inputs = make()
    int8, float_ = int8_and_float(model)

    def output(model: Any) -> Tensor:
        found = model.get_image_features(**inputs) if make is siglip2 else model(**inputs)
        tensor: Tensor = found if isinstance(found, Tensor) else found["logits" if "logits" in found else 1]
        return tensor

    with torch.no_grad():
        assert_near(output(int8), output(float_))


def test_a_loaded_model_has_such_weights_too(tmp_path: Path) -> None:
    """Written as bitsandbytes does, which has no columns in 16 bit, and of a layer without bias no float tensor."""
    model, inputs = siglip2()
    int8, float_ = int8_and_float(model)
    tensors = {n: t.contiguous() for n, t in int8.state_dict().items() if "outlier" not in n}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = int8.config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    config.architectures = ["Siglip2Model"]
    config.save_pretrained(tmp_path)
    loaded = runtime.load(tmp_path, dtype="float32")
    layer = loaded.vision_model.embeddings.patch_embedding
    assert (layer.weight.dtype, layer.name) == (torch.float32, "vision_model.embeddings.patch_embedding")
    assert loaded.dtype == torch.float32
    assert loaded.get_memory_footprint() < 0.5 * float_.get_memory_footprint() + 1e5
    with torch.no_grad():
        found, expected = (m.get_image_features(**inputs) for m in (loaded, float_))
    assert_near(found[1], expected[1], 0.1)


# What is written into `weight.data`, or by `overwrite`


def test_a_change_below_half_a_step_is_rounded_away_but_in_the_outlier_columns() -> None:
    linear, dims = nn.Linear(130, 8).requires_grad_(False), torch.tensor([3, 29])
    linear.weight[:, dims] *= 0.1  # no row has its largest element there
    layer = Int8Linear.from_linear(linear, dims)
    kept = torch.ones(130).index_fill(0, dims, 0).bool()
    before, weight = layer.dequantize(), layer.unpacked_weight().clone()
    change = 0.4 * layer.SCB[:, None].min() / 127 * torch.randn(8, 130).sign()
    change[weight.abs() == 127] = 0  # the step stays
    layer.weight.data += change
    assert torch.equal(layer.unpacked_weight()[:, kept], weight[:, kept])
    assert torch.allclose(layer.dequantize()[:, dims], (before + change)[:, dims], rtol=1e-6)


def test_what_is_no_weight_is_refused_and_the_layer_stays() -> None:
    linear = nn.Linear(30, 8).requires_grad_(False)
    layer, x = Int8Linear.from_linear(linear, torch.tensor([3, 29])), torch.randn(4, 30)
    layer.name, expected = "model.proj", layer(x)
    broken = linear.weight.clone()
    broken[2, 3] = float("nan")
    for weight, words in {
        "shape": (torch.zeros(8, 29), r"^model\.proj: torch\.float32 \[8, 29\] written into its weight, expected"),
        "dtype": (torch.zeros(8, 30, dtype=torch.int8), r"^model\.proj: torch\.int8 \[8, 30\] written into"),
        "nan": (
            broken,
            r"^model\.proj: what is written into its weight holds NaN or infinity; the layer is as it was$",
        ),
    }.values():
        with pytest.raises(LLMInt8Error, match=words):
            layer.overwrite(weight)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("rotation", [None, 64])
def test_what_is_written_into_the_data_is_quantized_as_from_the_start(rotation: Any) -> None:
    first, second = (nn.Linear(130, 8).requires_grad_(False) for _ in range(2))
    dims, x = torch.tensor([3, 29]), torch.randn(4, 130)
    expected = Int8Linear.from_linear(second, dims, rotation=rotation)
    writes = {
        "assigned": lambda layer: setattr(layer.weight, "data", second.weight),
        "copied": lambda layer: layer.weight.data.copy_(second.weight),
        "overwritten": lambda layer: layer.overwrite(second.weight),
    }
    for write in writes.values():
        layer = Int8Linear.from_linear(first, dims, rotation=rotation)
        layer.bias = nn.Parameter(second.bias, requires_grad=False)
        write(layer)
        assert torch.equal(layer(x), expected(x))
        assert layer.prepared is not None
        assert torch.equal(layer.state_dict()["weight"], expected.state_dict()["weight"])
    layer = Int8Linear.from_linear(first, dims, rotation=rotation)
    wanted = layer.dequantize() + 0.25
    layer.weight.data += 0.25
    expected = Int8Linear.from_linear(nn.Linear(130, 8), dims, rotation=rotation)
    expected.overwrite(wanted)
    assert torch.equal(layer.dequantize(), expected.dequantize())


@pytest.mark.parametrize("kind", ["int8", "k bits"])
def test_the_log_says_what_was_written_and_what_rounding_lost(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to what was written; of the layers of one name one says it as a warning."""
    monkeypatch.setattr(writing, "_TOLD", set())
    caplog.set_level(logging.INFO, "llmint8")
    linear, messages = nn.Linear(64, 8), []
    for name in ("h.0.proj", "h.11.proj", "h.0.other", "", ""):
        layer: Any = Int8Linear.from_linear(linear)
        if kind == "k bits":
            layer = runtime.KBitLinear.from_linear(linear, KBit(4, "int", 32))
        layer.name, before = name, layer.dequantize()
        wanted = torch.randn(8, 64)
        caplog.clear()
        assert layer.overwrite(wanted) is None
        change, lost = (100 * float((other - wanted).norm() / wanted.norm()) for other in (before, layer.dequantize()))
        figures = f": its weight was changed by {change:.2g} % and quantized again, which rounds off {lost:.2g} %"
        assert caplog.record_tuples[0][1:] == (logging.INFO, (name or "an int8 layer") + figures)
        messages += [message.partition(":")[0] for _, level, message in caplog.record_tuples if level > logging.INFO]
        assert (0 < lost < 1.5) == (kind == "int8")
    assert messages == ["h.*.proj", "h.*.other", "int8 layers"]
    layer.overwrite(torch.zeros(8, 64))
    assert caplog.messages[-1].startswith("an int8 layer: its weight was changed by ")
    assert not bool(layer.dequantize().any())


def test_a_layer_without_outliers_is_written_into_and_keeps_its_bias() -> None:
    """As bitsandbytes wrote it: it stores none, and gets none."""
    linear, other = nn.Linear(30, 8).requires_grad_(False), nn.Linear(30, 8).requires_grad_(False)
    layer = Int8Linear.from_linear(linear)
    layer.outlier_dims = layer.outlier_weight = None
    layer.overwrite(other.weight)
    assert (layer.outlier_dims, layer.outlier_weight) == (None, None)
    expected = Int8Linear.from_linear(other)
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert torch.equal(layer.row_absmax, expected.row_absmax)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(4, 30)
    assert torch.allclose(layer(x) - linear.bias, expected(x) - other.bias, atol=1e-6)  # one sum more is rounded
