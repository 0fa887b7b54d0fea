"""The class that the tensors of a checkpoint fill: found before anything is written, and the same for every loader."""

import copy
import json
import re
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmint8 import converter, formats, runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.converter.endings import Endings
from llmint8.converter.hub.card import Subject, new_card
from llmint8.converter.planning.leftovers import leftovers
from llmint8.formats.containers.tensors import TensorInfo
from llmint8.runtime.commands.main import main
from llmint8.runtime.model.pretrained import missing_parameters

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = transformers.LlamaConfig(**SMALL)
TIED = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
BERT, MPNET = transformers.BertConfig(**SMALL), transformers.MPNetConfig(**SMALL)
T5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
MIXTRAL = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
TOKENS = torch.arange(1, 25)[None]
Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


def make(path: Path, name: str, config: Any, named: Any = "", edit: Callable[[Tensors], Any] | None = None) -> Path:
    """Save a random model; `named` takes the place of its class in config.json, and `edit` changes its tensors."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(copy.deepcopy(config)).half().save_pretrained(path)  # some classes change it
    raw = json.loads((path / "config.json").read_text())
    raw["architectures"] = [named or name]
    if named is None:
        del raw["architectures"]
    (path / "config.json").write_text(json.dumps(raw))
    tensors = load_file(path / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def without(pattern: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        gone = [name for name in tensors if re.search(pattern, name)]
        assert gone
        for name in gone:
            del tensors[name]

    return edit


def renamed(pattern: str, replacement: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[re.sub(pattern, replacement, name)] = tensors.pop(name)

    return edit


def foreign_and_missing(tensors: Tensors) -> None:
    tensors["foo.weight"] = tensors.pop(Q)


def refused(path: Path, words: str) -> None:
    out = path.with_name("out")
    with pytest.raises(formats.SourceError, match=words) as caught:
        converter.convert(path, out, outliers="none")
    assert str(caught.value).isprintable()
    assert not out.exists()


# What no tensor fills


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (foreign_and_missing, f"{Q} is in no file, and LlamaForCausalLM needs it; is the checkpoint whole"),
        (without(r"model\.norm"), "model.norm.weight is in no file"),
        (without(r"layers\.1\."), r"layers\.1\.self_attn.q_proj.weight and 8 parameters more are in no file"),
    ],
)
def test_a_parameter_that_no_tensor_fills_is_named(edit: Any, words: str, tmp_path: Path) -> None:
    refused(make(tmp_path / "s", "LlamaForCausalLM", LLAMA, edit=edit), words)


def test_experts_of_which_parts_are_missing_are_named(tmp_path: Path) -> None:
    stack = r"model\.layers\.1\.mlp\.experts\.gate_up_proj"
    parts = {
        r"1\..*experts\.2\.w1": r" \(a part of it\) is",
        r"1\..*experts\.3\.": r" \(a part of it\) and 1 parameter more are",
    }
    parts[r"1\..*experts"] = " and 1 parameter more are"
    for number, (pattern, words) in enumerate(parts.items()):
        path = make(tmp_path / str(number) / "s", "MixtralForCausalLM", MIXTRAL, edit=without(pattern))
        refused(path, f"{stack}{words} in no file")


WRAPPERS = ["_orig_mod", "module", "base_model.model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_in_names_are_named_with_the_remedy(wrapper: str, tmp_path: Path) -> None:
    words = rf"has '{wrapper}\.' in its name: .* adds it; save "
    whole = make(tmp_path / "a" / "s", "LlamaForCausalLM", LLAMA, edit=renamed("^", f"{wrapper}."))
    refused(whole, words)
    layer = make(tmp_path / "b" / "s", "LlamaForCausalLM", LLAMA, edit=renamed(r"layers\.1\.", f"layers.1.{wrapper}."))
    refused(layer, words)


def test_two_wrappers_around_one_another_are_seen_through(tmp_path: Path) -> None:
    edit = renamed(r"layers\.1\.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
    refused(make(tmp_path / "s", "LlamaForCausalLM", LLAMA, edit=edit), "has '_fsdp_wrapped_module.' in its name")


def test_what_a_model_computes_itself_need_not_be_stored(tmp_path: Path) -> None:
    """Marian's sinusoids are parameters, and in no file."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.MarianConfig(
        vocab_size=96,
        d_model=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        decoder_start_token_id=0,
        **sizes,
    )
    path = make(tmp_path / "s", "MarianMTModel", config)
    assert not any("embed_positions" in name for name in formats.open_source(path).tensors)
    converter.convert(path, tmp_path / "out", outliers="none")
    assert type(runtime.load(tmp_path / "out")).__name__ == "MarianMTModel"


