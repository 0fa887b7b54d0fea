"""Outlier columns: found where they were planted, chosen by what they do to the error, the same every time."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llmint8 import converter, formats, runtime
from llmint8.converter.coding import Int8Grid, round_to_nearest
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.outliers.choosing import select
from llmint8.converter.outliers.criterion import Criterion
from llmint8.converter.outliers.measuring import InputGroup, InputStatistics, column_norms, error_curve
from llmint8.converter.planning import options
from llmint8.kernels.reference import dequantize_weight, quantize_rows, quantize_weight

_SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
PLANTED = {0: [3, 40], 1: [17], 2: [5, 17, 63]}  # block -> dimensions with a large gain in its norms


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def _gpt2():
    config = {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))


NORMS = {  # model, block, names of the norms in it, and the layers that read them
    "llama": (
        _llama,
        "model.layers.{}",
        {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
        | {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]},
    ),
    "gpt2": (_gpt2, "transformer.h.{}", {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]}),
}


@pytest.fixture(params=NORMS)
def planted(request, tmp_path):
    """A model whose norms blow up some dimensions; returns its directory, block pattern and norms."""
    make, block, norms = NORMS[request.param]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for index, dims in PLANTED.items():
            for norm in norms:
                model.get_submodule(f"{block.format(index)}.{norm}").weight[dims] = 30.0
    model.half().save_pretrained(tmp_path / "source")
    return tmp_path / "source", block, norms


@pytest.mark.parametrize("criterion", ["threshold=8.0", "systematic"])
def test_planted_dims_are_the_ones_found(criterion, planted, tmp_path):
    source, block, norms = planted
    converter.convert(source, tmp_path / "out", outliers=criterion)
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    for index, dims in PLANTED.items():
        for layer in [layer for layers in norms.values() for layer in layers]:
            name = f"{block.format(index)}.{layer}"
            assert checkpoint.read(f"{name}.outlier_dims").tolist() == dims, name


def test_a_budget_takes_the_planted_dims_first(planted, tmp_path):
    source, block, norms = planted
    report = converter.convert(source, tmp_path / "out", outliers="top-k=3")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    counts = checkpoint.quantization.outliers
    assert 0 < sum(counts.values()) <= 3 * len(counts)
    assert report.uncalibrated == []
    for index, dims in PLANTED.items():
        for layer in [layer for layers in norms.values() for layer in layers]:
            assert set(dims) <= set(checkpoint.read(f"{block.format(index)}.{layer}.outlier_dims").tolist())


def test_outlier_columns_are_the_sources_bits_and_help(planted, tmp_path):
    source, _, _ = planted
    converter.convert(source, tmp_path / "out", outliers="top-k=4")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    for name, count in checkpoint.quantization.outliers.items():
        dims, columns = checkpoint.read(f"{name}.outlier_dims"), checkpoint.read(f"{name}.outlier_weight")
        assert len(dims) == count
        module = model.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert torch.equal(columns, weight[:, dims.long()])
    assert formats.check_values(checkpoint) == []

    tokens = torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.float()(tokens).logits
        errors = {
            mode: (runtime.load(tmp_path / "out", dtype=torch.float32, outliers=mode)(tokens).logits - expected).norm()
            for mode in ("static", "none")
        }
    assert errors["static"] < errors["none"] / 2


def test_layers_that_share_an_input_share_their_dims(planted, tmp_path):
    source, block, norms = planted
    converter.convert(source, tmp_path / "out", outliers="top-k=4")
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    modules = formats.read_manifest(tmp_path / "out").modules
    for index in PLANTED:
        for layers in norms.values():
            names = [f"{block.format(index)}.{layer}" for layer in layers]
            dims = [checkpoint.read(f"{name}.outlier_dims").tolist() for name in names]
            assert all(found == dims[0] for found in dims)
            assert {modules[name]["shares_input_with"] for name in names[1:]} <= {names[0]}


def test_t5_layers_that_read_the_encoder_share_their_dims(tmp_path):
    """Every cross-attention reads the same states, blocks apart."""
    config = transformers.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4)
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out", outliers="top-k=4")
    modules = formats.read_manifest(tmp_path / "out").modules
    name = "decoder.block.{}.layer.1.EncDecAttention.{}"
    sharing = [modules[name.format(i, part)].get("shares_input_with") for i in range(3) for part in ("k", "v")]
    assert sharing == [None] + [name.format(0, "k")] * 5


def test_same_input_same_bytes(planted, tmp_path):
    source, _, _ = planted
    for out in ("a", "b"):
        converter.convert(source, tmp_path / out)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_behind_experts_are_calibrated(dtype, tmp_path):
    """The experts are fused and stay in 16 bit; the pass has to go through them to reach the next block."""
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).to(dtype).save_pretrained(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    assert report.uncalibrated == []
    assert not any("ended early" in notice for notice in report.notices)
    counts = formats.open_checkpoint(tmp_path / "out").quantization.outliers
    assert sum(counts[f"model.layers.2.self_attn.{part}_proj"] for part in "qkvo") > 0


def test_layers_that_the_pass_does_not_reach_are_converted_and_listed(tmp_path, monkeypatch):
    _llama().half().save_pretrained(tmp_path / "source")
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", None)  # calling it fails
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    assert any("calibration pass ended early (TypeError" in notice for notice in report.notices)
    reached = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    assert set(report.uncalibrated) == formats.open_checkpoint(tmp_path / "out").records.keys() - reached
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert {name for name, count in checkpoint.quantization.outliers.items() if count} == reached
    assert formats.check_values(checkpoint) == []


def test_inputs_that_are_not_finite_are_said_once(tmp_path):
    model = _llama().half()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    model.save_pretrained(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    (notice,) = [notice for notice in report.notices if "NaN or infinity" in notice]
    assert notice.startswith("the input of model.layers.1.self_attn.q_proj and ")
    assert len(report.uncalibrated) == report.layers - 7
    assert formats.check_values(formats.open_checkpoint(tmp_path / "out")) == []


def test_calibration_text_and_its_provenance(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    _llama().half().save_pretrained(tmp_path / "source")
    model = models.WordLevel({chr(code): code for code in range(128)}, unk_token="?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "source")
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n\n{"text": "de", "more": 1}\n')
    converter.convert(tmp_path / "source", tmp_path / "a", calibration=tmp_path / "text.jsonl")
    calibration = formats.open_checkpoint(tmp_path / "a").quantization.calibration
    assert (calibration["text"], calibration["tokens"]) == ("text.jsonl", len("abc\n\nde"))
    report = converter.convert(tmp_path / "source", tmp_path / "b", calibration_tokens=100)
    calibration = formats.open_checkpoint(tmp_path / "b").quantization.calibration
    assert (calibration["text"], calibration["tokens"]) == ("packaged", 64)  # one row of max_position_embeddings
    assert report.notices == []
    converter.convert(tmp_path / "source", tmp_path / "c", calibration_tokens=130)
    assert formats.open_checkpoint(tmp_path / "c").quantization.calibration["tokens"] == 128

    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(formats.SourceError, match=r"empty\.txt: holds no text"):
        converter.convert(tmp_path / "source", tmp_path / "d", calibration=tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"txt": "abc"}\n')
    with pytest.raises(formats.SourceError, match=r"bad\.jsonl: .*`text`"):
        converter.convert(tmp_path / "source", tmp_path / "d", calibration=tmp_path / "bad.jsonl")
    assert not (tmp_path / "d").exists()


def test_statistics_stand_in_the_manifest(planted, tmp_path):
    source, block, norms = planted
    converter.convert(source, tmp_path / "out")
    first = f"{block.format(2)}.{next(iter(norms.values()))[0]}"
    found = json.loads((tmp_path / "out" / "llmint8_manifest.json").read_text())["modules"][first]
    assert set(found["dims"][:3]) == set(PLANTED[2])
    assert found["absmax"] == sorted(found["absmax"], reverse=True)
    assert found["outlier_features"] == 3
    assert found["ks"][0] == 0
    assert len(found["ks"]) == len(found["errors"])


@pytest.mark.parametrize(("outliers", "said"), [("top-k=18", True), ("top-k=17", False)])
def test_a_budget_that_no_layer_can_spend_is_said(outliers, said, tmp_path):
    _llama().half().save_pretrained(tmp_path / "source")
    options = converter.Options(outliers=outliers)
    plan = converter.make_plan(resolve(str(tmp_path / "source"), None, "source"), tmp_path / "out", options)
    # Six layers of a block have 64 columns, one has 96.
    expected = f"--outliers {outliers} is more than there can be: a layer keeps 512 columns at most, and no more than "
    expected += "one in 4, which is 17.1429 on average here"
    assert (expected in plan.selection.notices) is said


def _statistics(criterion, x, weights):
    statistics = InputStatistics(criterion, formats.Scheme("zeropoint"))
    for number, weight in enumerate(weights):
        norms = column_norms(weight, *round_to_nearest(weight, formats.Scheme()))
        statistics.see(f"layer{number}", x, x.view_as(x), norms, functional.linear(x, weight))
    return statistics.finish()


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
def test_error_curve_predicts_the_error_of_the_layer(activation, group):
    torch.manual_seed(0)
    x = torch.randn(128, 192) * torch.exp(torch.randn(192))
    weight = torch.randn(80, 192)
    values, absmax = quantize_weight(weight)
    out = functional.linear(x, weight)
    dims = x.abs().amax(0).argsort(descending=True)
    norms = column_norms(weight, values, Int8Grid(absmax))
    ks, errors = error_curve(x, [norms], [out.square().sum(1)], dims[:48], formats.Scheme(activation, group))
    assert ks == [0, 2, 4, 8, 12, 16, 24, 32, 48]
    for k, predicted in zip(ks, errors, strict=True):
        restored = dequantize_weight(values, absmax)
        restored[:, dims[:k]] = weight[:, dims[:k]]
        rows = quantize_rows(x, dims[:k], activation, group).dequantize()
        rows[:, dims[:k]] = x[:, dims[:k]]
        error = (functional.linear(rows, restored) - out).square().sum(1)
        energy = out.square().sum(1)
        measured = float((error / energy).mean() + error.sum() / energy.sum()) / 2
        assert predicted == pytest.approx(measured, rel=0.15)


def test_the_errors_are_those_of_the_groups_in_which_inputs_will_be_quantized(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_LLAMA | {"intermediate_size": 512})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    errors = {}
    for group in (64, 128, None):
        monkeypatch.setattr(options, "ACTIVATION_GROUP", group)
        out = tmp_path / str(group)
        converter.convert(tmp_path / "source", out)
        assert formats.open_checkpoint(out).quantization.scheme.activation_group == group
        for name, statistics in formats.read_manifest(out).modules.items():
            errors[group, name.rpartition(".")[2]] = statistics.get("errors")
    assert errors[64, "down_proj"][0] < errors[128, "down_proj"][0] < errors[None, "down_proj"][0]
    assert errors[64, "q_proj"] == errors[128, "q_proj"] == errors[None, "q_proj"]  # 64 dimensions are one group


def test_the_budget_goes_where_the_error_is():
    torch.manual_seed(0)
    spiky, flat = torch.randn(64, 128), torch.randn(64, 128)
    spiky[:, :24] *= 50
    groups = _statistics(Criterion("top-k", 8), spiky, [torch.randn(32, 128)])
    groups += _statistics(Criterion("top-k", 8), flat, [torch.randn(32, 128) for _ in range(2)])
    counts = select(groups, Criterion("top-k", 8))
    assert counts == [24, 0]
    assert sorted(groups[0].dims[:24].tolist()) == list(range(24))
    assert select(groups, Criterion("top-k", 32)) != counts


def test_a_budget_is_never_exceeded_and_counts_every_layer_of_a_group():
    generator = torch.Generator().manual_seed(0)
    groups = []
    for number in range(6):
        errors = torch.rand(5, generator=generator).sort(descending=True).values.tolist()
        layers = [f"{number}.{i}" for i in range(number % 3 + 1)]
        groups.append(
            InputGroup(layers, torch.arange(12), torch.zeros(12), torch.arange(12), {}, [0, 2, 4, 8, 12], errors)
        )
    total = sum(len(group.layers) for group in groups)
    for budget in (0.5, 1, 3, 7, 12):
        counts = select(groups, Criterion("top-k", budget))
        spent = sum(count * len(group.layers) for count, group in zip(counts, groups, strict=True))
        assert spent <= budget * total
        assert all(count in group.ks for count, group in zip(counts, groups, strict=True))
    assert all(count == 12 for count in select(groups, Criterion("top-k", 12)))


def test_systematic_passes_over_dims_that_are_large_only_once():
    x = torch.randn(100, 32)
    x[7, 4] = 1000.0  # the largest, in one position
    x[:, 9] = 8.0
    groups = _statistics(Criterion("systematic", None), x, [torch.randn(8, 32)])
    (count,) = select(groups, Criterion("systematic", None))
    assert groups[0].dims[groups[0].order[:count]].tolist() == [9]


def test_a_magnitude_that_only_rounds_to_the_threshold_is_none():
    x = torch.randn(100, 32).clamp(-3, 3)
    x[7, 4], x[7, 9] = 5.9999, 6.0
    criterion = Criterion("threshold", 6.0)
    groups = _statistics(criterion, x, [torch.randn(8, 32)])
    assert groups[0].statistics["absmax"][:2] == [6.0, 6.0]
    (count,) = select(groups, criterion)
    assert groups[0].dims[groups[0].order[:count]].tolist() == [9]


def test_a_share_that_only_rounds_to_six_percent_is_not_systematic():
    x = torch.zeros(50001, 8)
    x[:3000, 2], x[:3001, 5] = 8.0, 7.0
    groups = _statistics(Criterion("systematic", None), x, [torch.randn(4, 8)])
    assert groups[0].statistics["positions"][:2] == [0.06, 0.06002]
    (count,) = select(groups, Criterion("systematic", None))
    assert groups[0].dims[groups[0].order[:count]].tolist() == [5]


@torch.inference_mode()  # as the pass runs; elsewhere a view keeps the tensor that it is a view of
def test_an_input_is_not_held_longer_than_the_model_does():
    import gc
    import weakref

    statistics = InputStatistics(Criterion("top-k", 2), formats.Scheme("zeropoint"))
    references = []
    for number in range(5):
        x = torch.randn(16, 32)
        weight = torch.randn(8, 32)
        references.append(weakref.ref(x))
        norms = column_norms(weight, *round_to_nearest(weight, formats.Scheme()))
        statistics.see(str(number), x, x.view_as(x), norms, nn.functional.linear(x, weight))
        del x
        gc.collect()
    assert sum(reference() is not None for reference in references) == 0
    assert len(statistics.finish()) == 5
