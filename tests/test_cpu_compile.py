"""`load(compile=True)`: the same text, and one notice where it cannot be."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, runtime
from llmint8.runtime.model import compiled


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.5, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory / "source")
    converter.convert(directory / "source", directory / "out", outliers="top-k=4", calibration_tokens=32)
    return directory / "out"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def text_of(model: Any, tokens: int = 8) -> list[int]:
    prompt = torch.tensor([[3, 4, 5]])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    found: list[int] = out[0].tolist()
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "llmint8" and r.levelno == logging.WARNING]


def test_a_compiled_model_writes_the_same_text(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    # The graph is what is ours; that Inductor turns it into C++ takes long, and is shown by the next test.
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: backend(graph, inputs))
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    expected = text_of(runtime.load(checkpoint), 24)
    model = runtime.load(checkpoint, compile=True)
    assert compiled.is_compiled(model)
    assert text_of(model, 24) == expected
    assert len(graphs) == 1  # the whole forward pass, and once for all tokens
    assert warnings(caplog) == []


def test_a_compiled_model_is_saved_as_any_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    model = runtime.load(checkpoint, compile=True)
    model.generation_config.max_new_tokens = 7
    repr(model.generation_config)
    model.save_pretrained(tmp_path / "saved")
    assert compiled.is_compiled(model)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert not saved.keys() & {"cache_implementation", "compile_config"}
    again = runtime.load(tmp_path / "saved")
    assert not compiled.is_compiled(again)
    assert again.generation_config.cache_implementation is None
    assert text_of(again) == text_of(runtime.load(checkpoint))


@pytest.mark.skipif(compiled._cpp_compiler() is None, reason="needs a C++ compiler")
def test_inductor_compiles_the_layer() -> None:
    layer = runtime.Int8Linear.from_linear(torch.nn.Linear(64, 24).requires_grad_(False), torch.tensor([3, 9]))
    layer.activation = "zeropoint"
    x = torch.randn(1, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_without_a_compiler_there_is_one_notice(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = runtime.load(checkpoint, compile=True)
    assert not compiled.is_compiled(model)
    assert text_of(model) == text_of(runtime.load(checkpoint))
    assert len(warnings(caplog)) == 1
    assert "C++ compiler" in warnings(caplog)[0]


def test_the_dynamic_search_is_compiled_as_one_operator() -> None:
    layer = runtime.Int8Linear.from_linear(torch.nn.Linear(64, 24).requires_grad_(False))
    layer.configure(outliers="dynamic", activation="zeropoint")
    with torch.no_grad():
        graph = torch.export.export(layer, (torch.randn(2, 64),)).graph
    assert torch.ops.llmint8.dynamic_int8_linear.default in {node.target for node in graph.nodes}
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for outliers in (0, 1, 5):  # their number is no size in the graph
        x = torch.randn(2, 64).clamp(-3, 3)
        x[:, :outliers] = 9
        torch.testing.assert_close(compiled_layer(x), layer(x))


def test_the_dynamic_search_is_no_obstacle_but_on_devices_without_kernels(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    model = runtime.load(checkpoint, outliers="dynamic")
    assert compiled._obstacle(model) is None
    assert compiled._obstacle(model.to("meta")) == (
        "outliers='dynamic' makes tensors whose size depends on the input, on meta"
    )


def test_a_model_without_static_cache_is_not_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20))
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False, raising=False)
    assert not compiled.compile_decode(model)
    assert "MambaForCausalLM" in warnings(caplog)[0]


def test_where_inductor_fails_the_graph_runs_as_it_is(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: Any, inputs: Any, options: Any) -> Any:
        raise RuntimeError("no such header\nand more")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    model = runtime.load(checkpoint, compile=True)
    assert text_of(model) == text_of(runtime.load(checkpoint))
    assert warnings(caplog) == ["Not compiled, generating as without: RuntimeError: no such header"]
