"""`llmint8 eval`: the numbers against numpy, the simulated methods against the formulas and against the runtime."""

import gc
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmint8 import converter, runtime
from llmint8.converter.model.build import is_linear
from llmint8.converter.words import activations
from llmint8.formats import KBit, LLMInt8Error, open_checkpoint
from llmint8.kernels.reference import QuantizedRows
from llmint8.runtime.accuracy import methods
from llmint8.runtime.accuracy.compare import compare, modes_of
from llmint8.runtime.accuracy.evaluate import Logits, measure, token_windows
from llmint8.runtime.accuracy.halves import Halves
from llmint8.runtime.accuracy.methods import METHODS, Method, NotRowsError, Simulation
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")

VOCABULARY = 97
PLANTED = [3, 17]  # the dimensions of the hidden state that the norms make large
METHOD = {method.name: method for method in METHODS}
LAYERS = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
LAYERS += [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]


def make_llama(planted: bool = False) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.15)).eval()
    if planted:
        # Smaller weights for them, as trained models have, but not so small that int8 loses them.
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight.data[PLANTED] = 40
                for reader in readers:
                    reader.weight.data[:, PLANTED] /= 10
    return model.half()


def make_tokenizer() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` and `planted` in 16 bit, `out` and `planted8` in int8, `text.txt`."""
    folder = tmp_path_factory.mktemp("eval")
    for name, planted in (("source", False), ("planted", True)):
        make_llama(planted).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    converter.convert(folder / "source", folder / "out", outliers="none")
    converter.convert(folder / "planted", folder / "planted8", outliers="none")
    (folder / "text.txt").write_text(words(400))
    return folder


def words(count: int) -> str:
    ids = torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(7))
    return " ".join(f"w{i}" for i in ids)


def windows(count: int = 3, length: int = 24) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def source_model(path: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


Whole = Callable[[Tensor], Tensor]  # token ids [1, W] -> logits [1, W, V]


def together(
    windows: Iterable[Tensor], reference: Whole, candidates: dict[str, Whole]
) -> Iterator[tuple[Tensor, Logits, dict[str, Logits]]]:
    """What `measure` takes, of models that give all logits of a window at once."""

    def at(whole: Whole, window: Tensor) -> Logits:
        logits = whole(window[None])[0]
        return lambda places: logits[places]

    for window in windows:
        yield window, at(reference, window), {name: at(whole, window) for name, whole in candidates.items()}


def logits_of(model: Any) -> Whole:
    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(tokens).logits
        return found

    return logits


def simulated(model: Any, method: Method) -> Whole:
    simulation = Simulation(model, LAYERS)

    def logits(tokens: Tensor) -> Tensor:
        with simulation.applied(method):
            return logits_of(model)(tokens)

    return logits


def recorded(path: Path) -> str:
    """How the checkpoint's own mode is called."""
    quantization = open_checkpoint(path).quantization
    return activations(quantization.scheme.activation, quantization.scheme.activation_group)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def options(folder: Path, **changes: object) -> list[object]:
    """--reference and --text and small windows."""
    given = {"reference": folder / "source", "text": folder / "text.txt", "tokens": 96, "window": 32} | changes
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def assert_one_line_error(result: Result, *expected: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    for part in expected:
        assert part in result.stderr


# The numbers


def test_a_model_is_no_distance_from_itself(folder: Path) -> None:
    logits = logits_of(source_model(folder / "source"))
    found = measure(together(windows(), logits, {"itself": logits}))
    (itself,) = found.measurements
    assert (itself.kl_mean, itself.kl_median, itself.kl_p99) == (0, 0, 0)
    assert itself.top1_agreement == 1
    assert itself.perplexity == found.reference_perplexity


def test_numbers_are_those_of_numpy(folder: Path) -> None:
    """150 positions in a window: more than are compared at a time."""
    tokens = windows(2, 151)
    tables = [torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    reference, candidate = (lambda ids, table=table: 3 * table[ids] for table in tables)
    found = measure(together(tokens, reference, {"other": candidate}))

    def log_softmax(logits: Tensor) -> Any:
        values = logits.numpy().astype(np.float64)
        return values - np.log(np.exp(values).sum(-1, keepdims=True))

    p, q = (log_softmax(logits(tokens[:, :-1])).reshape(-1, VOCABULARY) for logits in (reference, candidate))
    targets = tokens[:, 1:].flatten().numpy()
    kl = (np.exp(p) * (p - q)).sum(1)
    every = np.arange(len(targets))
    (other,) = found.measurements
    assert found.positions == len(targets) == 300
    assert other.name == "other"
    np.testing.assert_allclose(other.kl_mean, kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(other.kl_median, np.median(kl), rtol=1e-5)
    np.testing.assert_allclose(other.kl_p99, np.percentile(kl, 99), rtol=1e-5)
    assert other.top1_agreement == (p.argmax(1) == q.argmax(1)).mean()
    np.testing.assert_allclose(found.reference_perplexity, np.exp(-p[every, targets].mean()), rtol=1e-5)
    np.testing.assert_allclose(other.perplexity, np.exp(-q[every, targets].mean()), rtol=1e-5)


def test_logits_are_asked_for_a_few_positions_at_a_time() -> None:
    calls = []

    def model(name: str) -> Logits:
        def logits(places: slice) -> Tensor:
            calls.append((name, places.start, places.stop))
            return torch.zeros(places.stop - places.start, VOCABULARY)

        return logits

    passes: list[str] = []
    runs = ((window, model("16 bit"), {"a": model("a"), "b": model("b")}) for window in windows(2, 8))
    measure(runs, 5, passes.append)
    assert calls == [(name, *places) for _ in (1, 2) for places in ((0, 5), (5, 7)) for name in ("16 bit", "a", "b")]
    assert passes == ["", ""]


def test_broken_logits() -> None:
    def constant(value: float, size: int = VOCABULARY) -> Whole:
        return lambda tokens: torch.full((*tokens.shape, size), value)

    with pytest.raises(LLMInt8Error, match="not finite"):
        measure(together(windows(), constant(math.nan), {"a": constant(0)}))
    with pytest.raises(LLMInt8Error, match="96 tokens, that of the reference 97"):
        measure(together(windows(), constant(0), {"a": constant(0, VOCABULARY - 1)}))
    (broken,) = measure(together(windows(), constant(0), {"a": constant(math.nan)})).measurements
    assert math.isnan(broken.kl_mean)
    assert math.isnan(broken.kl_p99)
    assert math.isnan(broken.perplexity)
    with pytest.raises(ValueError, match="no windows"):
        measure([])


# Windows


def test_windows_follow_one_another() -> None:
    found = token_windows(make_tokenizer(), words(50), tokens=35, window=10)
    ids = [int(word[1:]) for word in words(50).split()]
    assert found.tolist() == [ids[:10], ids[10:20], ids[20:30]]


def test_windows_begin_with_the_token_that_begins_texts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w5"})
    plain = token_windows(tokenizer, words(50), tokens=30, window=10)
    assert plain[:, 0].tolist() != [5, 5, 5]  # it has one, and sets it before nothing
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="w5 $A", special_tokens=[("w5", 5)]
    )
    found = token_windows(tokenizer, words(50), tokens=30, window=10)
    assert found[:, 0].tolist() == [5, 5, 5]
    assert found[:, 1:].flatten().tolist() == plain.flatten()[:27].tolist()


def test_long_words_do_not_hide_tokens() -> None:
    text = ("x" * 500 + " ") * 20
    assert token_windows(make_tokenizer(), text, tokens=20, window=10).tolist() == [[0] * 10] * 2


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="has 50 tokens, 60 are needed for 3 windows of 20"):
        token_windows(make_tokenizer(), words(50), tokens=60, window=20)
    with pytest.raises(ValueError, match="19 tokens are less than a window of 20"):
        token_windows(make_tokenizer(), words(50), tokens=19, window=20)


# The paper's methods


def test_the_methods_are_those_of_the_paper() -> None:
    plain = ["absmax", "zeropoint", "absmax row-wise", "absmax vector-wise", "zeropoint vector-wise"]
    assert list(METHOD) == plain + [f"{name} + decomposition" for name in plain]


def formula(method: Method, x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, from quantized values written out in float64."""

    def rounded(values: Tensor, by_row: bool) -> Tensor:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        if not by_row:
            low, high = low.min(), high.max()
        if method.kind == "absmax":
            scale = torch.maximum(-low, high) / 127
            return (values / scale).round() * scale
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 254
        zero_point = (-127 - low / scale).round()
        return (((values / scale).round() + zero_point).clamp(-127, 127) - zero_point) * scale

    x, weight = x.double(), weight.double()
    outliers = (x.abs() >= 6).any(0) if method.decomposition else torch.zeros(x.shape[1], dtype=torch.bool)
    int8_x = rounded(x * ~outliers, method.granularity != "tensor")
    int8_weight = rounded(weight, method.granularity == "vector")
    return int8_x @ int8_weight.T + x[:, outliers] @ weight[:, outliers].T


@pytest.mark.parametrize("name", METHOD)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_computes_the_formula(name: str, kind: Any) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(33, 21) if kind is nn.Linear else Conv1D(21, 33)
    layer.weight.data.normal_().add_(0.4)
    layer.bias.data.normal_()
    x = torch.randn(2, 5, 33) + 0.5
    x[1, 3, [4, 9]] = torch.tensor([40.0, -6.0])
    model = nn.Sequential(layer)
    with torch.no_grad(), Simulation(model, ["0"]).applied(METHOD[name]):
        found = model(x)
    weight = layer.weight if kind is nn.Linear else layer.weight.T
    expected = formula(METHOD[name], x.reshape(10, 33), weight.detach()).reshape(2, 5, 21) + layer.bias
    assert torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-5)
    assert (found - model(x)).norm() > 1e-3  # and now in 16 bit again


def test_simulation_ends_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), Simulation(model, ["0"]).applied(METHODS[0]):
        model(torch.zeros(2, 5))
    assert "forward" not in vars(model[0])


def test_inputs_without_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    for method in METHODS:
        with Simulation(model, ["0"]).applied(method):
            assert model(torch.zeros(0, 4)).shape == (0, 3)


def test_a_layer_that_the_reference_does_not_have() -> None:
    with pytest.raises(LLMInt8Error, match="1: int8 in the checkpoint"):
        Simulation(nn.Sequential(nn.Linear(4, 4)), ["1"])


def assert_the_same_but_for_roundings(found: Tensor, expected: Tensor, other: Tensor) -> None:
    """Two paths add float32 in other orders, so an input between two int8 values may be rounded to either.

    Where that happens to one input, the logits behind it differ by 0.0005 of what a third path's do; a few are allowed.
    """
    assert (found - expected).norm() < 0.002 * (found - other).norm()
    assert (found - other).abs().max() > 1e-2


def test_vector_wise_is_what_the_runtime_computes(folder: Path) -> None:
    int8 = runtime.load(folder / "out", dtype=torch.float32, outliers="none", activation="absmax")
    expected = logits_of(int8)(windows())
    found = simulated(source_model(folder / "source"), METHOD["absmax vector-wise"])(windows())
    assert_the_same_but_for_roundings(found, expected, logits_of(source_model(folder / "source"))(windows()))


def test_decomposition_is_the_dynamic_runtime_where_int8_loses_nothing(folder: Path) -> None:
    """The 16-bit columns are the original ones here and dequantized ones there, so the originals are made those."""
    int8 = runtime.load(folder / "planted8", dtype=torch.float32, outliers="dynamic", activation="absmax")
    model = source_model(folder / "planted")
    for name in LAYERS:
        model.get_submodule(name).weight.data = int8.get_submodule(name).dequantize()
    found = simulated(model, METHOD["absmax vector-wise + decomposition"])(windows())
    expected = logits_of(int8)(windows())
    without = simulated(model, METHOD["absmax vector-wise"])(windows())
    assert_the_same_but_for_roundings(found, expected, without)


def test_planted_outliers_order_the_methods(folder: Path) -> None:
    model = source_model(folder / "planted")
    simulation = Simulation(model, LAYERS)

    def logits(method: Method) -> Whole:
        def run(tokens: Tensor) -> Tensor:
            with simulation.applied(method):
                return logits_of(model)(tokens)

        return run

    found = measure(together(windows(), logits_of(model), {name: logits(method) for name, method in METHOD.items()}))
    kl = {row.name: row.kl_mean for row in found.measurements}
    for name, method in METHOD.items():
        if not method.decomposition:
            assert kl[f"{name} + decomposition"] < kl[name] / 2, name
    for kind in ("", " + decomposition"):
        assert kl[f"absmax{kind}"] > kl[f"absmax row-wise{kind}"] > kl[f"absmax vector-wise{kind}"]
        assert kl[f"absmax vector-wise{kind}"] > kl[f"zeropoint vector-wise{kind}"]


# Together


def families() -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(vocab_size=VOCABULARY, intermediate_size=48, **sizes)
    opt = transformers.OPTConfig(
        vocab_size=VOCABULARY, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **sizes
    )
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gemma = transformers.Gemma2Config(  # caps its logits
        vocab_size=VOCABULARY, intermediate_size=48, num_key_value_heads=2, head_dim=8, **sizes
    )
    return {config.model_type: config for config in (llama, opt, gpt2, gemma)}


@pytest.mark.parametrize("family", families())
def test_methods_run_together_as_each_alone(family: str) -> None:
    """Rows of a batch add float32 in other orders than one; see `assert_the_same_but_for_roundings`."""
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(families()[family]).float().eval()
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    simulation, (window,) = Simulation(model, names), windows(1)
    halves = Halves(model, window)
    assert halves.width == 32  # and not that of the logits
    ways = [None, *METHODS]
    calls = []
    head.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    with simulation.applied(*ways):
        rows = halves.hidden(window.expand(len(ways), -1))
    assert calls == []
    plain = logits_of(model)(window[None])[0]
    assert torch.allclose(halves.logits(rows[0, 5:9]), plain[5:9], atol=1e-5)
    assert calls[-1] == (1, 4, 32)
    for method, row in zip(METHODS, rows[1:], strict=True):
        with simulation.applied(method):
            alone = logits_of(model)(window[None])[0]
        assert (halves.logits(row) - alone).norm() < 0.05 * (alone - plain).norm(), method.name
    assert all("forward" not in vars(module) for module in model.modules())


def test_rows_that_cannot_be_told_apart_are_not_guessed() -> None:
    """What experts get are some positions of all rows."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([nn.Linear(4, 3)])]), "fc": nn.Linear(4, 3)})
    simulation = Simulation(model, ["layers.0.0", "fc"])
    with torch.no_grad(), simulation.applied(None, METHODS[0]):
        assert model["fc"](torch.zeros(6, 4)).shape == (6, 3)
        assert model["layers"][0][0](torch.zeros(2, 3, 4)).shape == (2, 3, 3)
        with pytest.raises(NotRowsError, match=r"layers\.0\.0: an input \[6, 4\] is not 2 rows"):
            model["layers"][0][0](torch.zeros(6, 4))
        with pytest.raises(NotRowsError, match="fc"):
            model["fc"](torch.zeros(3, 5, 4))


def test_methods_run_one_by_one_where_rows_are_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kl() -> list[float]:
        arguments = (folder / "planted8", folder / "planted", folder / "text.txt")
        found = compare(*arguments, tokens=64, window=32, methods=True)
        return [row.kl_mean for row in found.evaluation.measurements]

    together, counts = kl(), []

    def mixed(name: str, x: Tensor, count: int) -> Any:
        counts.append(count)
        if count > 1:
            raise NotRowsError(name)
        return rows(name, x, count)

    rows = methods.parted_rows
    monkeypatch.setattr(methods, "parted_rows", mixed)
    assert kl() == pytest.approx(together, rel=0.05)
    assert [count for count in counts if count > 1] == [11]  # tried once


def test_a_model_that_cannot_be_parted_gives_its_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (window,) = source_model(folder / "source"), windows(1)
    expected = logits_of(model)(window[None])
    monkeypatch.setattr(type(model), "base_model", property(lambda self: self))
    halves = Halves(model, window)
    assert halves.width == VOCABULARY
    hidden = halves.hidden(window[None])
    assert torch.equal(halves.logits(hidden[0]), expected[0])


def test_no_weight_is_kept_after_its_layer(folder: Path) -> None:
    model = source_model(folder / "source")
    simulation = Simulation(model, LAYERS)
    before = sum(type(one) is QuantizedRows for one in gc.get_objects())
    with simulation.applied(*METHODS):
        logits_of(model)(windows(1)[0].expand(len(METHODS), -1))
    assert sum(type(one) is QuantizedRows for one in gc.get_objects()) == before


# The command


def test_table(folder: Path) -> None:
    result = run(folder / "out", *options(folder))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no progress bar where there is no terminal
    head, reference, ours, empty, note = result.stdout.splitlines()
    assert head.split() == ["KL", "mean", "median", "99", "%", "top-1", "perplexity", "-", "ref."]
    assert reference.startswith("source (reference)  ")
    assert ours.startswith(f"out: static, {recorded(folder / 'out')}  ")
    assert empty == ""
    assert note == "3 windows of 32 tokens, 93 positions. 14 layers in int8, 0.00% of their columns stored unquantized."
    assert len({len(line) for line in (head, reference, ours)}) == 1


def test_inputs_beyond_the_calibration_are_told(folder: Path) -> None:
    facts = json.loads(run(folder / "out", *options(folder), "--json").stdout)
    assert facts["beyond_calibration"] is None  # there was none
    out, worst = folder / "calibrated", "model.layers.1.self_attn.o_proj"
    converter.convert(folder / "planted", out, outliers="top-k=2")
    given = options(folder, reference=folder / "planted")

    def last_line(limits: dict[str, float]) -> str:
        manifest = json.loads((out / "llmint8_manifest.json").read_text())
        for name, statistics in manifest["modules"].items():
            if "kept_absmax" in statistics:
                statistics["kept_absmax"] = limits.get(name, 1e6)
        (out / "llmint8_manifest.json").write_text(json.dumps(manifest))
        return run(out, *given).stdout.splitlines()[-1]

    assert last_line({}) == "0.00% of the inputs exceed the largest of the calibration."
    told = f"7.14% of the inputs exceed the largest of the calibration, 100.00% at {worst}."
    assert last_line({worst: 0.0}) == told
    facts = json.loads(run(out, *given, "--json").stdout)
    assert facts["beyond_calibration"] == {"share": pytest.approx(1 / 14), "layer": worst, "layer_share": 1.0}
    facts = json.loads(run(out, *given, "--json", "--methods").stdout)
    assert facts["beyond_calibration"] is None  # other modes ran too, with inputs of their own


def test_what_an_int8_head_costs_is_measured_against_the_same_model_with_the_16_bit_head(folder: Path) -> None:
    converter.convert(folder / "source", folder / "head8", outliers="none", quantize_head=True)
    facts = json.loads(run(folder / "head8", *options(folder), "--json").stdout)
    kl = {row["name"].partition(f"{recorded(folder / 'head8')}")[2]: row["kl_mean"] for row in facts["methods"]}
    assert list(kl) == ["", ", head in 16 bit"]
    assert facts["layers"] == 15
    ordinary = json.loads(run(folder / "out", *options(folder), "--json").stdout)
    assert ordinary["head_kl"] is None
    assert kl[", head in 16 bit"] == pytest.approx(ordinary["methods"][0]["kl_mean"], rel=1e-3)
    assert facts["head_kl"] == kl[""] - kl[", head in 16 bit"] > 0
    last = run(folder / "head8", *options(folder)).stdout.splitlines()[-1]
    assert last == f"The int8 output head adds {facts['head_kl']:.5f} to the mean KL."


def test_json_is_the_table(folder: Path) -> None:
    facts = json.loads(run(folder / "out", *options(folder), "--json", "--quiet").stdout)
    (ours,) = facts["methods"]
    found = compare(folder / "out", folder / "source", folder / "text.txt", tokens=96, window=32).evaluation
    (expected,) = found.measurements
    assert ours["name"] == expected.name == f"out: static, {recorded(folder / 'out')}"
    assert ours["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-3)
    assert ours["kl_mean"] > 0
    assert ours["perplexity_difference"] == ours["perplexity"] - facts["reference_perplexity"]
    row = run(folder / "out", *options(folder)).stdout.splitlines()[2].split()[-6:]
    assert row == [
        f"{ours['kl_mean']:.5f}",
        f"{ours['kl_median']:.5f}",
        f"{ours['kl_p99']:.5f}",
        f"{ours['top1_agreement']:.2%}",
        f"{ours['perplexity']:.3f}",
        f"{ours['perplexity_difference']:+.3f}",
    ]


def test_nothing_is_beyond_the_calibration_of_layers_whose_inputs_are_not_quantized(
    folder: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"format": 2, "bits": 4, "outliers": "top-k=3", "calibration_tokens": 48}
    converter.convert(folder / "source", tmp_path / "k4", **how)
    facts = json.loads(run(tmp_path / "k4", *options(folder), "--json", "--quiet").stdout)
    assert facts["stored_columns"] > 0
    assert facts["beyond_calibration"] is None


def test_the_result_is_left_for_the_model_card_without_paths(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "out", tmp_path / "mine"))
    saved = out / "llmint8_eval.json"
    saved.unlink(missing_ok=True)
    run(out, *options(folder), "--no-save")
    assert not saved.exists()
    facts = json.loads(run(out, *options(folder), "--json").stdout)
    assert json.loads(saved.read_text()) == facts | {"checkpoint": "mine", "reference": "source", "text": "text.txt"}
    assert open_checkpoint(out)


def test_methods_against_ours(folder: Path) -> None:
    result = run(folder / "planted8", *options(folder, reference=folder / "planted"), "--methods", "--json")
    facts = json.loads(result.stdout)
    kl = {row["name"]: row["kl_mean"] for row in facts["methods"]}
    modes = ("static, zeropoint in groups of 128", "static, absmax in groups of 128", "static, zeropoint")
    assert modes[0] == f"static, {recorded(folder / 'planted8')}"
    zeropoint, absmax, row, dynamic = (f"planted8: {mode}" for mode in (*modes, "dynamic 6.0, absmax"))
    assert list(kl) == [*METHOD, zeropoint, absmax, row, dynamic]
    assert kl[absmax] == pytest.approx(kl["absmax vector-wise"], rel=1e-2)
    assert kl[dynamic] < kl[absmax] / 2
    assert kl[zeropoint] < kl[absmax] / 1.2
    assert kl[row] == pytest.approx(kl[zeropoint], rel=1e-2)  # all of its inputs are one group


def test_the_checkpoint_beside_itself_in_other_modes() -> None:
    def labels(activation: Any, group: Any, methods: bool = True, **coded: Any) -> list[str]:
        config = SimpleNamespace(outliers="static", threshold=6.0, activation=activation, activation_group=group)
        layers: Any = [SimpleNamespace(**{"rotation": None, "kbit": None, **coded})]
        return list(modes_of(config, methods, layers))

    grouped = ["static, absmax in groups of 64", "static, zeropoint in groups of 64", "static, absmax"]
    assert labels("absmax", 64) == [*grouped, "dynamic 6.0, absmax"]
    plain = ["static, zeropoint", "static, absmax", "static, zeropoint in groups of 128"]
    assert labels("zeropoint", "row") == [*plain, "dynamic 6.0, absmax"]
    assert labels("zeropoint", "row", rotation=64) == plain  # of which no column can be taken
    assert labels("zeropoint", 128, kbit=KBit(4, "nf4", 64)) == ["static, 4 bits (nf4, blocks of 64)"]
    assert labels("zeropoint", 128, methods=False) == ["static, zeropoint in groups of 128"]


def test_text_from_jsonl(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i} w{i + 1}", "id": i}) + "\n" for i in range(60))
    )
    facts = json.loads(run(folder / "out", *options(folder, text=tmp_path / "text.jsonl"), "--json").stdout)
    assert facts["positions"] == 93


def test_a_checkpoint_of_bitsandbytes_runs_as_there(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "out", tmp_path / "bnb")
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())
    del config["quantization_config"]["llmint8"]
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(config))
    (tmp_path / "bnb" / "llmint8_manifest.json").unlink()
    tensors = load_file(tmp_path / "bnb" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".outlier_" not in name}
    save_file(kept, tmp_path / "bnb" / "model.safetensors", metadata={"format": "pt"})
    result = run(tmp_path / "bnb", *options(folder))
    assert "bnb: dynamic 6.0, absmax  " in result.stdout, result.output


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 4096}, ["has 400 tokens", "4096 are needed"]),
        ({"tokens": 20}, ["20 tokens", "window of 32"]),
        ({"window": 96}, ["96", "64 positions"]),
        ({"device": "abacus"}, ["'abacus'"]),
        ({"reference": "gone/away/from/here"}, ["no such directory"]),
    ],
    ids=["short text", "few tokens", "long window", "device", "reference"],
)
def test_errors_are_one_line(changes: dict[str, object], expected: list[str], folder: Path) -> None:
    assert_one_line_error(run(folder / "out", *options(folder, **changes)), *expected)


def test_an_adapter_beside_the_reference_does_not_come_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PEFT installed, transformers would load it without a word."""
    shutil.copytree(folder / "source", tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text('{"base_model_name_or_path": "alice/base"}')
    monkeypatch.setattr("llmint8.runtime.accuracy.reference.is_peft_available", lambda: True)
    result = run(folder / "out", *options(folder, reference=tmp_path / "source"))
    assert_one_line_error(result, "adapter_config.json: an adapter, which transformers would load into the model")


def test_a_text_or_tasks_and_the_options_of_one_of_them(folder: Path) -> None:
    source, text = ["--reference", folder / "source"], ["--text", folder / "text.txt"]
    for given, words in (
        ([], "Give either --text FILE or --tasks NAME,..."),
        ([*text, "--tasks", "piqa"], "Give either --text FILE or --tasks NAME,..."),
        ([*text, "--limit", 3], "--limit goes with --tasks."),
        (["--tasks", "piqa", "--methods"], "--methods goes with --text."),
    ):
        result = run(folder / "out", *source, *given)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {words}")


def test_tasks_without_the_harness_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llmint8.runtime.accuracy.tasks", raising=False)
    result = run(folder / "out", "--reference", folder / "source", "--tasks", "piqa")
    assert_one_line_error(result, "Error: --tasks needs lm-evaluation-harness: pip install 'llmint8[tasks]'")


def test_swapped_checkpoints_are_one_line(folder: Path) -> None:
    assert_one_line_error(run(folder / "source", *options(folder)), "E02")
    assert_one_line_error(run(folder / "out", *options(folder, reference=folder / "out")), "already quantized")


def test_reference_without_a_tensor_is_one_line(folder: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "source", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    result = run(folder / "out", *options(folder, reference=tmp_path / "source"))
    assert_one_line_error(result, "model.layers.1.mlp.up_proj.weight", "missing")


def test_other_kinds_of_models_are_one_line(folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_layers=1))
    model.save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    result = run(folder / "out", *options(folder, reference=tmp_path / "t5"))
    assert_one_line_error(result, "T5ForConditionalGeneration is no causal language model")
