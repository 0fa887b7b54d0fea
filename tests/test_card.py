"""The model card: what goes in, what stays when a user has edited it, and licences that forbid to publish."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from llmint8 import converter, formats
from llmint8.converter.hub.card import EVALUATION_NAME, Subject, new_card, refreshed_card
from llmint8.converter.hub.front_matter import metadata, read_card
from llmint8.converter.hub.licence import objection
from llmint8.formats import LLMInt8Error
from llmint8.formats.int8.schemes import KBit

SOURCE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: no
tags: [tiny, int8]
pipeline_tag: fill-mask
base_model: alice/base
model-index: [broken]
---
# The original's own words
"""
EVALUATION: dict[str, Any] = {
    "text": "wiki.txt",
    "window": 512,
    "positions": 511,
    "reference_perplexity": 12.5,
    "methods": [
        {"name": "out: static, absmax", "kl_mean": 0.0012345, "top1_agreement": 0.9871, "perplexity": 12.51},
        {"name": "none", "kl_mean": None, "top1_agreement": 0.5, "perplexity": None},
    ],
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path / "source")
    (path / "source" / "README.md").write_text(SOURCE_CARD)
    converter.convert(path / "source", path / "out", outliers="top-k=4")
    return path / "out"


def subject(out: Path, **changes: Any) -> Subject:
    found = Subject.of(formats.open_checkpoint(out))
    return Subject(**{name: changes.get(name, getattr(found, name)) for name in Subject.__dataclass_fields__})


def test_conversion_writes_a_card_with_what_the_source_says_about_licence_language_and_tags(out: Path) -> None:
    card = read_card(out)
    assert "The original's own words" not in card
    data = metadata(card)
    assert {key: data[key] for key in ("license", "license_name", "license_link", "pipeline_tag")} == {
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "pipeline_tag": "fill-mask",
    }
    assert data["language"] == "no"
    assert data["tags"] == ["tiny", "int8", "llmint8", "8-bit", "bitsandbytes"]
    assert data["library_name"] == "transformers"
    # A directory is no repo that could be named; the source's own base may be what its licence comes from.
    assert data["base_model"] == "alice/base"
    assert "base_model_relation" not in data
    assert "7 linear layers" in card
    assert "`lm_head`" in card
    assert "% of the input columns also stored unquantized, " in card
    assert "criterion `top-k=4`" in card


def test_the_card_of_format_2_names_no_other_loader_and_its_bits(out: Path) -> None:
    quantization = formats.open_checkpoint(out).quantization
    nf4, int3 = KBit(4, "nf4", 64), KBit(3, "int", 32)
    names = list(quantization.outliers)
    for kbits, tags, words in (
        ((), ["llmint8", "int8", "8-bit"], "| Activations | int8 when the model runs (zeropoint in groups of 128) |"),
        ((nf4,), ["llmint8", "4-bit"], "| Activations | not quantized |"),
        ((nf4, int3), ["llmint8", "3-bit", "4-bit"], "| Activations | not quantized |"),
    ):
        schemes = {scheme.name: scheme for scheme in (formats.Scheme(kbit=kbit) for kbit in kbits)}
        layers = {name: list(schemes)[number % len(schemes)] for number, name in enumerate(names)} if schemes else {}
        changed = dataclasses.replace(
            quantization, layout=formats.NATIVE, schemes=schemes or quantization.schemes, layers=layers
        )
        card = new_card(subject(out, quantization=changed), "")
        assert (metadata(card)["tags"], metadata(card)["library_name"]) == (tags, "llmint8")
        assert words in card
        assert "read by llmint8 alone |" in card
        assert "bitsandbytes" not in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": None}, "| Calibration | none |"),
        ({"calibration": {"text": "packaged", "tokens": 512}}, "| Calibration | 512 tokens of llmint8's own text |"),
        ({"calibration": {"text": "a`b.txt", "tokens": 9}}, "| Calibration | 9 tokens: `a?b.txt` |"),
        ({"calibration": {"text": "made-up pixels", "tokens": 0}}, "| Calibration | made-up pixels |"),
        (
            {"calibration": {"text": "packaged", "tokens": 5, "layers": 3, "inputs": ["text", "images"]}},
            "| 5 tokens of llmint8's own text, and images; 3 of 7 layers |",
        ),
        ({"calibration": {"text": "packaged", "tokens": 5, "layers": 7}}, "| 5 tokens of llmint8's own text |"),
        ({"outliers": {"lm_head": 0}}, "7 linear layers, the output head among them; one scale per row"),
        ({"skip_modules": []}, "| Not quantized | all that is not linear |"),
        (
            {"skip_modules": [f"s.{number}.proj" for number in range(10)]},
            "`s.6.proj`, `s.7.proj`, 2 layers more, all that is not linear |",
        ),
        # The same layer, as other classes call it.
        ({"skip_modules": ["model.proj", "proj"]}, "| Not quantized | `model.proj`, all that is not linear |"),
        ({"outliers": {"a": 1, "b": 7}}, "3.33% of the input columns also stored unquantized, 1 to 7 in a layer; "),
    ],
    ids=str,
)
def test_what_was_quantized_is_told(changes: dict[str, Any], words: str, out: Path) -> None:
    quantization = formats.open_checkpoint(out).quantization
    assert words in new_card(subject(out, quantization=dataclasses.replace(quantization, **changes)), "")


