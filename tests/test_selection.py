"""Which layers of a model become int8, and why the others do not: from configs and shapes, without any weight."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from llmint8.converter.model.build import meta_model
from llmint8.converter.planning.before import kv_heads, weights_before
from llmint8.converter.planning.head import embedding_of, own_head
from llmint8.converter.planning.selected import SelectedLayer, Selection
from llmint8.converter.planning.selection import select_layers
from llmint8.formats import SourceError, TensorInfo

pytestmark = pytest.mark.usefixtures("quiet_transformers")

_SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"max_position_embeddings": 64, "intermediate_size": 96}
_T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
_GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS: dict[str, tuple[type, dict[str, Any], str]] = {
    "llama": (transformers.LlamaConfig, _SMALL, "LlamaForCausalLM"),
    "tied": (transformers.LlamaConfig, _SMALL | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "body": (transformers.LlamaConfig, _SMALL, "LlamaModel"),
    "classifier": (transformers.LlamaConfig, _SMALL, "LlamaForSequenceClassification"),
    "bert": (transformers.BertConfig, _SMALL, "BertForMaskedLM"),
    "t5": (transformers.T5Config, _T5, "T5ForConditionalGeneration"),
    "gpt2": (transformers.GPT2Config, _GPT2, "GPT2LMHeadModel"),
    "mixtral": (transformers.MixtralConfig, _SMALL | {"num_local_experts": 3}, "MixtralForCausalLM"),
}
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
LLAMA = [f"model.layers.{block}.{layer}" for block in range(2) for layer in [*ATTENTION, *MLP]]


def config_of(name: str) -> Any:
    kind, values, architecture = CONFIGS[name]
    return kind(**values, architectures=[architecture])


@functools.cache
def model_of(name: str) -> Any:
    """On the meta device, and nobody changes it."""
    return meta_model(config_of(name))


def source_of(model: Any, **changes: TensorInfo | None) -> Any:
    """A source that has the tensors of a model in bfloat16, those changed by name that are given."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    infos = {name: info(name, shape) for name, shape in shapes.items() if name not in model.all_tied_weights_keys}
    infos = {name: one for name, one in {**infos, **changes}.items() if one is not None}
    return SimpleNamespace(tensors=infos, config={}, path=Path("source"), parts=lambda stack: [])


def info(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, "model.safetensors", 0)


def selected(name: str, *, skip: Any = (), only: Any = (), **options: Any) -> Selection:
    return select_layers(source_of(model_of(name)), model_of(name), skip, only, **options)


T5_WO = {f"{side}.block.0.layer.{n}.DenseReluDense.wo" for side, n in (("encoder", 1), ("decoder", 2))}
BERT_HEAD = ["cls.predictions.transform.dense", "cls.predictions.decoder"]


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [
        ("llama", 14, {"lm_head": "output head"}),
        ("tied", 14, {"lm_head": "output head"}),
        ("body", 14, {}),
        ("classifier", 14, {"score": "output head"}),
        ("bert", 12, dict.fromkeys(BERT_HEAD, "output head")),
        ("t5", 14, {**dict.fromkeys(T5_WO, "kept in high precision by the model"), "lm_head": "output head"}),
        ("gpt2", 4, {"lm_head": "output head"}),
    ],
)
def test_all_linear_layers_are_taken_but_heads_and_what_the_model_keeps(
    name: str, number: int, kept: dict[str, str]
) -> None:
    selection = selected(name)
    assert (len(selection.layers), selection.kept, selection.notices) == (number, kept, [])
    assert selection.module_of == {one: one for one in [*selection.layers, *kept]}
    assert selection.skip_modules == sorted(kept)
    for layer in selection.layers.values():
        assert layer.weight.name == f"{layer.name}.weight"
        assert (layer.transposed, layer.tied, layer.lookup) == (name == "gpt2", False, None)
    if name == "gpt2":  # stored [in, out]
        assert selection.layers["transformer.h.0.mlp.c_fc"].out_features == 256
    assert selection.multiplied == selection.layers
    assert list(selection.layer_of) == [f"{one}.weight" for one in selection.layers]


