"""`outlier_misses`: rows beyond the calibration are counted where they occur, and nothing else changes."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.calibration.text import load_calibration
from llmint8.formats import CheckpointError, LLMInt8Error, open_checkpoint, read_manifest
from llmint8.runtime.layers.misses import MissCounter
from llmint8.runtime.model import compiled

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LAST = "model.layers.1.mlp.down_proj"  # what is done to its input reaches no other int8 layer
SHARING = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
MANIFEST = "llmint8_manifest.json"
TOKENS = 48


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("llama") / "source"
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.5, max_position_embeddings=TOKENS, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def convert(source: Path, out: Path, **options: Any) -> None:
    converter.convert(source, out, **{"outliers": "top-k=4", "calibration_tokens": TOKENS, **options})


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    convert(source, source.parent / "out")
    return source.parent / "out"


def calibration_tokens(source: Path) -> Tensor:
    tokens: Tensor = load_calibration(source, transformers.AutoConfig.from_pretrained(source), None, TOKENS).tokens
    return tokens


def run(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def kept_dim(layer: Any) -> int:
    return next(dim for dim in range(layer.in_features) if dim not in layer.outlier_dims.tolist())


@pytest.mark.parametrize("criterion", ["top-k=4", "threshold=3.0", "threshold=0.0001", "systematic"])
def test_the_manifest_has_the_largest_input_that_is_no_outlier(source: Path, tmp_path: Path, criterion: str) -> None:
    convert(source, tmp_path / "out", outliers=criterion)
    opened, modules = open_checkpoint(tmp_path / "out"), read_manifest(tmp_path / "out").modules
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for name in opened.records:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    run(model, calibration_tokens(source))
    for name in opened.records:
        dims = opened.read(f"{name}.outlier_dims").long()
        largest = float(inputs[name].abs().index_fill(-1, dims, 0).max())
        first = modules[name].get("shares_input_with", name)
        assert modules[first]["kept_absmax"] == pytest.approx(largest, rel=1e-5), name


def test_an_interrupted_conversion_records_the_same(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = []

    def interrupt(name: str, nbytes: int) -> None:
        done.append(name)
        if len(done) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == (checkpoint / MANIFEST).read_bytes()


def test_the_inputs_of_the_calibration_are_no_misses(source: Path, checkpoint: Path) -> None:
    """Those of the 16-bit model, each given to its own layer; a hair more is a miss."""
    model, tokens = runtime.load(checkpoint, dtype=torch.float32), calibration_tokens(source)
    begun = runtime.outlier_misses(model)
    assert set(begun) == set(open_checkpoint(checkpoint).records)
    assert {found[:3] for found in begun.values()} == {(0, 0, 0.0)}
    reference = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name in begun:
        layer = model.get_submodule(name)
        reference.get_submodule(name).register_forward_pre_hook(lambda _, args, layer=layer: (layer(args[0]), None)[1])
    run(reference, tokens)
    for name, found in runtime.outlier_misses(model).items():
        assert found[:3] == (tokens.numel(), 0, pytest.approx(found.limit, rel=1e-5)), name
        x = torch.zeros(1, model.get_submodule(name).in_features)
        x[0, kept_dim(model.get_submodule(name))] = -1.0001 * found.limit
        model.get_submodule(name)(x)
        assert runtime.outlier_misses(model)[name].misses == 1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_calibration_text_has_few_misses(source: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    """The int8 model's inputs are those of the 16-bit model, but for the errors of int8 on the way."""
    model, tokens = runtime.load(checkpoint, dtype=dtype), calibration_tokens(source)
    runtime.outlier_misses(model)
    run(model, tokens)
    for name, found in runtime.outlier_misses(model).items():
        assert found.misses <= 3, name
        assert 0.75 * found.limit < found.largest < 1.25 * found.limit, name