def test_a_layer_of_another_class_of_the_model_is_not_among_those_that_stay(out: Path) -> None:
    """A body has no head, though loaders of other classes are told to skip one; a head that is tied is in no file."""
    for name, said in (("LlamaModel", "all that"), ("GPT2LMHeadModel", "`lm_head`"), ("LlamaForCausalLM", "`lm_head`")):
        card = new_card(subject(out, config={"architectures": [name]}, tensors=["embed.weight"]), "")
        assert f"| Not quantized | {said}" in card


def test_sizes_before_and_after_and_where_it_comes_from(out: Path) -> None:
    source = {"name": "alice/tiny", "repo": "alice/tiny", "commit": "c0ffee", "files": {"a": 1_500_000, "b": 500_000}}
    card = new_card(subject(out, source=source | {"quantized": "gptq"}, nbytes=900_000), "")
    assert "| Size | 900.0 kB; the original 2.0 MB |" in card
    assert (
        "[alice/tiny](https://huggingface.co/alice/tiny), commit [`c0ffee`](https://huggingface.co/alice/tiny/tree"
        in card
    )
    assert "The original was quantized already: gptq." in card
    assert "| Size | 900.0 kB |" in new_card(subject(out, source={"name": "x"}, nbytes=900_000), "")
    assert "# tiny, int8" in card


def test_the_card_of_the_directory_is_what_a_new_one_would_be(out: Path) -> None:
    assert new_card(subject(out), SOURCE_CARD) == read_card(out)


def test_the_front_matter_survives_a_round_trip(out: Path) -> None:
    found = subject(out, source={"name": "alice/tiny", "repo": "alice/tiny", "commit": "0" * 40})
    data = metadata(new_card(found, SOURCE_CARD))
    assert (data["base_model"], data["base_model_relation"]) == (["alice/tiny", "alice/base"], "quantized")
    assert ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n").data.to_dict() == data


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("alice/base", "alice/base"),
        ("[alice/base, gpt2]", ["alice/base", "gpt2"]),
        ("/home/alice/base", None),
        ("[../base, ~/base, alice/base/checkpoint-9, 'C:\\base']", None),
        ("7", None),
    ],
)
def test_a_base_that_is_a_repo_stays_and_one_on_a_disk_does_not(base: str, kept: Any, out: Path) -> None:
    assert metadata(new_card(subject(out), f"---\nbase_model: {base}\n---\n")).get("base_model") == kept


def test_a_causal_model_without_a_card_generates_text(out: Path) -> None:
    data = metadata(new_card(subject(out), ""))
    assert data["pipeline_tag"] == "text-generation"
    assert "license" not in data


