"""OPT as Meta hands it out, written here as metaseq and fairscale write it: the same bytes as from the Hub's layout."""

import hashlib
import json
import pickle
import re
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from llmint8 import converter
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.formats import CorruptFileError, LLMInt8Error, SourceError, open_checkpoint, open_source
from llmint8.formats.containers import tensors
from llmint8.formats.containers.tensors import TensorInfo
from llmint8.formats.sources.metaseq.config import derive_config
from llmint8.runtime.accuracy.compare import load_reference
from llmint8.runtime.commands.main import main

State = dict[str, Tensor]
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "ffn_dim": 128, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "word_embed_proj_dim": 64}
OF_350M = {**SIZES, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
CFG = {"cfg": {"model": {"decoder_attention_heads": 4}}, "optimizer_history": [{"num_updates": 143_000}]}


def hugging_face(path: Path, sizes: dict[str, Any] = SIZES) -> OPTForCausalLM:
    """Save a random model in the layout of the Hub."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes)).half()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(path)
    return model


def metaseq_state(model: OPTForCausalLM) -> State:
    """Return the tensors under metaseq's names, with K, V and Q in one."""
    state = {
        name.removeprefix("model."): tensor for name, tensor in model.state_dict().items() if "lm_head" not in name
    }
    found: State = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in state.items():
        if "k_proj" in name:
            parts = [state[name.replace("k_proj", f"{which}_proj")] for which in "kvq"]
            found[name.replace("k_proj", "qkv_proj")] = torch.cat(parts)
        elif "v_proj" not in name and "q_proj" not in name:
            name = name.replace("decoder.final_layer_norm", "decoder.layer_norm")
            found[re.sub(r"project_(in|out)\b", r"project_\1_dim", name)] = tensor
    return found


def model_parallel(state: State, count: int) -> list[State]:
    """Split as Megatron does: columns of the first of two products, rows of the second."""
    parts: list[State] = [{} for _ in range(count)]
    for name, tensor in state.items():
        if "qkv_proj" in name:
            thirds = [third.chunk(count) for third in tensor.chunk(3)]
            pieces = [torch.cat([third[number] for third in thirds]) for number in range(count)]
        elif any(part in name for part in ("embed_tokens", "output_projection", "fc1")):
            pieces = list(tensor.chunk(count))
        elif name.endswith(("fc2.weight", "out_proj.weight")):
            pieces = list(tensor.chunk(count, 1))
        else:
            pieces = [tensor] * count
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def fully_sharded(part: State, count: int) -> list[dict[str, Any]]:
    """Flatten each layer and the rest, and give every rank an equal share, padded: as FSDP of fairscale does."""
    units: dict[str, State] = {}
    for name, tensor in part.items():
        if name != "decoder.version":
            layer = re.match(r"decoder\.layers\.\d+", name)
            path = layer[0] if layer else ""
            units.setdefault(path, {})[name.removeprefix(f"{path}.") if path else name] = tensor
    ranks: list[dict[str, Any]] = []
    for rank in range(count):
        described = []
        model = {"decoder.version": part["decoder.version"]}
        for path, tensors_of in units.items():
            chunks = torch.cat([tensor.flatten() for tensor in tensors_of.values()]).chunk(count)
            share = chunks[rank] if rank < len(chunks) else chunks[0][:0]
            padding = chunks[0].numel() - share.numel()
            model[f"{path}.flat_param_0" if path else "flat_param_0"] = pad(share, (0, padding), value=9.0).clone()
            shapes = [tensor.shape for tensor in tensors_of.values()]
            flat = {"names": [*tensors_of], "shapes": shapes, "numels": [shape.numel() for shape in shapes]}
            params = {"flat_param_0": {**flat, "padding": padding}}
            described.append({"fsdp_path": path, "params": params, "shared_param_info": []})
        metadata = {"param_metadata": described, "buffer_names": ["decoder.version"]}
        ranks.append({"model": model, "shard_metadata": metadata})
    return ranks


def write(folder: Path, state: State, parts: int, shards: int, stem: str) -> Path:
    """Write a checkpoint; of one shard flattened with shards=1, with the parameters one by one with shards=0."""
    folder.mkdir()
    for p, part in enumerate(model_parallel(state, parts)):
        middle = f"-model_part-{p}" if parts > 1 else ""
        for s, rank in enumerate(fully_sharded(part, shards) if shards else [{"model": part}]):
            torch.save({**CFG, **rank}, folder / f"{stem}{middle}{f'-shard{s}' if shards > 1 else ''}.pt")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A model in the layout of the Hub, and its tensors as metaseq names them."""
    path = tmp_path_factory.mktemp("opt") / "opt"
    return path, metaseq_state(hugging_face(path))


@pytest.fixture(scope="module")
def converted(model: tuple[Path, State], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weight files that the model in the Hub's layout becomes."""
    return weights(convert(model[0], tmp_path_factory.mktemp("out") / "out"))


def convert(source: Path, out: Path, **options: Any) -> Path:
    converter.convert(source, out, outliers="top-k=4", **options)
    return out


def weights(out: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}


FORMS = {
    "992 files, of which these are 20": (4, 5, "checkpoint_last"),
    "shards of which the last has nothing but padding of a layer": (1, 300, "checkpoint_last"),
    "flat parts": (4, 1, "reshard"),
    "parts": (4, 0, "reshard"),
    "OPT-IML-175B": (16, 0, "checkpoint_1_8000"),
    "OPT-IML-30B": (2, 0, "checkpoint_1_4000.pt"),
    "one flat file": (1, 1, "reshard"),
    "one file": (1, 0, "restored"),
    "shards without parts": (1, 3, "checkpoint_last"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_bytes_of_the_hubs_layout(
    form: str, model: tuple[Path, State], converted: dict[str, str], tmp_path: Path
) -> None:
    parts, shards, stem = FORMS[form]
    source = write(tmp_path / "source", model[1], parts, shards, stem)
    assert weights(convert(source, tmp_path / "out")) == converted
    written, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", model[0]))
    assert {key: written.get(key) for key in SIZES} == {key: expected[key] for key in SIZES}


def test_opt_350m_has_projections_and_norms_behind(tmp_path: Path) -> None:
    state = metaseq_state(hugging_face(tmp_path / "opt", OF_350M))
    source = write(tmp_path / "source", state, 1, 0, "reshard")
    assert weights(convert(source, tmp_path / "out")) == weights(convert(tmp_path / "opt", tmp_path / "expected"))
    config = open_checkpoint(tmp_path / "out").config
    assert (config["do_layer_norm_before"], config["word_embed_proj_dim"]) == (False, 32)


def test_rows_are_those_of_the_whole(
    model: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 500)
    expected = open_source(model[0])
    for source in (
        write(tmp_path / "a", model[1], 4, 5, "checkpoint_last"),
        write(tmp_path / "b", model[1], 2, 0, "reshard"),
    ):
        opened = open_source(source)
        assert [*opened.tensors] == [*expected.tensors]
        for name in opened.tensors:
            blocks = list(opened.read_rows(name))
            assert torch.equal(torch.cat(blocks), expected.read(name))
            assert torch.equal(opened.read(name), expected.read(name))
            assert len(blocks) > 1 or opened.tensors[name].nbytes < 1000


# Layers, heads, features, features of the FFN: table 1 of the paper, and the configs on the Hub.
PUBLISHED = [
    (12, 12, 768, 3072),
    (24, 16, 1024, 4096),
    (24, 32, 2048, 8192),
    (32, 32, 2560, 10240),
    (32, 32, 4096, 16384),
    (40, 40, 5120, 20480),
    (48, 56, 7168, 28672),
    (64, 72, 9216, 36864),
    (96, 96, 12288, 49152),
]


@pytest.mark.parametrize(("layers", "heads", "hidden", "ffn"), PUBLISHED)
def test_the_config_of_every_published_size(layers: int, heads: int, hidden: int, ffn: int) -> None:
    shapes = {"embed_tokens.weight": (50272, hidden), "embed_positions.weight": (2050, hidden)}
    for number in range(layers):
        shapes[f"layers.{number}.self_attn.out_proj.weight"] = (hidden, hidden)
        shapes[f"layers.{number}.fc1.weight"] = (ffn, hidden)
    infos = {f"model.decoder.{name}": TensorInfo(name, "F16", shape, "", 0) for name, shape in shapes.items()}
    config, notices = derive_config(Path("opt"), infos, {})
    assert not notices
    expected = (layers, heads, hidden, ffn, 2048, 50272)
    names = (
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_size",
        "ffn_dim",
        "max_position_embeddings",
        "vocab_size",
    )
    assert tuple(config[name] for name in names) == expected


def test_a_number_of_heads_that_no_file_says_is_guessed_aloud_and_a_config_beside_is_believed(
    model: tuple[Path, State], tmp_path: Path
) -> None:
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    torch.save({"model": model[1]}, source / "reshard.pt")
    opened = open_source(source)
    assert any("num_attention_heads is taken to be 1" in notice for notice in opened.notices)
    (source / "config.json").write_text((model[0] / "config.json").read_text())
    opened = open_source(source)
    assert not any("heads" in notice for notice in opened.notices)
    assert opened.config["num_attention_heads"] == 4


class _Foreign:
    """Stands for a class of metaseq or omegaconf; pickled under another name than it has here."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class _Mapping(dict[Any, Any]):
    pass


def test_classes_that_are_not_installed_stay_names_and_nothing_is_run(
    model: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("metaseq_configs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for cls in (_Foreign, _Mapping):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    node = _Foreign(_content={"decoder_attention_heads": _Foreign(_val=8), ("a", "tuple"): None}, _parent=None)
    node._parent = node
    values = {"cfg": node, "args": _Attack(tmp_path / "touched"), "extra": _Mapping({"key": [1.5, None, True]})}
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    torch.save({"model": model[1], **values}, source / "reshard.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError, AttributeError)):
        torch.load(source / "reshard.pt", weights_only=False)
    (tmp_path / "touched").unlink(missing_ok=True)
    assert open_source(source).config["num_attention_heads"] == 8
    assert not (tmp_path / "touched").exists()


def test_tensors_that_differ_between_parts_are_reported(model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 3 + 1, 0, "reshard")
    saved = torch.load(source / "reshard-model_part-2.pt")
    saved["model"]["decoder.layers.1.fc2.bias"][5] += 0.25
    torch.save(saved, source / "reshard-model_part-2.pt")
    report = converter.convert(source, tmp_path / "out", outliers="none")
    (notice,) = [notice for notice in report.notices if "model part" in notice]
    assert notice.startswith("model.decoder.layers.1.fc2.bias: model part 2 holds another than part 0")
    assert notice.endswith("0.25")
    bias = open_checkpoint(tmp_path / "out").read("model.decoder.layers.1.fc2.bias")
    assert torch.equal(bias, model[1]["decoder.layers.1.fc2.bias"])


def change(name: str, action: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        saved = torch.load(folder / name)
        action(saved)
        torch.save(saved, folder / name)

    return apply


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)] and None


def another_run(saved: dict[str, Any]) -> None:
    saved["optimizer_history"] = [{"num_updates": 7}]


def another_metadata(saved: dict[str, Any]) -> None:
    saved["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]["names"][0] = "fc3.weight"


def too_much_padding(saved: dict[str, Any]) -> None:
    saved["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]["padding"] = 10**9


# name -> what is done to a checkpoint of 2 parts and 3 shards, and words of the message
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (remove("*part-1-shard1.pt"), r"checkpoint_last-model_part-1-shard1.pt is missing: 5 of 6"),
    "a part is missing": (remove("*part-0*"), r"part-0-shard0.pt, .*part-0-shard1.pt, .*shard2.pt are missing: 3 of 6"),
    "the last shards are missing": (remove("*shard2.pt"), "elements are there; are all shards of this part downloaded"),
    "the last part is missing": (remove("*part-1-*"), "has 32 of 64 columns; are all model-parallel parts there"),
    "another checkpoint beside it": (
        lambda folder: (folder / "reshard-model_part-0.pt").write_bytes(b""),
        "several checkpoints: checkpoint_last-model_part-.* leave those of one in it",
    ),
    "a part twice": (
        lambda folder: (folder / "checkpoint_last-model_part-01-shard2.pt").write_bytes(b""),
        "are the same part",
    ),
    "another run": (
        change(
            "checkpoint_last-model_part-1-shard0.pt", lambda saved: saved.update(optimizer_history=[{"num_updates": 7}])
        ),
        "not of the same checkpoint",
    ),
    "another run in a whole part": (
        lambda folder: [
            change(
                f"checkpoint_last-model_part-1-shard{s}.pt",
                lambda saved: saved.update(optimizer_history=[{"num_updates": 7}]),
            )(folder)
            for s in range(3)
        ],
        "after 7 updates, .* after 143000",
    ),
    "other names in a shard": (
        change("checkpoint_last-model_part-1-shard2.pt", another_metadata),
        "shard_metadata is another",
    ),
    "more padding than there is": (
        change("checkpoint_last-model_part-0-shard2.pt", too_much_padding),
        "padded by 1000000000 of",
    ),
    "no metadata": (
        lambda folder: [
            change(file.name, lambda saved: saved.pop("shard_metadata"))(folder) for file in sorted(folder.iterdir())
        ],
        "has no shard_metadata, so its 3 shards cannot be put together",
    ),
    "metadata of something else": (
        change("checkpoint_last-model_part-0-shard0.pt", lambda saved: saved.update(shard_metadata=[3])),
        "shard_metadata is not fairscale's",
    ),
    "a share is missing": (
        change("checkpoint_last-model_part-0-shard0.pt", lambda saved: saved["model"].pop("flat_param_0")),
        "flat_param_0: missing",
    ),
    "no model": (change("checkpoint_last-model_part-0-shard0.pt", lambda saved: saved.pop("model")), "no `model`"),
    "a broken file": (
        lambda folder: (folder / "checkpoint_last-model_part-1-shard2.pt").write_bytes(b"no file of torch"),
        "cannot be read as a checkpoint of tensors",
    ),
    "a file that is cut short": (
        lambda folder: (folder / "checkpoint_last-model_part-1-shard2.pt").write_bytes(
            (folder / "checkpoint_last-model_part-1-shard2.pt").read_bytes()[:-3000]
        ),
        "cannot be read as a checkpoint of tensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_go_together_is_named(fault: str, model: tuple[Path, State], tmp_path: Path) -> None:
    action, message = FAULTS[fault]
    source = write(tmp_path / "source", model[1], 2, 3, "checkpoint_last")
    action(source)
    with pytest.raises((SourceError, CorruptFileError), match=message):
        converter.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def without_layer_1(saved: dict[str, Any]) -> None:
    saved["model"] = {name: tensor for name, tensor in saved["model"].items() if "layers.1." not in name}


def without_a_bias(saved: dict[str, Any]) -> None:
    del saved["model"]["decoder.layers.1.fc2.bias"]


def of_another_dtype(saved: dict[str, Any]) -> None:
    saved["model"]["decoder.layers.1.fc2.weight"] = saved["model"]["decoder.layers.1.fc2.weight"].float()


def laid_out_by_columns(saved: dict[str, Any]) -> None:
    saved["model"]["decoder.layers.1.fc2.weight"] = torch.ones(64, 64).half().t()


@pytest.mark.parametrize(
    ("parts", "action", "message"),
    [
        ((0, 1), without_layer_1, r"decoder\.layers\.1: missing; there are 2 layers"),
        ((0,), without_a_bias, r"decoder\.layers\.1\.fc2\.bias: not in model part 0, and in another"),
        ((1,), without_a_bias, r"decoder\.layers\.1\.fc2\.bias: in 1 of 2 model parts"),
        ((1,), of_another_dtype, r"fc2\.weight: F32 \[64, 64\] in model part 1, F16 \[64, 64\] in part 0"),
        ((1,), laid_out_by_columns, r"part-1\.pt: decoder\.layers\.1\.fc2\.weight: not contiguous"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(
    parts: tuple[int, ...],
    action: Callable[[dict[str, Any]], None],
    message: str,
    model: tuple[Path, State],
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "source", model[1], 2, 0, "reshard")
    for part in parts:
        change(f"reshard-model_part-{part}.pt", action)(source)
    with pytest.raises(SourceError, match=message):
        open_source(source)


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    state = metaseq_state(hugging_face(tmp_path / "opt", {**SIZES, "num_hidden_layers": 11}))
    names = [*open_source(write(tmp_path / "source", state, 1, 0, "reshard")).tensors]
    assert names.index("model.decoder.layers.9.fc1.bias") < names.index("model.decoder.layers.10.fc1.bias")


def test_weights_that_transformers_reads_come_first(model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    hugging_face(source, OF_350M)
    assert "model.decoder.project_in.weight" in open_source(source).tensors


def test_parameters_of_another_model_are_refused_by_name(model: tuple[Path, State], tmp_path: Path) -> None:
    state = {**model[1], "decoder.layers.0.ffn_layernorm.weight": torch.ones(128)}
    source = write(tmp_path / "source", state, 1, 0, "reshard")
    with pytest.raises(SourceError, match=r"decoder\.layers\.0\.ffn_layernorm\.weight: not a tensor of OPT"):
        open_source(source)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_projection_must_be_the_embedding(same: bool, model: tuple[Path, State], tmp_path: Path) -> None:
    projection = model[1]["decoder.embed_tokens.weight"].clone()
    projection[7, 3] += 0 if same else 1
    source = write(tmp_path / "source", {**model[1], "decoder.output_projection.weight": projection}, 2, 0, "reshard")
    opened = open_source(source)
    name = "model.decoder.embed_tokens.weight"
    if same:
        assert torch.equal(opened.read(name), model[1]["decoder.embed_tokens.weight"])
    else:
        with pytest.raises(SourceError, match=r"output_projection\.weight differs from .* by up to 1"):
            opened.read(name)


LETTERS = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}  # numbered as GPT-2's own file would
MERGES = "#version: 0.2\na b\n"
OF_OPT = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "ab": 4, "b": 5, "a": 6, "Ġ": 7, "<|endoftext|>": 8}


@pytest.mark.parametrize("numbered", ["as the model", "as GPT-2, with a dictionary"])
def test_the_tokenizer_goes_along(numbered: str, model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    (source / "gpt2-merges.txt").write_text(MERGES)
    if numbered == "as the model":
        (source / "gpt2-vocab.json").write_text(json.dumps(OF_OPT))
    else:
        (source / "gpt2-vocab.json").write_text(json.dumps(LETTERS))
        (source / "dict.txt").write_text("2 900\n1 80\n0 7\n3 6\n4 0\n")
    (source / "LICENSE.md").write_text("for research\n")
    convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("aab b").input_ids == [2, 6, 4, 7, 5]  # `</s>` comes first, as in training
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"vocab.json", "merges.txt", "LICENSE.md"} <= names
    assert not {"gpt2-vocab.json", "gpt2-merges.txt", "dict.txt"} & names


@pytest.mark.parametrize("linked", ["gpt2-vocab.json", "gpt2-merges.txt", "dict.txt", "config.json"])
def test_a_tokenizer_or_config_linked_from_outside_is_refused(
    linked: str, model: tuple[Path, State], tmp_path: Path
) -> None:
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    files = {
        "gpt2-merges.txt": MERGES,
        "gpt2-vocab.json": json.dumps(LETTERS),
        "dict.txt": "2 900\n",
        "config.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (source / name).symlink_to(tmp_path / name) if name == linked else (source / name).write_text(text)
    with pytest.raises(SourceError, match=rf"{linked}.*outside of the checkpoint"):
        open_source(source)


def test_a_missing_tokenizer_is_said(model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 1, 0, "reshard")
    (source / "gpt2-vocab.json").write_text(json.dumps(LETTERS))
    assert any(
        "gpt2-merges.txt of metaseq's projects/OPT/assets is not there" in notice
        for notice in open_source(source).notices
    )
    (source / "gpt2-merges.txt").write_text(MERGES)
    assert any("there is no dict.txt" in notice for notice in open_source(source).notices)


def test_commands_take_it_as_any_source(model: tuple[Path, State], tmp_path: Path) -> None:
    source, out = write(tmp_path / "source", model[1], 2, 3, "checkpoint_last"), tmp_path / "out"
    planned = CliRunner().invoke(convert_command, [str(source), str(out), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "18 linear layers" in planned.output
    assert not out.exists()
    sized = json.loads(CliRunner().invoke(main, ["plan", str(source), "--json"]).stdout)
    assert (sized["class"], sized["int8_layers"]) == ("OPTForCausalLM", 18)
    whole = weights(convert(source, tmp_path / "whole"))
    seen: list[str] = []

    def interrupt(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt)
    assert weights(convert(source, out)) == whole
    assert converter.convert(source, out, outliers="top-k=4").already
    assert not compare_with_source(open_checkpoint(out), open_source(source)).problems
    change("checkpoint_last-model_part-1-shard1.pt", lambda saved: saved["model"]["flat_param_0"].add_(1))(source)
    assert compare_with_source(open_checkpoint(out), open_source(source)).problems
    with pytest.raises(LLMInt8Error, match="something else"):
        convert(source, out)


def test_it_is_a_reference_for_eval(model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 2, 0, "reshard")
    tokens = torch.arange(12).view(2, 6)
    expected = OPTForCausalLM.from_pretrained(model[0], dtype=torch.float32)(tokens).logits
    assert torch.equal(load_reference(open_source(source), 6, "cpu")(tokens).logits, expected)


@pytest.mark.soak
def test_few_files_are_open_at_a_time(model: tuple[Path, State], tmp_path: Path) -> None:
    source = write(tmp_path / "source", model[1], 4, 40, "checkpoint_last")
    limit = 96  # torch and the interpreter have some of them
    code = (
        "import resource, sys; from llmint8 import converter;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}));"
        "converter.convert(sys.argv[1], sys.argv[2], outliers='none', jobs=4)"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > limit
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], check=True)