def test_a_damaged_part_is_not_taken_for_one_that_was_left_out(tmp_path: Path) -> None:
    wo = r"decoder\.block\.1\.layer\.2\.DenseReluDense\.wo\.weight"
    for number, name in enumerate(("T5ForConditionalGeneration", "T5Model")):
        path = make(tmp_path / str(number) / "s", name, T5, edit=without(wo))
        refused(path, f"{wo} is in no file, and {name} needs it")
    path = make(tmp_path / "s", "BertForSequenceClassification", BERT, edit=without(r"classifier\.weight"))
    refused(path, "classifier.weight is in no file")


# What is in no file and not needed


SPEECH = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32}
SPEECH |= {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
SEQ = {"vocab_size": 96, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
SEQ |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SPARED = {  # config, what is not stored
    "BertModel": (BERT, "pooler"),
    "RobertaModel": (transformers.RobertaConfig(**SMALL), "pooler"),
    "XLMRobertaModel": (transformers.XLMRobertaConfig(**SMALL), "pooler"),
    "AlbertModel": (transformers.AlbertConfig(**SMALL, embedding_size=16), "pooler"),
    "ViTModel": (transformers.ViTConfig(**VIT, patch_size=16), "pooler"),
    "Wav2Vec2ForCTC": (transformers.Wav2Vec2Config(**SPEECH), "masked_spec_embed"),
    "HubertForCTC": (transformers.HubertConfig(**SPEECH), "masked_spec_embed"),
    "WavLMForCTC": (transformers.WavLMConfig(**SPEECH), "masked_spec_embed"),
    "Dinov2Model": (transformers.Dinov2Config(**VIT, patch_size=16), "mask_token"),
    "PegasusForConditionalGeneration": (transformers.PegasusConfig(**SEQ, decoder_start_token_id=0), "embed_positions"),
    "MarianMTModel": (transformers.MarianConfig(**SEQ, decoder_start_token_id=0), "embed_positions"),
}


@pytest.mark.parametrize("name", SPARED)
def test_what_a_model_can_do_without_need_not_be_there(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, what = SPARED[name]

    def edit(tensors: Tensors) -> None:
        for key in [key for key in tensors if what in key]:  # of Marian none is saved
            del tensors[key]

    path = make(tmp_path / "s", name, config, edit=edit)
    report = converter.convert(path, tmp_path / "out", calibration_tokens=32)
    assert not report.uncalibrated
    computed = what == "embed_positions"
    assert any(what in notice and "in no file, and" in notice for notice in report.notices) is not computed
    assert formats.open_checkpoint(tmp_path / "out").config["architectures"] == [name]
    model = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert ("not needed" in caplog.text) is not computed
    assert missing_parameters(formats.open_checkpoint(tmp_path / "out")) == []
    original = getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()
    if what == "pooler":
        assert model.pooler is None
    for key, value in original.named_parameters():
        if what in key and what != "pooler":
            assert torch.equal(model.get_parameter(key), value if computed else torch.zeros_like(value))
    found, expected = (answer(one) for one in (model, original))
    assert (found - expected).norm() / expected.norm() < 0.05  # int8 in a tiny random model


def answer(model: Any) -> Tensor:
    torch.manual_seed(0)
    made = {"pixel_values": torch.randn(1, 3, 32, 32), "input_values": torch.randn(1, 4000)}
    if model.main_input_name == "input_ids":
        return outputs(model)
    with torch.no_grad():
        found: Tensor = model(**{model.main_input_name: made[model.main_input_name]})[0]
    return found


def test_a_body_without_a_pooler_under_a_heads_name_is_a_body(tmp_path: Path) -> None:
    path = make(tmp_path / "s", "BertModel", BERT, "BertForMaskedLM", without("pooler"))
    converter.convert(path, tmp_path / "out", outliers="none")
    assert type(runtime.load(tmp_path / "out")).__name__ == "BertModel"
    assert "pooler.dense" in formats.open_checkpoint(tmp_path / "out").quantization.skip_modules
    stock_agrees(tmp_path / "out", "AutoModel", None)


@pytest.mark.parametrize(
    ("name", "config", "gone"),
    [
        ("BertModel", BERT, r"pooler\.dense\.bias"),
        ("BertForSequenceClassification", BERT, r"bert\.pooler\.dense\.weight"),
        ("BertForSequenceClassification", BERT, r"bert\.pooler\.dense"),
        ("LayoutLMModel", transformers.LayoutLMConfig(**SMALL), r"pooler\.dense"),
        ("ViTForMaskedImageModeling", transformers.ViTConfig(**VIT, patch_size=16), r"mask_token"),
    ],
)
def test_what_a_model_uses_has_to_be_there(name: str, config: Any, gone: str, tmp_path: Path) -> None:
    refused(make(tmp_path / "s", name, config, edit=without(gone)), gone)


# Which class it is

CASES = {  # made as, config, named in config.json, changes, -> the class, transformers' auto class, words of the notice
    "a body under a head's name": (
        "MPNetModel", MPNET, "MPNetForMaskedLM", None, "MPNetModel", "AutoModel", "lm_head.bias and 5 parameters more",
    ),
    "a head that is not stored": (
        "LlamaForCausalLM", LLAMA, "", without("lm_head"), "LlamaModel", "AutoModel", "lm_head.weight is in no file",
    ),
    "a classifier that is not stored": (
        "BertModel", BERT, "BertForSequenceClassification", None, "BertModel", "AutoModel", "classifier.weight and 1",
    ),
    "an encoder under a decoder's name": (
        "T5EncoderModel", T5, "T5ForConditionalGeneration", None,
        "T5EncoderModel", "AutoModelForTextEncoding",
        "decoder.block.0.layer.0.SelfAttention.q.weight and 27 parameters more are in no file: taken for a T5Encoder",
    ),
    "no class of that name": (
        "LlamaForCausalLM", LLAMA, "LLaMAForCausalLM", None, "LlamaForCausalLM", "AutoModelForCausalLM",
        "transformers has no LLaMAForCausalLM: taken for its LlamaForCausalLM",
    ),
    "somebody's own name, and a body": (
        "BertModel", BERT, "MyBert", None, "BertModel", "AutoModel",
        "transformers has no MyBert: taken for its BertModel",
    ),
    "somebody's own name, encoder and decoder": (
        "T5ForConditionalGeneration", T5, "MyT5", None, "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM",
        "transformers has no MyT5: taken for its T5ForConditionalGeneration",
    ),
    "no name": ("LlamaForCausalLM", LLAMA, None, None, "LlamaForCausalLM", "AutoModelForCausalLM", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_class_is_what_the_tensors_fill_and_all_loaders_read_the_same(case: str, tmp_path: Path) -> None:
    name, config, named, edit, expected, auto, words = CASES[case]
    path = make(tmp_path / "s", name, config, named, edit)
    report = converter.convert(path, tmp_path / "out", calibration_tokens=32)
    assert not report.uncalibrated
    said = [notice for notice in report.notices if "config.json says so" in notice]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    assert formats.open_checkpoint(tmp_path / "out").config["architectures"] == [expected]
    model = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == expected
    reference = getattr(transformers, expected).from_pretrained(path, dtype=torch.float32)
    difference = (outputs(model) - outputs(reference)).norm() / outputs(reference).norm()
    assert difference < 0.03  # int8 in a tiny random model
    if auto != "AutoModelForTextEncoding":  # of T5 alone, and that is loaded elsewhere
        stock_agrees(tmp_path / "out", auto, model)


def outputs(model: Any) -> Tensor:
    inputs = {"decoder_input_ids": TOKENS} if "decoder_input_ids" in signature(model.forward).parameters else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, **inputs)[0].float()
    return found


def stock_agrees(out: Path, auto: str, model: Any | None) -> Any:
    """Load with stock transformers where bitsandbytes is installed: nothing that is not int8 may become int8."""
    pytest.importorskip("bitsandbytes")
    stock = getattr(transformers, auto).from_pretrained(out)
    found = outputs(stock)
    assert found.isfinite().all()
    if model is not None:
        assert type(stock) is type(model)
        assert (found - outputs(model)).norm() / found.norm() < 0.05
    int8 = sum(type(module).__name__ == "Linear8bitLt" for module in stock.modules())
    assert int8 == len(formats.open_checkpoint(out).records)
    return stock


NOBODYS = {  # made as, config, named, changes
    "MyLlama": ("LlamaForCausalLM", LLAMA, "MyLlama", renamed(r"^model\.", "body.")),
    "Contriever": ("BertModel", BERT, "Contriever", without(r"embeddings\.LayerNorm\.bias")),
}


@pytest.mark.parametrize("named", NOBODYS)
def test_a_name_that_transformers_lacks_over_other_tensors_is_converted_by_names(named: str, tmp_path: Path) -> None:
    path, out = make(tmp_path / "s", *NOBODYS[named]), tmp_path / "out"
    result = CliRunner().invoke(convert_command, [str(path), str(out)])
    assert result.exit_code == 0, result.output
    assert f"transformers has no {named}, and these tensors fill no other of its '" in result.output
    assert f"transformers has no class {named}: it can be verified and read here" in result.output
    assert "Load it with" not in result.output
    assert formats.open_checkpoint(out).config["architectures"] == [named]
    result = CliRunner().invoke(main, ["verify", str(out)])
    assert result.exit_code == 0, result.output
    assert "Not checked whether its model has all parameters: transformers does not know" in result.output
    with pytest.raises(formats.LLMInt8Error):
        runtime.load(out)


def test_a_body_without_a_pooler_under_a_name_of_its_own_loads(tmp_path: Path) -> None:
    path, out = make(tmp_path / "s", "BertModel", BERT, "Contriever", without("pooler")), tmp_path / "out"
    result = CliRunner().invoke(convert_command, [str(path), str(out), "--quiet"])
    assert "transformers has no Contriever: taken for its BertModel" in result.output
    assert type(runtime.load(out)).__name__ == "BertModel"
    assert CliRunner().invoke(main, ["verify", str(out), "--quiet"]).output == ""


def test_another_class_is_said_even_when_quiet(tmp_path: Path) -> None:
    path = make(tmp_path / "s", "LlamaForCausalLM", LLAMA, edit=without("lm_head"))
    result = CliRunner().invoke(convert_command, [str(path), str(tmp_path / "out"), "--quiet"])
    assert result.stderr.startswith("Note: lm_head.weight is in no file: taken for a LlamaModel")
    assert result.stderr.count("\n") == 1


def test_a_class_of_the_checkpoints_own_code_is_not_taken_for_another(tmp_path: Path) -> None:
    """It may compute something else with the same parameters, as Llamas that see to both sides do."""
    path = make(tmp_path / "s", "LlamaForCausalLM", LLAMA, "LlamaForTwoSides")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.LlamaForTwoSides"}
    (path / "config.json").write_text(json.dumps(config))
    report = converter.convert(path, tmp_path / "out")
    assert report.notices[0].startswith("transformers has no LlamaForTwoSides: linear layers were chosen by name")
    assert "--trust-remote-code runs the code beside it" in report.notices[0]
    with pytest.raises(formats.LLMInt8Error, match="trust_remote_code=True runs the code beside it"):
        runtime.load(tmp_path / "out")


def test_a_checkpoint_of_bitsandbytes_under_such_a_name_loads_and_the_guess_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    converter.convert(make(tmp_path / "s", "LlamaForCausalLM", LLAMA), tmp_path / "out", outliers="none")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["architectures"] = ["LLaMAForCausalLM"]
    del config["quantization_config"]["llmint8"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert type(runtime.load(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    guess = f"{tmp_path / 'out'}: transformers has no 'LLaMAForCausalLM': taken for its LlamaForCausalLM"
    assert [line for line in caplog.messages if "taken for" in line] == [guess]
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    runtime.load(tmp_path / "out")
    assert len([line for line in caplog.messages if "taken for" in line]) == 1


def test_verify_knows_the_class_too(tmp_path: Path) -> None:
    gpt2 = make(tmp_path / "a", "GPT2Model", transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2), "GPT2Own")
    nobodys = make(tmp_path / "b", "LlamaForCausalLM", LLAMA, "MyLlama", renamed(r"^model\.", "body."))
    for path in (gpt2, nobodys):  # of GPT-2 weights are transposed, and only the model tells
        out = path.with_name(f"{path.name}8")
        converter.convert(path, out, outliers="none")
        assert compare_with_source(formats.open_checkpoint(out), formats.open_source(path)).problems == []


# What stock loaders must be told


SKIPPED = {  # made as, config, named, options -> what bitsandbytes must not make int8, and auto classes to try
    "a body with the head": (
        "LlamaForCausalLM", LLAMA, "LlamaModel", {}, ["lm_head"], ["AutoModel", "AutoModelForCausalLM"],
    ),
    "a body with a tied head": (
        "LlamaForCausalLM", TIED, "LlamaModel", {}, ["lm_head"], ["AutoModel", "AutoModelForCausalLM"],
    ),
    "a head and what another head needs": (
        "BertForPreTraining", BERT, "BertForMaskedLM", {},
        ["cls.predictions.decoder", "cls.predictions.transform.dense", "cls.seq_relationship", "pooler.dense"],
        ["AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining"],
    ),
    "a layer that is skipped": (
        "BertForSequenceClassification", BERT, "", {"skip": ["layer.0.*query"]},
        ["bert.encoder.layer.0.attention.self.query", "classifier", "encoder.layer.0.attention.self.query"],
        ["AutoModel", "AutoModelForSequenceClassification"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_linear_for_any_class_of_the_type_is_named_for_bitsandbytes(case: str, tmp_path: Path) -> None:
    name, config, named, options, expected, autos = SKIPPED[case]
    path = make(tmp_path / "s", name, config, named)
    converter.convert(path, tmp_path / "out", outliers="none", **options)
    assert formats.open_checkpoint(tmp_path / "out").quantization.skip_modules == expected
    runtime.load(tmp_path / "out")
    for auto in autos:
        stock_agrees(tmp_path / "out", auto, None)


def test_no_name_for_other_classes_hides_an_int8_layer() -> None:
    """bitsandbytes takes what ends like a name in the list for it."""
    from llmint8.converter.planning.selected import Selection

    kept = {"model.layers.0.q": "--skip", "model.layers.1.q": "--skip"}
    module_of = {name: name for name in [*kept, "model.tower.layers.0.q"]}
    layers: Any = {"model.tower.layers.0.q": None}
    selection = Selection(layers, kept, module_of, [], "model.", ["score"])
    assert selection.skip_modules == ["layers.1.q", "model.layers.0.q", "model.layers.1.q", "score"]


def test_names_that_end_alike_are_counted_as_one_by_one() -> None:
    random = Random(0)
    for _ in range(300):
        names = ["".join(random.choices("ab.", k=random.randint(1, 6))) for _ in range(random.randint(0, 12))]
        ending = "".join(random.choices("ab.", k=random.randint(0, 4)))
        assert Endings(names).count(ending) == sum(name.endswith(ending) for name in names)


# The lines of the card

CARDS = {  # made as, config -> the class in the card's lines
    "LlamaForCausalLM": (LLAMA, "AutoModelForCausalLM"),
    "BertModel": (BERT, "AutoModel"),
    "BertForMaskedLM": (BERT, "AutoModelForMaskedLM"),
    "BertForSequenceClassification": (BERT, "AutoModelForSequenceClassification"),
    "BertForTokenClassification": (BERT, "AutoModelForTokenClassification"),
    "BertForQuestionAnswering": (BERT, "AutoModelForQuestionAnswering"),
    "T5ForConditionalGeneration": (T5, "AutoModelForSeq2SeqLM"),
    "T5EncoderModel": (T5, "AutoModelForTextEncoding"),
    "BertForNextSentencePrediction": (BERT, "BertForNextSentencePrediction"),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_lines_of_the_card_load_the_model(name: str, tmp_path: Path) -> None:
    config, auto = CARDS[name]
    converter.convert(make(tmp_path / "s", name, config), tmp_path / "out", outliers="none")
    ours, stock = code_blocks(tmp_path / "out")
    assert f"import {auto}\n" in stock
    assert type(run(ours)).__name__ == name
    pytest.importorskip("bitsandbytes")
    assert type(run(stock)).__name__ == name


SHOWN = {  # made as, config, named, options -> what the card says is not quantized
    "MPNetModel": (MPNET, "MPNetForMaskedLM", {}, []),
    "LlamaForCausalLM": (TIED, "", {}, ["lm_head"]),
    "BertForSequenceClassification": (
        BERT, "", {"skip": ["layer.0.*query"]}, ["bert.encoder.layer.0.attention.self.query", "classifier"],
    ),
    "BertModel": (BERT, "", {"skip": ["layer.0.*query"]}, ["encoder.layer.0.attention.self.query"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_the_card_names_layers_of_this_model_only(name: str, tmp_path: Path) -> None:
    config, named, options, expected = SHOWN[name]
    converter.convert(make(tmp_path / "s", name, config, named), tmp_path / "out", outliers="none", **options)
    said = "".join(f"`{layer}`, " for layer in expected)
    assert f"| Not quantized | {said}all that is not linear |" in (tmp_path / "out" / "README.md").read_text()
    card = new_card(Subject.of(formats.open_checkpoint(tmp_path / "out")), "")
    assert f"| Not quantized | {said}all that is not linear |" in card


def code_blocks(out: Path) -> list[str]:
    card = (out / "README.md").read_text().replace("path/to/this/directory", str(out))
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run(code: str) -> Any:
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables["model"]


def test_a_sentence_encoder_takes_its_parts_along_and_the_card_says_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "s", "MPNetModel", MPNET, "MPNetForMaskedLM")
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}, {"path": "a/b"}]
    (path / "modules.json").write_text(json.dumps(parts))
    dense = {"linear.weight": torch.ones(4, 4)}
    for folder in ("1_Pooling", "2_Dense", "a/b", "onnx", ".git"):
        (path / folder).mkdir(parents=True)
        (path / folder / "config.json").write_text(json.dumps({"folder": folder}))
    save_file(dense, path / "2_Dense" / "model.safetensors")
    (path / "2_Dense" / "model.onnx").write_bytes(b"other")
    report = converter.convert(path, tmp_path / "out", outliers="none")
    out = tmp_path / "out"
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.parent != out and file.is_file()}
    assert found == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "a/b/config.json"}
    assert torch.equal(load_file(out / "2_Dense" / "model.safetensors")["linear.weight"], dense["linear.weight"])
    assert found <= formats.read_manifest(out).files.keys()
    assert "onnx/ stays behind: a folder that no modules.json names" in report.notices
    assert type(runtime.load(out)).__name__ == "MPNetModel"
    assert converter.convert(path, out, outliers="none").already
    (out / "1_Pooling" / "config.json").write_text("{}")
    assert any(
        "1_Pooling/config.json" in str(problem) for problem in formats.check_values(formats.open_checkpoint(out))
    )
    ours, stock = code_blocks(out)
    assert type(run(ours)).__name__ == "MPNetModel"
    library: Any = ModuleType("sentence_transformers")
    library.SentenceTransformer = Path
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    assert run(stock) == out
    assert "library_name: sentence-transformers" in (out / "README.md").read_text()


@pytest.mark.parametrize("folder", ["..", "../s", "/etc", "a/../..", "a\\\\b", "\\u001b[2J", 7, "a//b"])
def test_a_part_outside_of_the_directory_is_refused(folder: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "s", "MPNetModel", MPNET)
    text = json.dumps([{"path": folder}]) if isinstance(folder, int) else f'[{{"path": "{folder}"}}]'
    (path / "modules.json").write_text(text)
    refused(path, r"modules\.json: path is .* expected a folder in this directory")


def test_a_part_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "s", "MPNetModel", MPNET)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("secret")
    (path / "1_Pooling").symlink_to(tmp_path / "private")
    (path / "modules.json").write_text('[{"path": "1_Pooling"}]')
    refused(path, "outside of the checkpoint")


# Without a model


def test_what_may_be_a_head_of_an_unknown_model_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "internlm-x", "text_config": {"vocab_size": 96}}')
    shapes = {"model.layers.0.wqkv": (128, 64), "model.tok_embeddings": (96, 64), "output": (96, 64), "proj": (64, 64)}
    shapes["model.mtp.0.out"] = (96, 64)
    tensors = {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    report = converter.convert(path, tmp_path / "out")
    assert formats.open_checkpoint(tmp_path / "out").records.keys() == {"model.layers.0.wqkv"}
    assert report.kept["output"] == report.kept["model.mtp.0.out"] == "as many rows as the vocabulary: perhaps a head"
    assert report.kept["proj"] == "in no numbered block: perhaps a head"
    size = (2 * 96 * 64 + 64 * 64) * 2 / 1e3
    said = f"3 matrices ({size:.1f} kB, model.mtp.0.out.weight among them) stay as they are: without the model nothing"
    assert any(notice.startswith(said) for notice in report.notices)
    report = converter.convert(path, tmp_path / "only", only=["output", "layers"])
    assert formats.open_checkpoint(tmp_path / "only").records.keys() == {"model.layers.0.wqkv", "output"}


def test_thousands_of_experts_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w{k}.weight" for n in range(1000) for k in (1, 2, 3)]
    tensors = {n: TensorInfo(n, "BF16", (64, 64), "model.safetensors", 8192 * i) for i, n in enumerate(names)}
    compared = []
    equal = TensorInfo.__eq__
    monkeypatch.setattr(TensorInfo, "__eq__", lambda one, other: compared.append(one) or equal(one, other))
    foreign, notices = leftovers(SimpleNamespace(tensors=tensors), model, {})  # type: ignore[arg-type]
    assert foreign == []
    assert [notice.partition(" (")[0] for notice in notices] == ["3000 matrices of experts"]
    assert len(compared) <= len(names)


def test_other_leftovers_are_not_called_experts(tmp_path: Path) -> None:
    def further_layer(tensors: Tensors) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(32, 64).half()

    path = make(tmp_path / "s", "LlamaForCausalLM", LLAMA, edit=further_layer)
    report = converter.convert(path, tmp_path / "out", outliers="none")
    said = "1 matrix (4.1 kB, model.layers.2.eh_proj.weight) stays as it is: LlamaForCausalLM has no place for that"
    assert report.notices == [said]
