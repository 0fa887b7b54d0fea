"""A model in memory becomes int8: what comes of it is what a conversion of its checkpoint gives, to the bit."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.multiprocessing.reductions import StorageWeakRef

from llmint8 import converter, runtime
from llmint8.converter.model.names import module_names
from llmint8.formats import SourceError, check_values, open_checkpoint, read_manifest
from llmint8.runtime.commands.main import main
from llmint8.runtime.model import on_the_fly

pytestmark = pytest.mark.usefixtures("quiet_transformers")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
HOW: dict[str, Any] = {"outliers": "top-k=4", "calibration_tokens": 48}
TOKENS = torch.arange(3, 19)[None]


def tiny(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    common = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "dtype": dtype}
    model: Any = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **common, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=36, n_layer=2, n_head=2, **common)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, **common, num_key_value_heads=2, num_local_experts=4)
        ),
        "gpt-oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **SIZES,
                **common,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=4,
                layer_types=["full_attention"] * 2,
            )
        ),
    }[name]()
    return model.to(dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("llama") / "source"
    tiny("llama", torch.bfloat16).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def assert_same(model: Any, converted: Path, saved: Path) -> None:
    """Compare a model with a converted checkpoint, tensors and statistics, and what is saved of it, too."""
    expected = runtime.load(converted)
    states = model.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert torch.equal(logits(model), logits(expected))
    for name, layer in model.named_modules():
        if not isinstance(layer, (runtime.Int8Linear, runtime.KBitLinear)):
            continue
        other = expected.get_submodule(name)
        assert repr(layer) == repr(other)
        assert (layer.name, layer.kept_limit, layer.training) == (name, other.kept_limit, False)
    names = open_checkpoint(converted).tensors
    assert module_names(model, names) == module_names(expected, names)
    model.save_pretrained(saved)
    assert check_values(open_checkpoint(saved)) == []
    assert CliRunner().invoke(main, ["verify", str(saved)]).exit_code == 0
    assert open_checkpoint(saved).quantization == open_checkpoint(converted).quantization
    before, after = read_manifest(converted), read_manifest(saved)
    assert (after.modules, after.tensors.keys()) == (before.modules, before.tensors.keys())
    for name, entry in after.tensors.items():
        assert entry.sha256 == before.tensors[name].sha256, name
    assert torch.equal(logits(runtime.load(saved, verify=True)), logits(expected))


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float16, {"format": 2, "rotate": True}),
        ("gpt2", torch.float32, {"skip": ["h.0.mlp"]}),
        ("gpt2", torch.bfloat16, {"format": 2, "rounding": "gptq"}),
        ("llama", torch.float32, {"outliers": "none"}),
        ("mixtral", torch.bfloat16, {"format": 2}),
        ("mixtral", torch.float16, {}),
        ("gpt-oss", torch.bfloat16, {"format": 2, "rotate": True}),
        ("mixtral", torch.bfloat16, {"format": 2, "bits": 3, "outliers": "proxy=0.1"}),
        ("gpt2", torch.float16, {"format": 2, "bits": 4, "block_size": 32, "rounding": "gptq"}),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else " ".join(map(str, value)) or "format 1",
)
def test_it_is_what_a_conversion_gives(name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    tiny(name, dtype).save_pretrained(tmp_path / "source")
    options = {**HOW, **options}
    converter.convert(tmp_path / "source", tmp_path / "out", **options)
    model = load(tmp_path / "source")
    assert runtime.quantize(model, **options) is model
    assert_same(model, tmp_path / "out", tmp_path / "saved")
    model = load(tmp_path / "source", quantization_config=runtime.Int8Config(**options))
    assert_same(model, tmp_path / "out", tmp_path / "again")


def test_a_model_that_nobody_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = runtime.quantize(tiny("llama", torch.float32).eval(), **HOW)
    assert any("calibrated with random token ids" in line for line in caplog.messages)
    model.save_pretrained(tmp_path)
    assert read_manifest(tmp_path).source["name"] == "LlamaForCausalLM"
    assert torch.equal(logits(runtime.load(tmp_path, verify=True)), logits(model))
    model.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_a_weight_is_forgotten_before_the_next_is_quantized(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(source, dtype=torch.float32)  # cast, so it is in memory of its own
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    held = [StorageWeakRef(module.weight.untyped_storage()) for module in linear if module is not model.lm_head]
    alive = []
    round_to_nearest = on_the_fly.round_to_nearest

    def counting(*arguments: Any) -> Any:
        alive.append(sum(not storage.expired() for storage in held))
        return round_to_nearest(*arguments)

    monkeypatch.setattr(on_the_fly, "round_to_nearest", counting)
    del linear
    runtime.quantize(model, **HOW)
    assert alive == list(range(14, 0, -1))
    assert all(storage.expired() for storage in held)


def with_tokenizer(source: Path, path: Path) -> Any:
    words = Tokenizer(WordLevel({"<unk>": 0, **{word: 3 + i for i, word in enumerate(WORDS)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    load(source).save_pretrained(path)
    return tokenizer


WORDS = "the of and a to in is it that was for on are as with".split()  # noqa: SIM905


@pytest.mark.parametrize("given", [True, False], ids=["given", "beside the source"])
def test_the_text_is_that_of_the_conversion(
    source: Path, tmp_path: Path, given: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_tokenizer(source, tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS) * 4)
    converter.convert(tmp_path / "source", tmp_path / "out", calibration=text, **HOW)
    model = load(source if given else tmp_path / "source")
    runtime.quantize(model, text, tokenizer=tokenizer if given else None, **HOW)
    assert not any("random" in line for line in caplog.messages)
    model.save_pretrained(tmp_path / "saved")
    found, expected = (open_checkpoint(tmp_path / name).quantization for name in ("saved", "out"))
    assert found.calibration == expected.calibration
    assert read_manifest(tmp_path / "saved").modules == read_manifest(tmp_path / "out").modules


def test_token_ids_are_shown_as_they_are(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    model = runtime.quantize(load(source), ids, outliers="top-k=4")
    model.save_pretrained(tmp_path)
    calibration = open_checkpoint(tmp_path).quantization.calibration
    assert calibration == {"text": "token ids", "text_sha256": None, "tokens": 48, "layers": 14}
    # The step that the largest kept input of each layer sets is that of these tokens.
    first = model.model.layers[0].self_attn.q_proj
    plain = load(source).float()
    with torch.no_grad():
        x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(ids))
    kept = [dim for dim in range(64) if dim not in first.outlier_dims.tolist()]
    assert first.kept_limit == pytest.approx(float(x[..., kept].abs().max()), rel=1e-5)


def test_layers_that_no_token_reaches_search_in_format_1(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **named: Any) -> Any:
        raise ValueError("no more")

    model = load(source)
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", fails)
    runtime.quantize(model, **HOW)
    modes = {name: layer.outliers for name, layer in model.named_modules() if isinstance(layer, runtime.Int8Linear)}
    assert modes.pop("model.layers.0.self_attn.q_proj") == "static"
    assert modes["model.layers.1.mlp.up_proj"] == "dynamic"


def test_where_accelerate_moves_inputs_it_goes_on(source: Path) -> None:
    model = load(source)
    hook = AlignDevicesHook("cpu", io_same_device=True)
    add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
    runtime.quantize(model, **HOW)
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook
    runtime.dequantize(model)
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook


def test_what_cannot_be_quantized_is_as_it_was(source: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    before = copy.deepcopy(model)
    with pytest.raises(SourceError, match=r"^LlamaForCausalLM: .*1\.mlp\.down_proj\.weight: holds NaN.*; skip=\['"):
        runtime.quantize(model, **HOW)
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert not hasattr(model, "hf_quantizer")
    runtime.quantize(model, skip=["1.mlp.down"], **HOW)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    with pytest.raises(SourceError, match=r"^LlamaForCausalLM: quantized already$"):
        runtime.quantize(model)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (
            None,
            {"load_in_8bit": True},
            "^load_in_8bit: no option of quantize, which takes bits, block_size",
        ),
        (None, {"bits": 4}, "--bits 4 takes --format 2"),
        (None, {"outliers": "many"}, "^outliers 'many', expected none"),
        (None, {"rotate": True}, "--rotate takes --format 2"),
        (torch.ones(3, dtype=torch.int64), {}, r"^calibration is torch.int64 \[3\], expected int64 token ids"),
        (torch.ones(1, 3), {}, r"^calibration is torch.float32 \[1, 3\]"),
        (torch.tensor([[3, 97]]), {}, "^calibration has token ids from 3 to 97, expected 0 to 96$"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_nobody_can_ask_for(source: Path, calibration: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.quantize(load(source), calibration, **options)
    if options:
        with pytest.raises(ValueError, match=message):  # before anything is loaded
            runtime.Int8Config(calibration, **options)


def test_what_is_no_model_in_memory(source: Path) -> None:
    with pytest.raises(SourceError, match=r"^dict: not a transformers model"):
        runtime.quantize({})
    with pytest.raises(SourceError, match=r"on the meta device.*; load the model without offloading$"):
        runtime.quantize(load(source, device_map={"": "disk"}))

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    with pytest.raises(SourceError, match=r"^Own: not a class of transformers that its tensors fill; save it"):
        runtime.quantize(Own(load(source).config), **HOW)


def test_the_hub_gets_the_manifest_too(source: Path, tmp_path: Path, hub: Any) -> None:
    model = runtime.quantize(load(source), **HOW)
    model.push_to_hub("alice/tiny")
    again = runtime.load("alice/tiny", verify=True)
    assert torch.equal(logits(again), logits(model))


def test_it_is_told_how_it_runs(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmint8")
    runtime.quantize(load(source), **HOW)
    assert any(
        line.startswith("14 Int8Linear layers, outliers static, activation zeropoint") for line in caplog.messages
    )