def test_skip_and_only_are_found_anywhere_in_a_name_and_skip_wins() -> None:
    chosen = selected("llama", skip=["up_proj$", r"layers\.1\.mlp"], only=["mlp", "q_proj"])
    expected = ["0.self_attn.q_proj", "0.mlp.gate_proj", "0.mlp.down_proj", "1.self_attn.q_proj"]
    assert list(chosen.layers) == [f"model.layers.{one}" for one in expected]
    assert chosen.kept == {
        "lm_head": "output head",
        **{name: "not in --only" for name in LLAMA if "self_attn" in name and "q_proj" not in name},
        **{name: "--skip" for name in LLAMA if "up_proj" in name or "1.mlp" in name},
    }


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"skip": "mlp"}, ValueError, r"--skip is the string 'mlp', expected a list: \['mlp'\]"),
        ({"only": "mlp"}, ValueError, "--only is the string 'mlp'"),
        ({"skip": ["mlp", "("]}, ValueError, r"--skip '\(' is not a regular expression"),
        ({"only": ["["]}, ValueError, r"--only '\[' is not a regular expression"),
        ({"skip": [""]}, SourceError, r"no linear layer is left to quantize \(--skip, output head\)"),
        ({"only": ["nothing"]}, SourceError, r"no linear layer is left to quantize \(not in --only, output head\)"),
    ],
    ids=str,
)
def test_what_selects_nothing_or_is_no_list_of_expressions_is_refused(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        selected("llama", **options)


def test_a_tensor_of_another_shape_or_dtype_is_refused_and_a_layer_without_one_is_kept() -> None:
    model, name = model_of("llama"), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(SourceError, match=rf"{name} has shape \[64, 96\], the config asks for \[96, 64\]"):
        select_layers(source_of(model, **{name: info(name, (64, 96))}), model, (), ())
    with pytest.raises(SourceError, match=rf"{name} is F64, expected F16, BF16 or F32; leave it as it is with --skip"):
        select_layers(source_of(model, **{name: info(name, (96, 64), "F64")}), model, (), ())
    for dtype in ("F16", "F32"):
        found = select_layers(source_of(model, **{name: info(name, (96, 64), dtype)}), model, (), ())
        assert len(found.layers) == 14
    skipped = select_layers(source_of(model, **{name: info(name, (96, 64), "F64")}), model, ["up"], ())
    assert len(skipped.layers) == 12
    missing = select_layers(source_of(model, **{name: None}), model, (), ())
    assert missing.kept["model.layers.1.mlp.up_proj"] == "not stored as a tensor of its own"


def test_tensors_without_the_models_prefix_are_its_layers() -> None:
    model = model_of("llama")
    source = source_of(model)
    bare = {name.removeprefix("model."): one for name, one in source.tensors.items()}
    source.tensors = {name: info(name, one.shape) for name, one in bare.items()}
    found = select_layers(source, model, ["1.mlp"], ())
    assert list(found.layers) == [name.removeprefix("model.") for name in LLAMA if "1.mlp" not in name]
    assert all(found.module_of[name] == f"model.{name}" for name in found.layers)
    assert {"lm_head", *(f"model.{name}" for name in found.kept if "1.mlp" in name)} <= set(found.skip_modules)


def test_matrices_that_the_model_has_no_place_for_are_counted() -> None:
    model = model_of("llama")
    shapes = {
        "model.one.weight": (64, 32),
        "model.stack": (3, 32, 64),
        "model.vectors.weight": (64,),
        "model.narrow_stack": (3, 31, 64),
        "model.single": (1, 64, 64),
        "model.biases.bias": (3, 64, 64),
        "model.conv.weight": (64, 64, 64),
    }
    more = {name: info(name, shape) for name, shape in shapes.items()}
    found = select_layers(source_of(model, **more), model, (), ())
    # One of 64 x 32 and three of 32 x 64.
    assert found.notices == [
        "4 matrices (16.4 kB, model.one.weight among them) stay as they are: LlamaForCausalLM has no place for that"
    ]
    pair = select_layers(source_of(model, **{"model.pair": info("model.pair", (2, 32, 32))}), model, (), ())
    assert pair.notices[0].startswith("2 matrices (4.1 kB, model.pair) stays as it is: ")


# Experts.


def test_experts_stay_or_become_layers_all_of_them() -> None:
    stays = selected("mixtral")
    assert len(stays.layers) == 8
    # 2 blocks of 3 experts with 3 * 6,144 elements each; of 193,216 in all, and two bytes each.
    (notice,) = stays.notices
    assert notice == (
        "12 matrices of experts (221.2 kB, model.layers.0.mlp.experts.gate_up_proj among them) stay as they are: the "
        "model has them in stacks, and no linear layers for them; they are 57% of it, which --format 2 halves"
    )
    model = model_of("mixtral")
    names = [
        f"model.layers.{b}.block_sparse_moe.experts.{e}.w{m}" for b in range(2) for e in range(3) for m in (1, 2, 3)
    ]
    source = source_of(model)
    for block in range(2):
        for stack in ("gate_up_proj", "down_proj"):
            del source.tensors[f"model.layers.{block}.mlp.experts.{stack}"]
    source.tensors |= {f"{n}.weight": info(f"{n}.weight", (64, 96) if n[-1] == "2" else (96, 64)) for n in names}
    taken = select_layers(source, model, (), (), experts=True)
    assert sorted(taken.experts) == sorted(names)
    assert (len(taken.layers), taken.notices, taken.stacks) == (8 + 18, [], [])
    assert taken.starved([*taken.layers]) == []
    (said,) = taken.starved(names[1:])
    assert said.startswith("1 of 18 matrices of experts were reached by no token of the calibration")
    # transformers loads all of a model's experts in one way.
    one = names[4]
    for fewer in (taken.without({one: "NaN"}), select_layers(source, model, [one], (), experts=True)):
        assert (len(fewer.layers), fewer.experts) == (8, {})
        others = {name: "other experts are not in int8" for name in names if name != one}
        assert {name: fewer.kept[name] for name in others} == others
        assert fewer.kept[one] in ("NaN", "--skip")
    attention = taken.without({"model.layers.0.self_attn.q_proj": "NaN"})
    assert (len(attention.layers), len(attention.experts)) == (7 + 18, 18)
    assert attention.kept == {**taken.kept, "model.layers.0.self_attn.q_proj": "NaN"}


def test_what_is_before_a_layer_may_be_one_that_stays_and_of_experts_is_their_own() -> None:
    model = model_of("llama")
    source = source_of(model)
    selection = select_layers(source, model, ["o_proj", "1.mlp.up"], ())
    layers = weights_before(source, model, selection)
    assert not any(layer.transposed for layer in layers.values())
    found = {name: one.name for name, one in layers.items()}
    block = "model.layers.1"
    assert found[f"{block}.mlp.gate_proj"] == f"{block}.self_attn.o_proj"
    assert found[f"{block}.mlp.down_proj"] == f"{block}.mlp.up_proj"
    assert found[f"{block}.self_attn.q_proj"] == "model.layers.0.mlp.down_proj"
    assert not {f"{block}.self_attn.o_proj", "lm_head", "model.layers.0.self_attn.q_proj"} & found.keys()

    config = transformers.MixtralConfig(  # as wide inside as outside
        **_SMALL | {"num_local_experts": 2, "intermediate_size": 64}, architectures=["MixtralForCausalLM"]
    )
    model = meta_model(config)
    source = source_of(model)
    of_experts = "model.layers.1.block_sparse_moe.experts"
    for name in [name for name in source.tensors if "experts" in name]:
        del source.tensors[name]
    names = [f"{of_experts.replace('1', str(b), 1)}.{e}.w{m}" for b in range(2) for e in range(2) for m in (1, 2, 3)]
    source.tensors |= {f"{name}.weight": info(f"{name}.weight", (64, 64)) for name in names}
    selection = select_layers(source, model, (), (), experts=True)
    found = {name: one.name for name, one in weights_before(source, model, selection).items()}
    for expert in range(2):
        before = [found[f"{of_experts}.{expert}.w{matrix}"] for matrix in (1, 2, 3)]  # gate, down, up
        output = f"{block}.self_attn.o_proj"
        assert before == [output, f"{of_experts}.{expert}.w3", output]
    assert found[f"{block}.self_attn.q_proj"] == "model.layers.0.self_attn.o_proj"  # a sum over experts is between


# The head and the embedding.


def test_a_head_becomes_a_layer_and_one_that_is_tied_its_embeddings() -> None:
    config, model, head = own_head(config_of("llama"), model_of("llama"))
    assert head == ("lm_head", None)
    found = select_layers(source_of(model), model, (), (), head)
    assert (len(found.layers), found.kept, found.layers["lm_head"].tied) == (15, {}, False)

    tied = config_of("tied")
    config, model, head = own_head(tied, model_of("tied"))
    assert head == ("lm_head", "model.embed_tokens.weight")
    assert (tied.tie_word_embeddings, config.tie_word_embeddings) == (True, False)
    source = source_of(model_of("tied"))
    found = select_layers(source, model, (), (), head)
    layer = found.layers["lm_head"]
    assert (layer.tied, layer.weight.name) == (True, "model.embed_tokens.weight")
    assert select_layers(source, model, ["lm_head"], (), head).kept == {"lm_head": "--skip"}
    del source.tensors["model.embed_tokens.weight"]
    with pytest.raises(SourceError, match=r"model\.embed_tokens\.weight is missing.*leave --quantize-head out"):
        select_layers(source, model, (), (), head)


def test_an_embedding_is_looked_up_in_int8_and_the_pair_once() -> None:
    for name, lookup, kept in (("llama", "only", {"lm_head": "output head"}), ("tied", "too", {})):
        source = source_of(model_of(name))
        _, model, head, embedding = embedding_of(config_of(name), model_of(name))
        found = select_layers(source, model, (), (), head, embedding=embedding)
        table = found.layers["model.embed_tokens"]
        assert (table.lookup, table.tied, table.transposed, len(found.layers)) == (lookup, False, False, 15)
        assert found.kept == kept
        assert ("model.embed_tokens" in found.multiplied) == (lookup == "too")
        assert found.module_of["model.embed_tokens"] == ("lm_head" if head else "model.embed_tokens")
    source.tensors["lm_head.weight"] = info("lm_head.weight", (256, 64))
    with pytest.raises(SourceError, match=r"lm_head\.weight is there beside model\.embed_tokens\.weight"):
        select_layers(source, model, (), (), head, embedding=embedding)
    del source.tensors["lm_head.weight"], source.tensors["model.embed_tokens.weight"]
    with pytest.raises(SourceError, match=r"model\.embed_tokens\.weight is no tensor of its own.*embeddings out"):
        select_layers(source, model, (), (), head, embedding=embedding)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("body", "no plain linear output head"),
        ("t5", "t5 cannot do without its tied head"),
        ("bert", "bert cannot do without its tied head"),
    ],
)
def test_a_head_that_cannot_be_taken_is_refused_by_the_option_that_asks(name: str, words: str) -> None:
    with pytest.raises(SourceError, match=f"^--quantize-head: .*{words}.*leave it out"):
        own_head(config_of(name), model_of(name))
    with pytest.raises(SourceError, match=f"^--other: .*{words}"):
        own_head(config_of(name), model_of(name), "--other")
    with pytest.raises(SourceError, match="no plain linear output head"):
        own_head(None, None)
    with pytest.raises(SourceError, match="no plain embedding of tokens"):
        embedding_of(None, None)