def test_a_large_input_is_counted_in_its_layer_only(source: Path, checkpoint: Path) -> None:
    model, tokens = runtime.load(checkpoint), calibration_tokens(source)
    layer = model.get_submodule(LAST)
    runtime.outlier_misses(model)

    def plant(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[0, [3, 7], kept_dim(layer)] = torch.tensor([1e3, -2e3], dtype=x.dtype)
        return (x,)

    run(model, tokens)
    before = runtime.outlier_misses(model)
    with layer.register_forward_pre_hook(plant):
        run(model, tokens)
    found = runtime.outlier_misses(model)
    more = {name: entry.misses - 2 * before[name].misses for name, entry in found.items()}
    assert {name: count for name, count in more.items() if count} == {LAST: 2}
    assert found[LAST].largest == pytest.approx(2e3, rel=1e-2)
    assert found[LAST].rows == 2 * tokens.numel()


def test_outlier_columns_do_not_count(checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    layer = model.get_submodule(LAST)
    runtime.outlier_misses(model)
    x = torch.zeros(2, 3, layer.in_features)
    x[..., layer.outlier_dims.long()] = 1e4
    layer(x)
    assert runtime.outlier_misses(model)[LAST][:3] == (6, 0, 0.0)
    layer(torch.zeros(0, layer.in_features))  # an expert that no token goes to
    assert runtime.outlier_misses(model)[LAST][:3] == (6, 0, 0.0)


def test_counting_changes_no_result_and_no_state(checkpoint: Path, tmp_path: Path) -> None:
    model, tokens = runtime.load(checkpoint), torch.arange(16)[None]
    expected, keys = run(model, tokens), list(model.state_dict())
    runtime.outlier_misses(model)
    assert torch.equal(run(model, tokens), expected)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(run(runtime.load(tmp_path), tokens), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), tokens), expected)


def test_a_model_goes_on_counting_when_it_is_moved_or_copied(checkpoint: Path) -> None:
    model, tokens = runtime.load(checkpoint, dtype=torch.float32), torch.arange(16)[None]
    runtime.outlier_misses(model)
    run(model, tokens)
    before = runtime.outlier_misses(model)
    model.to(torch.bfloat16).to("cpu")
    assert runtime.outlier_misses(model) == before
    copied = copy.deepcopy(model)
    run(copied, tokens)
    assert {found.rows for found in runtime.outlier_misses(copied).values()} == {32}
    assert runtime.outlier_misses(model) == before


