"""`benchmarks/gpu_generate.py` with tiny models on the CPU: everything but the clock and the memory of a GPU."""

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter
from llmint8.formats import open_checkpoint
from llmint8.runtime import Int8Linear
from llmint8.runtime.model import compiled

pytestmark = pytest.mark.soak
CPU = torch.device("cpu")
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {
    "opt": transformers.OPTConfig(word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=64, **SIZES),
    "llama": transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=1, **SIZES),
}
FIELDS = ["device", "model", "batch", "variant", "tokens_per_s", "first_token_ms", "peak_memory_gb"]


@pytest.fixture(scope="module")
def scripts(benchmark: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    return benchmark("gpu_generate"), benchmark("random_models")


@pytest.fixture
def gpu_generate(scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with tiny models, short texts, and a GPU of 1 GB on which 3 MB are in use and 7 MB at most."""
    script = scripts[0]
    for name, value in {"PROMPT_TOKENS": 5, "TOKENS": 6, "ROUNDS": 2, "PROFILED_TOKENS": 4, "CONFIGS": TINY}.items():
        monkeypatch.setattr(script, name, value)
    fakes: dict[str, Any] = {"memory_allocated": 3e6, "max_memory_allocated": 7e6, "reset_peak_memory_stats": None}
    fakes["get_device_properties"] = SimpleNamespace(total_memory=10**9)
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    return script


@pytest.fixture
def quick_compiler(gpu_generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: Inductor takes long, and whether its code ran is tested apart."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(gpu_generate, "check_compiled", lambda run, prompt: "checked")


def run(script: ModuleType, file: Path, model: str, batches: list[int], variants: list[str]) -> list[dict[str, Any]]:
    options = Namespace(models=[model], batches=batches, variants=variants)
    rows: list[dict[str, Any]] = script.run(options, CPU, "X", file)
    assert rows == (json.loads(file.read_text()) if file.exists() else [])
    return rows


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_int8_models_compute_what_the_16_bit_model_does(config: Any, scripts: tuple[ModuleType, ModuleType]) -> None:
    models = scripts[1]
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = models.build(config, "fp16", CPU)(tokens).logits.float()
        for kind in ("ours", "bnb"):
            if kind == "bnb":
                pytest.importorskip("bitsandbytes")
            found = models.build(config, kind, CPU)(tokens).logits.float()
            assert 0 < (found - expected).norm() < (0.02 if kind == "ours" else 0.1) * expected.norm()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_a_16_bit_model_is_what_transformers_makes_of_its_weights(
    config: Any, scripts: tuple[ModuleType, ModuleType]
) -> None:
    found = scripts[1].build(config, "fp16", CPU)
    expected = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    expected.load_state_dict(found.state_dict())
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert found(tokens).logits.isfinite().all()


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_int8_layers_are_those_of_a_conversion(
    config: Any, scripts: tuple[ModuleType, ModuleType], tmp_path: Path, quiet_transformers: None
) -> None:
    models = scripts[1]
    models.build(config, "fp16", CPU).save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="none")
    model = models.build(config, "ours", CPU)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    expected = open_checkpoint(tmp_path / "out").records
    assert {name.removeprefix("model.") for name in layers} == {name.removeprefix("model.") for name in expected}
    assert all(layer.activation == "zeropoint" for layer in layers.values())
    assert {layer.outlier_weight.shape[1] for layer in layers.values()} == {16}


def test_the_models_have_the_sizes_in_their_names(scripts: tuple[ModuleType, ModuleType]) -> None:
    models = scripts[1]
    sizes = {
        name: sum(each.numel() for each in models.shape_of(config).parameters()) / 1e9
        for name, config in models.CONFIGS.items()
    }
    assert sizes == pytest.approx({"OPT-6.7B": 6.66, "Llama-3-8B": 8.03, "OPT-30B": 29.98}, abs=0.01)


@pytest.mark.usefixtures("quick_compiler")
def test_every_variant_generates_and_has_a_row(
    gpu_generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in gpu_generate.VARIANTS if "bnb" not in name or importlib.util.find_spec("bitsandbytes")]
    file = tmp_path / "results" / "x.json"
    rows = run(gpu_generate, file, "llama", [3], names)
    assert all(list(row) == FIELDS for row in rows)
    assert [(row["batch"], row["variant"]) for row in rows] == [(3, name) for name in names]
    assert all((row["device"], row["model"], row["peak_memory_gb"]) == ("X", "llama", 0.004) for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["first_token_ms"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert "together on the device: fp16, ours" in out
    assert out.count("checked") == 2
    assert "not measured" not in out


@pytest.mark.usefixtures("quick_compiler")
def test_eager_and_compiled_variants_share_a_model_and_write_the_same_text(
    gpu_generate: ModuleType, scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, texts = [], []

    def compile(graph: Any, *rest: object) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile)
    model = scripts[1].build(TINY["opt"], "ours", CPU)
    eager, graph = (gpu_generate.runner(model, gpu_generate.VARIANTS[f"ours-{how}"]) for how in ("eager", "compiled"))
    for run, compiled_graphs in ((eager, 0), (graph, 1), (eager, 1), (graph, 1)):
        tokens: list[Any] = []
        monkeypatch.setattr("generation.Clock.put", lambda clock, value, tokens=tokens: tokens.append(value.tolist()))
        run(torch.arange(10).view(2, 5), 6)
        texts.append(tokens)
        assert len(graphs) == compiled_graphs
    assert [len(tokens) for tokens in texts] == [7] * 4  # the prompt, then 6 times a token of both sequences
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_bitsandbytes_gets_the_threshold_of_the_variant(
    gpu_generate: ModuleType, scripts: tuple[ModuleType, ModuleType]
) -> None:
    pytest.importorskip("bitsandbytes")
    model = scripts[1].build(TINY["llama"], "bnb", CPU)
    runs = {name: gpu_generate.runner(model, gpu_generate.VARIANTS[name]) for name in ("bnb6-eager", "bnb0-eager")}
    for name, threshold in (("bnb6-eager", 6.0), ("bnb0-eager", 0.0), ("bnb6-eager", 6.0)):
        runs[name](torch.ones(1, 5, dtype=torch.long), 3)
        assert {layer.state.threshold for layer in model.modules() if hasattr(layer, "state")} == {threshold}


def test_what_fails_is_named_and_leaves_no_row(
    gpu_generate: ModuleType,
    scripts: tuple[ModuleType, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def out_of_memory(linear: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(scripts[1].CONVERSIONS, "bnb", out_of_memory)
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: None)
    names = ["fp16-compiled", "bnb0-eager", "fp16-eager"]
    rows = run(gpu_generate, tmp_path / "x.json", "llama", [2], names)
    assert [row["variant"] for row in rows] == ["fp16-eager"]
    assert "no C++ compiler" in caplog.text
    lines = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert lines == [
        "llama, bnb: not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "llama, batch 2, fp16-compiled: not measured: RuntimeError: it cannot be compiled, as the warning says",
    ]


def test_a_variant_that_fails_later_keeps_what_was_measured(
    gpu_generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def by_transformers(model: Any, prompt: Any, tokens: int) -> list[float]:
        calls.append(tokens)
        if len(calls) in (3, 7):  # fp16 in its first measured turn, and later the other one in its second
            raise RuntimeError("an illegal memory access")
        return [float(number) for number in range(tokens)]

    monkeypatch.setattr(gpu_generate, "by_transformers", by_transformers)
    monkeypatch.setattr(gpu_generate, "ROUNDS", 5)
    rows = run(gpu_generate, tmp_path / "x.json", "llama", [4], ["fp16-eager", "ours-eager"])
    assert len(calls) == 7
    assert [(row["variant"], row["tokens_per_s"]) for row in rows] == [("ours-eager", 4.0)]


def test_rows_join_those_of_earlier_runs(
    gpu_generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, step = tmp_path / "x.json", 1.0

    def by_transformers(model: Any, prompt: Any, tokens: int) -> list[float]:
        assert prompt.shape[1] == 5
        return [step * number for number in range(tokens)]

    monkeypatch.setattr(gpu_generate, "by_transformers", by_transformers)
    run(gpu_generate, file, "llama", [1, 2], ["fp16-eager"])
    run(gpu_generate, file, "opt", [1], ["ours-eager"])
    step = 0.5
    rows = run(gpu_generate, file, "llama", [2], ["fp16-eager", "ours-eager"])
    found = {(row["model"], row["batch"], row["variant"]): row["tokens_per_s"] for row in rows}
    assert found == {
        ("llama", 1, "fp16-eager"): 1,
        ("llama", 2, "fp16-eager"): 4,
        ("opt", 1, "ours-eager"): 1,
        ("llama", 2, "ours-eager"): 4,
    }


def test_a_row_has_the_medians_of_all_turns_but_the_first(gpu_generate: ModuleType) -> None:
    turns = [
        gpu_generate.Turn(*turn) for turn in ((9, 9, 1, 8e9), (0.1, 0, 5, 2e9), (0.3, 0, 7, 3e9), (0.2, 0, 90, 1e9))
    ]
    assert gpu_generate.medians("fp16-eager", 8, turns) == {
        "batch": 8,
        "variant": "fp16-eager",
        "tokens_per_s": 56,
        "first_token_ms": 200,
        "peak_memory_gb": 8,
    }


def test_speed_counts_from_the_second_token_and_memory_without_other_models(
    gpu_generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    turn = gpu_generate.take_turn(lambda prompt, tokens: [102.0, 107.0, 107.5, 108.0], torch.ones(1, 5), 2_000_000)
    assert turn == (2.0, 5.0, 2.0, 6_000_000)


@pytest.mark.skipif(compiled._cpp_compiler() is None, reason="needs a C++ compiler")
def test_steps_in_compiled_code_are_counted(gpu_generate: ModuleType) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    fast = torch.compile(double)

    def run(prompt: torch.Tensor, tokens: int, compiled_steps: int) -> None:
        for number in range(tokens - 1):
            (fast if number < compiled_steps else double)(prompt)

    said = gpu_generate.check_compiled(lambda prompt, tokens: run(prompt, tokens, 3), torch.ones(2))
    assert said == "3 steps made 3 calls of compiled code and 0 of CUDA graphs"
    with pytest.raises(RuntimeError, match="compiled code ran in 2 of 3 steps"):
        gpu_generate.check_compiled(lambda prompt, tokens: run(prompt, tokens, 2), torch.ones(2))


def test_a_compiled_variant_that_runs_as_it_is_has_no_row(
    gpu_generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(graph: Any, inputs: Any, options: Any) -> Any:
        raise RuntimeError("no such header")

    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor, "compile", fail)
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    assert run(gpu_generate, tmp_path / "x.json", "opt", [1], ["ours-compiled"]) == []
    assert "ours-compiled: not measured: RuntimeError: compiled code ran in 0 of 3 steps" in capsys.readouterr().out


def test_models_take_turns_where_they_fit_together(scripts: tuple[ModuleType, ModuleType]) -> None:
    kinds, config, models = ["fp16", "ours", "bnb"], TINY["opt"], scripts[1]
    size = sum(each.nbytes for each in models.shape_of(config).parameters())
    expected = {
        2.3: [kinds],
        1.7: [["fp16", "ours"], ["bnb"]],
        1.3: [["fp16"], ["ours", "bnb"]],
        0.1: [[k] for k in kinds],
    }
    for room, companies in expected.items():
        assert list(models.companies(config, kinds, room * size)) == companies


def test_the_table_has_the_ratios_to_16_bit_and_to_bitsandbytes(gpu_generate: ModuleType) -> None:
    speeds = {"fp16-compiled": 100.0, "ours-compiled": 170.0, "bnb6-eager": 20.0}
    rows = [dict(zip(FIELDS, ("X", "OPT-30B", 1, *each, 3.0, 4.0), strict=True)) for each in speeds.items()]
    rows += [rows[1] | {"batch": 8}]
    found = [line.split()[2:4] + line.split()[-2:] for line in gpu_generate.table(rows)][1:]
    assert found == [
        ["fp16-compiled", "100.0", "1.00", "5.00"],
        ["ours-compiled", "170.0", "1.70", "8.50"],
        ["bnb6-eager", "20.0", "0.20", "1.00"],
        ["ours-compiled", "170.0", "-", "-"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no CUDA device"),
        (["--models", "OPT-7B"], "--models: no OPT-7B; there are OPT-6.7B, Llama-3-8B, OPT-30B"),
        (["--variants", "ours-eager,ours"], "--variants: no ours; there are fp16-eager, fp16-compiled, ours-eager"),
        (["--batches", "1,x"], "--batches is '1,x', expected numbers"),
    ],
    ids=["no GPU", "model", "variant", "batch"],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    options: list[str],
    message: str,
    scripts: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_generate.py", *options])
    with pytest.raises(SystemExit) as end:
        scripts[0].main()
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