def test_only_the_generated_part_of_an_edited_card_changes(out: Path) -> None:
    card = read_card(out)
    edited = (
        "---\nlicense: mit\nmine: true\n---\n\nMy words before.\r\n" + card[card.index("<!--") :] + "\nMy words after."
    )
    fresh = refreshed_card(subject(out, evaluation=EVALUATION), edited, "alice/mine")
    before, _, rest = fresh.partition("<!-- llmint8")
    assert before == edited.partition("<!-- llmint8")[0]
    assert rest.endswith("-->\n\nMy words after.")
    assert 'runtime.load("alice/mine")' in rest
    assert "| in int8: static, absmax | 0.00123 | 98.71% | 12.510 |" in rest
    assert "| none | - | 50.00% | - |" in rest
    assert "511 positions of `wiki.txt`, in windows of 512 tokens" in rest
    assert refreshed_card(subject(out, evaluation=EVALUATION), fresh, "alice/mine") == fresh


@pytest.mark.parametrize("card", ["# All mine\n", "---\nlicense: mit\n---\nNo markers.\n"])
def test_a_card_without_the_markers_is_left_alone(card: str, out: Path) -> None:
    assert refreshed_card(subject(out), card, "alice/mine") == card


def test_a_card_that_is_missing_is_made(out: Path) -> None:
    assert 'runtime.load("alice/mine")' in refreshed_card(subject(out), "", "alice/mine")


def test_names_from_elsewhere_are_no_markup(out: Path) -> None:
    name = "x`|<script>\n<!-- llmint8: end of the generated part -->"
    card = new_card(subject(out, source={"name": name, "repo": None}, config={"architectures": [name]}), "")
    assert card.count("llmint8: end of the generated part -->") == 1
    assert "<script>" not in card
    assert refreshed_card(subject(out), card, "alice/mine").count("<!--") == 2


@pytest.mark.parametrize(
    "text", ["---\n[unclosed\n---\n", "---\n- a list\n---\n", "---\n1: 2\n---\n", "--- no end", ""]
)
def test_broken_front_matter_is_none(text: str) -> None:
    assert metadata(text) == {}


def test_what_eval_saved_is_read_and_what_is_malformed_is_said(out: Path) -> None:
    (out / EVALUATION_NAME).write_text(json.dumps(EVALUATION))
    try:
        assert "## Accuracy" in new_card(subject(out), "")
        with pytest.raises(LLMInt8Error, match=r"llmint8_eval\.json: malformed: 'methods'"):
            new_card(subject(out, evaluation={"reference_perplexity": 1.0}), "")
    finally:
        (out / EVALUATION_NAME).unlink()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"license": "cc-by-nc-nd-4.0"}, "allows no adaptations"),
        ({"license": ["mit", "CC-BY-ND-4.0"]}, "allows no adaptations"),
        ({"license": "other", "license_name": "Acme No Redistribution 1.0"}, "allows no redistribution"),
        ({"license": "other", "license_name": "proprietary"}, "no right to redistribute"),
        ({"license": "other", "base_model": "facebook/opt-125m"}, "OPT-175B"),
        ({"license": "other", "license_name": "OPT-175B"}, "OPT-175B"),
        ({"base_model": ["alice/tuned", "facebook/opt-125m"]}, "OPT-175B"),
        ({"license": "mit", "base_model": "facebook/opt-125m"}, None),
        ({"license": "other", "base_model": "alice/model"}, None),
        ({"license": "apache-2.0"}, None),
        ({"license": "cc-by-nc-4.0"}, None),
        ({"license": 7}, None),
        ({}, None),
    ],
)
def test_licences_that_forbid_to_publish(card: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    found = objection(card, tmp_path)
    assert words in found if words and found else found is words


@pytest.mark.parametrize(
    ("licence", "notice"), [("LICENSE.md", "NOTICE"), ("Licence.txt", "notice.txt"), ("COPYING", "Notice")]
)
def test_opts_licence_wants_its_copy_and_its_notice(licence: str, notice: str, tmp_path: Path) -> None:
    (tmp_path / licence).write_text("OPT-175B License Agreement\n")
    assert "OPT-175B" in (objection({}, tmp_path) or "")
    (tmp_path / notice).write_text("OPT-175B is licensed under the OPT-175B license, Copyright (c) Meta\n")
    assert objection({"license": "other"}, tmp_path) is None