def test_counting_may_begin_in_inference_mode(checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    with torch.inference_mode():
        runtime.outlier_misses(model)
        model(torch.arange(16)[None])
    run(model, torch.arange(16)[None])
    assert runtime.outlier_misses(model)[LAST].rows == 32


def test_offloaded_layers_count(checkpoint: Path) -> None:
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = runtime.load(checkpoint, device_map={**places, "model.layers.1": "disk"})
    assert model.get_submodule(LAST).weight.is_meta
    runtime.outlier_misses(model)
    run(model, torch.arange(16)[None])
    assert {found.rows for found in runtime.outlier_misses(model).values()} == {16}


def test_nothing_is_read_back_while_counting() -> None:
    """On the meta device there is nothing to read."""
    counter = MissCounter(1.0, torch.tensor([1, 3], device="meta"))
    assert counter(torch.empty(2, 5, 8, device="meta", dtype=torch.float16)) is None
    dtypes = [buffer.dtype for buffer in counter.buffers()]
    assert counter.half() is counter
    assert [buffer.dtype for buffer in counter.buffers()] == dtypes


@pytest.mark.gpu
def test_a_graph_counts_at_every_replay() -> None:
    counter = MissCounter(1.0, torch.tensor([1], device="cuda"))
    x = torch.tensor([[2.0, 9.0, 0.0], [0.5, 9.0, 0.0]], device="cuda").half()
    counter(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter(x)
    graph.replay()
    x[1, 2] = -3.0
    graph.replay()
    assert (int(counter.rows), int(counter.misses), float(counter.largest)) == (6, 4, 3.0)


def generate(model: Any, tokens: int) -> None:
    prompt = torch.tensor([[3, 4, 5]])
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)


@pytest.mark.soak
@pytest.mark.skipif(compiled._cpp_compiler() is None, reason="needs a C++ compiler")
def test_a_compiled_model_counts_from_the_first_call_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # Whether a graph is captured again is the point. That Inductor's code counts too is shown by the layer below.
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    model = runtime.load(checkpoint, compile=True)
    assert compiled.is_compiled(model)
    generate(model, 3)  # compiles the model without counters
    runtime.outlier_misses(model)
    generate(model, 5)
    generate(model, 5)
    # The prompt of three runs uncompiled, and then four times the token before; the fifth is not looked at again.
    assert {found.rows for found in runtime.outlier_misses(model).values()} == {14}
    assert all(found.largest > 0 for found in runtime.outlier_misses(model).values())
    layer, before = model.get_submodule(LAST), runtime.outlier_misses(model)[LAST].misses
    x = torch.full((1, 1, layer.in_features), 1e3, dtype=torch.bfloat16)
    torch.compile(layer, fullgraph=True)(x)
    assert runtime.outlier_misses(model)[LAST][:3] == (15, before + 1, float(x.max()))


@pytest.mark.parametrize(
    ("options", "mode", "words"),
    [
        ({}, "dynamic", "outliers is 'dynamic', expected 'static'"),
        ({}, "none", "outliers is 'none', expected 'static'"),
        ({"outliers": "none"}, "static", "nothing is known of its calibration"),
    ],
)
def test_without_limits_there_is_nothing_to_count(
    source: Path, tmp_path: Path, options: dict[str, Any], mode: Any, words: str
) -> None:
    convert(source, tmp_path / "out", **options)
    model = runtime.load(tmp_path / "out", outliers=mode)
    with pytest.raises(ValueError, match=rf"^LlamaForCausalLM: {words}; convert .* again, with calibration, .*$"):
        runtime.outlier_misses(model)


def edited(checkpoint: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a checkpoint with the statistics in its manifest changed."""
    shutil.copytree(checkpoint, out)
    manifest = json.loads((out / MANIFEST).read_text())
    edit(manifest["modules"])
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_layers_without_a_limit_are_not_counted(checkpoint: Path, tmp_path: Path) -> None:
    """As in checkpoints from before there were limits, and where the calibration did not come."""
    path = edited(checkpoint, tmp_path / "a", lambda modules: modules[SHARING[0]].pop("kept_absmax"))
    model = runtime.load(path)
    assert set(runtime.outlier_misses(model)) == set(open_checkpoint(path).records) - set(SHARING)
    path = edited(checkpoint, tmp_path / "b", lambda modules: modules.clear())
    with pytest.raises(ValueError, match="outliers is 'dynamic', expected 'static'"):  # they search instead
        runtime.outlier_misses(runtime.load(path))
    with pytest.raises(ValueError, match="nothing is known"):
        runtime.outlier_misses(runtime.load(path, outliers="static"))
    (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match="nothing is known"):
        runtime.outlier_misses(runtime.load(path))


@pytest.mark.parametrize("value", ["3.5", -1, 10**400, True, [1.0], "\x1b[2J"], ids=repr)
def test_a_malformed_limit_is_an_error_that_names_it(checkpoint: Path, tmp_path: Path, value: Any) -> None:
    path = edited(checkpoint, tmp_path / "out", lambda modules: modules[SHARING[0]].update(kept_absmax=value))
    with pytest.raises(LLMInt8Error) as caught:
        runtime.load(path)
    message = str(caught.value)
    assert message.startswith(
        f"{path / MANIFEST}: {SHARING[0]}: malformed statistics (kept_absmax is {repr(value)[:80]}"
    )
    assert message.isprintable()
    runtime.load(path, outliers="none")  # which needs no limit


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=repr)
def test_a_limit_that_is_no_json_is_an_error(checkpoint: Path, tmp_path: Path, value: Any) -> None:
    path = edited(checkpoint, tmp_path / "out", lambda modules: modules[SHARING[0]].update(kept_absmax=value))
    with pytest.raises(CheckpointError, match=f"^E16 .*{MANIFEST}: .*(NaN|Infinity) is no number in JSON"):
        runtime.load(path)


@pytest.mark.parametrize("entry", [{"shares_input_with": [1]}, {"shares_input_with": {}}], ids=str)
def test_malformed_statistics_are_an_error(checkpoint: Path, tmp_path: Path, entry: Any) -> None:
    path = edited(checkpoint, tmp_path / "out", lambda modules: modules.update({LAST: entry}))
    with pytest.raises(LLMInt8Error, match=f"{LAST}: malformed statistics"):
        runtime.load(path)
    path = edited(checkpoint, tmp_path / "list", lambda modules: modules.update({LAST: []}))
    with pytest.raises(CheckpointError, match=rf"^E16 .*{MANIFEST}: modules: '{LAST}' is '\[\]', expected an object"):
        runtime.load(path)
    (path / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=MANIFEST):
        runtime.load(path)
