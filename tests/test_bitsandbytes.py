"""One directory, two runtimes: llmint8 and stock transformers + bitsandbytes, which both run on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.runtime import Int8Linear

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPES = [(1, 64, 32), (1, 1000, 8), (2, 95, 63), (17, 576, 192), (64, 96, 33)]  # M, K, N
THRESHOLD = 6.0
AS_BITSANDBYTES: dict[str, Any] = {"outliers": "dynamic", "activation": "absmax", "activation_group": "row"}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def linear8bitlt(layer: Int8Linear) -> Any:
    """The same int8 weight in bitsandbytes' layer, as its own loader puts it there."""
    values, absmax = layer.unpacked_weight().detach().clone(), layer.SCB.clone()
    other = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=THRESHOLD
    )
    other.weight = bitsandbytes.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=absmax
    )
    other.bias = layer.bias
    return other.eval()  # in training mode it multiplies in 16 bit


@pytest.mark.parametrize("planted", [0, 1, 5], ids=lambda count: f"outliers{count}")
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=[f"M{m}-K{k}-N{n}" for m, k, n in SHAPES])
def test_layer_agrees_with_linear8bitlt(m: int, k: int, n: int, planted: int) -> None:
    torch.manual_seed(m + k + n)
    layer = Int8Linear.from_linear(torch.nn.Linear(k, n).half())
    layer.outliers, layer.threshold = "dynamic", THRESHOLD
    x = torch.randn(m, k)
    dims = torch.randperm(k)[:planted]
    x[:, dims] += torch.randn(m, planted).sign() * 25
    with torch.no_grad():
        expected = linear8bitlt(layer)(x.half())
        got = layer(x.half())
        layer.outliers = "none"
        without = layer(x.half())
    error = relative_error(got, expected)
    if planted:
        assert error <= 0.02
        assert relative_error(without, expected) > 2 * error  # the decomposition is what makes them agree
    else:
        assert error <= 0.002
        assert torch.equal(without, got)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose distributions are far from uniform, so that KL has something to measure."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("source")
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "out"
    converter.convert(source, path, outliers="none")
    return path


def stock(path: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cpu", **arguments)


def log_probabilities(model: Any) -> Tensor:
    tokens = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits.double().log_softmax(-1).flatten(0, 1)


def kl(expected: Tensor, got: Tensor) -> float:
    """Mean KL divergence of the next-token distribution, nats per token."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def linear8bitlts(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}


def test_stock_transformers_loads_and_generates(checkpoint: Path) -> None:
    block = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["llmint8"]
    assert block["activation_group"] == 128  # which it does not know
    model = stock(checkpoint)
    layers = linear8bitlts(model)
    stored = load_file(checkpoint / "model.safetensors")
    assert {f"{name}.weight" for name in layers} == {n for n, t in stored.items() if t.dtype == torch.int8}
    assert len(layers) == 21
    for name, layer in layers.items():
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
    tokens = torch.arange(3, 11)[None]
    assert model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape == (1, 13)


def test_both_are_equally_far_from_the_16_bit_model(source: Path, checkpoint: Path) -> None:
    expected = log_probabilities(transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval())
    theirs = kl(expected, log_probabilities(stock(checkpoint)))
    ours = kl(
        expected,
        log_probabilities(runtime.load(checkpoint, threshold=THRESHOLD, **AS_BITSANDBYTES)),
    )
    uniform = kl(expected, torch.full_like(expected, 1 / expected.shape[1]).log())
    assert uniform > 1  # nats
    assert 0 < theirs < uniform / 20
    assert 0.9 <= ours / theirs <= 1.1  # without the decomposition it is 1.18


def test_conv1d_is_stored_as_bitsandbytes_expects(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": 500, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).half().save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out")
    model = stock(tmp_path / "out")
    assert len(linear8bitlts(model)) == 8
    theirs = log_probabilities(model)
    ours = log_probabilities(runtime.load(tmp_path / "out", **AS_BITSANDBYTES))
    assert relative_error(ours, theirs) < 0.01


@pytest.fixture(scope="module")
def written_by_bitsandbytes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    stock(source, quantization_config=config).save_pretrained(path)
    return path


def test_a_checkpoint_of_bitsandbytes_loads(source: Path, written_by_bitsandbytes: Path) -> None:
    model = runtime.load(written_by_bitsandbytes)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert len(layers) == 21
    assert {(layer.outliers, layer.threshold) for layer in layers.values()} == {("dynamic", THRESHOLD)}
    ours, theirs = log_probabilities(model), log_probabilities(stock(written_by_bitsandbytes))
    expected = log_probabilities(transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert kl(theirs, ours) < kl(expected, theirs)  # closer to it than it is to the original
    assert 0.75 <= kl(expected, ours) / kl(expected, theirs) <= 1.25


def test_what_we_save_of_it_loads_in_both(written_by_bitsandbytes: Path, tmp_path: Path) -> None:
    model = runtime.load(written_by_bitsandbytes)
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (written_by_bitsandbytes, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(log_probabilities(runtime.load(tmp_path)), log_probabilities(model))
    assert torch.equal(log_probabilities(stock(tmp_path)), log_probabilities(stock(written_by_bitsandbytes)))


def test_both_quantize_weights_alike(checkpoint: Path, written_by_bitsandbytes: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (checkpoint, written_by_bitsandbytes))
    int8 = [name.removesuffix(".weight") for name, tensor in theirs.items() if tensor.dtype == torch.int8]
    for name in int8:
        assert torch.equal(ours[f"{name}.SCB"], theirs[f"{name}.SCB"])
        difference = (ours[f"{name}.weight"].int() - theirs[f"{name}.weight"].int()).abs()
        assert difference.max() <= 1  # it rounds 16-bit quotients, we the exact ones
        assert difference.float().mean() < 0.1