# Without a model.


def by_name(tensors: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None, **options: Any) -> Selection:
    source: Any = SimpleNamespace(
        tensors={name: info(name, shape) for name, shape in tensors.items()},
        config={"model_type": "unheard-of", "vocab_size": 200, **(config or {})},
        path=Path("source"),
    )
    return select_layers(source, None, options.get("skip", ()), options.get("only", ()))


def test_without_a_model_names_and_shapes_tell_a_layer() -> None:
    layers = {"h.0.a.weight": (32, 32), "h.1.a.weight": (4096, 133_144), "h.2.Mlp.up.weight": (100, 64)}
    others = {
        "h.0.norm.weight": (64, 64),
        "h.0.router.weight": (64, 64),
        "h.0.moe.gate.weight": (64, 64),
        "h.0.Embed.weight": (64, 64),
        "h.0.narrow.weight": (31, 64),
        "h.0.small.weight": (64, 31),
    }
    wide = {"h.0.wide.weight": (64, 133_145)}
    doubtful = {"h.0.out.weight": (200, 64), "h.0.text.weight": (300, 64), "out.weight": (64, 64)}
    no_layers = {"h.0.a.bias": (64,), "h.0.vector.weight": (64,), "h.0.stack.weight": (4, 64, 64), "h.0.w": (64, 64)}
    config = {"text_config": {"decoder_vocab_size": 300, "hidden_vocab_size": True}}
    found = by_name({**layers, **others, **wide, **doubtful, **no_layers}, config)
    assert list(found.layers) == [name.removesuffix(".weight") for name in layers]
    head = "as many rows as the vocabulary: perhaps a head"
    assert found.kept == {
        **{name.removesuffix(".weight"): "by its name or shape" for name in others},
        "h.0.wide": "more input features than sums in 32 bits can hold",
        "h.0.out": head,
        "h.0.text": head,
        "out": "in no numbered block: perhaps a head",
    }
    assert found.module_of == {name: name for name in [*found.layers, *found.kept]}
    # 2 * 64 * (200 + 300 + 64) bytes.
    assert found.notices == [
        "transformers does not know the model type 'unheard-of': linear layers were chosen by name and shape; "
        "--verbose lists the others",
        "3 matrices (72.2 kB, h.0.out.weight among them) stay as they are: without the model nothing tells a layer "
        "from a head here; --only takes it",
    ]
    taken = by_name({**layers, **doubtful}, config, only=["out$", r"h\.0\.a"])
    assert list(taken.layers) == ["h.0.a", "h.0.out", "out"]
    assert taken.kept == {"h.1.a": "not in --only", "h.2.Mlp.up": "not in --only", "h.0.text": head}
    (_, one) = taken.notices
    assert one.startswith("1 matrix (38.4 kB, h.0.text.weight) stays as it is: ")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Mine"]}, "transformers does not know the model type 'unheard-of': linear"),
        ({"auto_map": {"AutoModel": "a.B"}}, "--verbose lists the others; --trust-remote-code runs the code beside it"),
        (
            {"model_type": "llama", "architectures": ["Mine"]},
            "transformers has no Mine, and these tensors fill no other of its 'llama' models: linear",
        ),
        (
            {"model_type": "llama", "architectures": ["Mine"], "auto_map": {"x": "y"}},
            "transformers has no Mine: linear",
        ),
    ],
    ids=str,
)
def test_what_is_not_known_of_a_model_is_said(config: dict[str, Any], words: str) -> None:
    assert words in by_name({"h.0.a.weight": (64, 64)}, config).notices[0]


def test_modules_are_skipped_by_the_names_that_other_classes_have_unless_an_int8_layer_ends_so() -> None:
    layer = SelectedLayer("x", info("x.weight", (64, 64)), transposed=False)
    names = {"model.a": "model.a", "model.b": "model.b", "head": "head", "int8": "model.c.b"}
    selection = Selection(
        {"int8": layer}, {"model.a": "", "model.b": "", "head": ""}, names, [], "model.", ["more", "c.b"]
    )
    assert selection.skip_modules == ["a", "head", "model.a", "model.b", "more"]


def test_heads_of_keys_and_values_are_told_where_a_config_says_them() -> None:
    def config(number: Any) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_key_value_heads=number))

    nothing: Any = SimpleNamespace(get_text_config=SimpleNamespace)
    assert [kv_heads(one) for one in (config(1), config(8), config(0), config("8"), nothing, None)] == [
        1,
        8,
        *[None] * 4,
    ]
