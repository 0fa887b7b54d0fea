"""`llmint8 report`: planted outliers are found and counted, the page needs nothing else, errors are one line."""

import base64
import json
import math
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.calibration.text import load_calibration
from llmint8.formats import open_checkpoint, read_manifest
from llmint8.runtime.commands.main import main

pytest.importorskip("matplotlib")

from llmint8.runtime.report import multiples, plots
from llmint8.runtime.report.findings import Findings
from llmint8.runtime.report.report import write_report
from llmint8.runtime.report.statistics import LayerInput, hidden_inputs, read_inputs, table4

pytestmark = pytest.mark.usefixtures("quiet_transformers")

VOCABULARY, WIDTH, BLOCKS = 61, 64, 8
# Dimension of the hidden state -> the blocks whose norms make it large: in all, in a quarter, in too few.
PLANTED = {5: range(BLOCKS), 40: range(2), 23: range(1)}
PNGS = {"heat-map.png", "kept-columns.png", "errors.png", "ranges.png", "sizes.png"}


def make_llama(planted: bool = True) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=128)).eval()
    for dim, blocks in PLANTED.items() if planted else ():
        for block in blocks:
            model.model.layers[block].input_layernorm.weight.data[dim] = 30.0
            # Alike in all positions, so that it is systematic.
            model.model.embed_tokens.weight.data[:, dim] = 0.05
    return model.half()


def save(model: Any, path: Path, tokenizer: bool = True) -> None:
    model.save_pretrained(path)
    if tokenizer:
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
        backend = tokenizers.Tokenizer(words)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.txt`, the source `planted`, and in int8 `planted8`, `plain8`, `none8`, `mute8` without a tokenizer."""
    folder = tmp_path_factory.mktemp("report")
    ids = torch.randint(1, VOCABULARY, (400,), generator=torch.Generator().manual_seed(7))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    for name, planted, tokenizer in (("planted", True, True), ("plain", False, True), ("mute", True, False)):
        save(make_llama(planted), folder / name, tokenizer)
        converter.convert(folder / name, folder / f"{name}8", outliers="top-k=4", calibration=folder / "text.txt")
    converter.convert(folder / "planted", folder / "none8", outliers="none")
    return folder


@pytest.fixture(scope="module")
def planted(folder: Path) -> tuple[str, Findings]:
    """The page of `planted8` and what it shows."""
    path, findings = write_report(folder / "planted8", folder / "out", text=folder / "text.txt")
    return path.read_text(encoding="utf-8"), findings


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and here it is the words that count."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: file.write(b"PNG"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def assert_one_line_error(result: Result, *expected: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    for part in expected:
        assert part in result.stderr


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of each table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = (row for row in self.rows if row[0].startswith(name))
        return [cell.strip() for cell in found]


# Outlier features


def test_planted_dimensions_are_the_outlier_features(planted: tuple[str, Findings]) -> None:
    page, findings = planted
    assert [feature.dim for feature in findings.table.features] == [5, 40]
    assert [len(feature.blocks) for feature in findings.table.features] == [BLOCKS, 2]
    assert [feature.dim for feature in findings.table.strongest[:3]] == [5, 40, 23]
    assert findings.table.complete
    row = Tags(page).row("planted8")
    assert row[1:3] == ["2", "100"]
    assert float(row[3]) > 6
    assert Tags(page).row("GPT-2 117M")[1:4] == ["1", "25", "6"]
    assert Tags(page).row("FSEQ 6.7B")[1:] == ["6", "100", "75", "(-44, -40, -35)"]


def test_the_numbers_are_those_of_the_16_bit_model(folder: Path, planted: tuple[str, Findings]) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "planted", dtype=torch.float32)
    tokens = load_calibration(folder / "planted", model.config, folder / "text.txt", 512).tokens
    seen: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda module, args, number=number: seen.update({number: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(tokens)
    feature = planted[1].table.features[0]
    columns = torch.stack([seen[number][:, 5] for number in range(BLOCKS)])
    assert feature.absmax == pytest.approx(float(columns.abs().max()), rel=1e-3)
    assert feature.position_share == pytest.approx(float((columns.abs() >= 6).float().mean()), rel=1e-3)
    quartiles = columns.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1).quantile(0.5, dim=1)
    assert feature.quartiles == pytest.approx(quartiles.tolist(), rel=1e-3)


@pytest.mark.usefixtures("no_pictures")
def test_without_outlier_features_the_closest_are_shown(folder: Path, tmp_path: Path) -> None:
    path, findings = write_report(folder / "plain8", tmp_path, text=folder / "text.txt")
    page = Tags(path.read_text(encoding="utf-8"))
    assert findings.table.features == []
    assert page.row("plain8")[1:] == ["0", "0", "0", "\N{EN DASH}"]
    assert "no outlier feature by this definition" in page.text
    assert findings.removal is not None
    assert findings.removal.dims == [feature.dim for feature in findings.table.strongest[:7]]
    assert "so these stand in" in " ".join(page.text.split())


@pytest.mark.usefixtures("no_pictures")
def test_outliers_beyond_those_recorded_are_owned_up_to(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "planted8", tmp_path / "in")
    edit_statistics(tmp_path / "in", lambda entry: entry.update(outlier_features=60))
    path, findings = write_report(tmp_path / "in", tmp_path / "out", run=False)
    assert not findings.table.complete
    assert "lower bound" in path.read_text(encoding="utf-8")


def families() -> dict[str, tuple[Any, list[str]]]:
    """Name -> a tiny model and the kinds of inputs of its hidden state."""
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    opt = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), ["c_attn", "c_fc"]),
        "opt": (transformers.OPTForCausalLM(opt), ["q_proj, k_proj, v_proj", "fc1"]),
        "t5": (
            transformers.T5ForConditionalGeneration(t5),
            ["SelfAttention: q, k, v", "wi", "EncDecAttention.q", "EncDecAttention: k, v"],
        ),
    }


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5"])
def test_hidden_states_are_told_from_other_inputs(family: str, tmp_path: Path) -> None:
    model, expected = families()[family]
    save(model.half(), tmp_path / "in")
    converter.convert(tmp_path / "in", tmp_path / "out", outliers="top-k=4", calibration_tokens=32)
    opened = open_checkpoint(tmp_path / "out")
    inputs = read_inputs(opened, read_manifest(tmp_path / "out"), tmp_path)
    assert {one.kinds for one in hidden_inputs(inputs, opened)} == set(expected)
    assert table4(hidden_inputs(inputs, opened)).blocks == (4 if family == "t5" else 3)


def test_an_encoder_has_a_row_for_each_layer_and_its_pooler_apart(tmp_path: Path) -> None:
    """`intermediate.dense` and `output.dense` were one row, the mean of both, and the pooler one more block."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    save(transformers.BertModel(config).half(), tmp_path / "in")
    converter.convert(tmp_path / "in", tmp_path / "out", outliers="top-k=4", calibration_tokens=32)
    opened = open_checkpoint(tmp_path / "out")
    inputs = read_inputs(opened, read_manifest(tmp_path / "out"), tmp_path)
    axes = plots.kept_columns(opened).axes
    kinds = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert texts(axes[0].get_yticklabels()) == kinds
    assert texts(axes[1].get_yticklabels()) == ["pooler.dense"]
    ours = {name.removeprefix("bert."): count for name, count in opened.quantization.outliers.items()}
    names = [f"encoder.layer.{i}.{part}" for part in ("intermediate.dense", "output.dense") for i in (0, 1)]
    numbers = [text.get_text() for text in axes[0].texts]
    assert numbers[-4:] == [str(ours[name]) for name in names]
    assert texts(axes[1].texts) == [str(ours["pooler.dense"])]
    titles = [axis.get_title() for axis in multiples.errors(inputs).axes]
    assert titles == [
        *("output of query, key, value", "output of attention.output.dense", "output of intermediate.dense"),
        *("output of output.dense", "output of layers outside of the blocks", ""),
    ]
    assert_no_line_goes_back(multiples.ranges(inputs))


def texts(artists: Any) -> list[str]:
    return [artist.get_text() for artist in artists]


def assert_no_line_goes_back(figure: Any) -> None:
    lines = [
        line for axis in figure.axes for line in axis.lines if len(line.get_xdata()) > 1 and line.get_marker() in "^o"
    ]
    for line in lines:
        x = list(line.get_xdata())
        assert x == list(range(x[0], x[0] + len(x)))


def test_an_encoder_decoder_has_its_stacks_apart(tmp_path: Path) -> None:
    save(families()["t5"][0].half(), tmp_path / "in")
    converter.convert(tmp_path / "in", tmp_path / "out", outliers="top-k=4", calibration_tokens=32)
    opened = open_checkpoint(tmp_path / "out")
    inputs = read_inputs(opened, read_manifest(tmp_path / "out"), tmp_path)
    shared = next(one for one in inputs if one.kinds == "EncDecAttention: k, v")
    assert shared.blocks == ["decoder.block.0", "decoder.block.1"]  # what the encoder gives, all of them read
    figure = multiples.ranges(inputs)
    assert_no_line_goes_back(figure)
    first = figure.axes[0]  # SelfAttention, in both stacks
    assert [list(line.get_xdata()) for line in first.lines if line.get_marker() == "o"] == [[0, 1], [2, 3]]
    ticks = [first.xaxis.get_major_formatter()(x, 0) for x in range(4)]
    assert ticks == ["0", "1", "0", "1"]
    assert figure.get_supxlabel() == "block of: encoder.block | decoder.block"


def test_experts_of_a_block_are_one_point_of_a_line(planted: tuple[str, Findings]) -> None:
    expert = next(one for one in planted[1].inputs if one.kinds == "down_proj")
    place = {"kinds": "experts.*.w1", "block": "b.0"}
    inputs = [replace(expert, layers=(f"b.0.experts.{i}.w1",), absmax=[9.0 - i], **place) for i in range(8)]
    figure = multiples.ranges(inputs)
    largest = next(line for line in figure.axes[0].lines if line.get_marker() == "^")
    assert (list(largest.get_xdata()), list(largest.get_ydata())) == ([0], [9.0])
    assert len(figure.axes) == 1


def test_a_model_without_blocks_has_pictures(planted: tuple[str, Findings]) -> None:
    inputs: list[LayerInput] = [
        replace(one, layers=(f"part{i}.dense",), kinds=f"part{i}.dense", block="")
        for i, one in enumerate(planted[1].inputs[:20])
    ]
    for figure in (multiples.errors(inputs), multiples.ranges(inputs)):
        (axis,) = figure.axes
        assert texts(axis.get_xticklabels()) == [f"part{i}.dense" for i in range(12)]
    plots.heat_map(inputs, [5, 40])


def test_an_encoder_decoder_has_a_report_too(tmp_path: Path) -> None:
    save(families()["t5"][0].half(), tmp_path / "in")
    converter.convert(tmp_path / "in", tmp_path / "out", outliers="top-k=4", calibration_tokens=32)
    path, findings = write_report(tmp_path / "out", tmp_path / "report")
    assert findings.removal is None
    assert "T5ForConditionalGeneration does not predict the next token" in path.read_text(encoding="utf-8")


# Errors and sizes


def test_errors_and_sizes(folder: Path, planted: tuple[str, Findings]) -> None:
    findings = planted[1]
    first = findings.inputs[0]
    raw = read_manifest(folder / "planted8").modules["model.layers.0.self_attn.q_proj"]
    assert len(first.layers) == 3
    assert first.relative_error(0) == pytest.approx(math.sqrt(raw["errors"][0] / 3))
    assert first.relative_error(3) == pytest.approx(math.sqrt(raw["errors"][1] / 3))  # 2 was measured, 3 was not
    assert all(one.relative_error(one.kept) <= one.relative_error(0) for one in findings.inputs)
    tensors = open_checkpoint(folder / "planted8").tensors.values()
    assert sum(findings.sizes.after.values()) == sum(info.nbytes for info in tensors)
    source = sum(parameter.numel() for parameter in make_llama().parameters()) * 2
    assert sum(findings.sizes.before.values()) == source


# Removal


def test_zeroing_is_what_zero_norms_do(folder: Path, planted: tuple[str, Findings]) -> None:
    """The norms before the layers that read the hidden state zero the same numbers."""
    removal = planted[1].removal
    assert removal is not None
    assert (removal.dims, removal.draws) == ([5, 40], 10)
    model: Any = runtime.load(folder / "planted8", dtype="float32")
    tokens = load_calibration(folder / "planted8", model.config, folder / "text.txt", 512).tokens
    assert removal.tokens == tokens.numel()
    for expected, dims in ((removal.intact, []), (removal.without, removal.dims)):
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data[dims] = 0
        with torch.no_grad():
            log_p = model(tokens).logits[:, :-1].float().log_softmax(-1)
        loss = -log_p.gather(-1, tokens[:, 1:, None]).mean()
        assert expected.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
        assert expected.top1_probability == pytest.approx(float(log_p.exp().amax(-1).mean()), rel=1e-4)
    assert removal.random is not None
    moved, by_chance = (
        abs(math.log(quality.perplexity / removal.intact.perplexity)) for quality in (removal.without, removal.random)
    )
    assert moved > 3 * by_chance


# The page


def test_the_page_needs_nothing_else(folder: Path, planted: tuple[str, Findings]) -> None:
    page = planted[0]
    tags = Tags(page).tags
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == len(PNGS)
    data = [base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True) for image in images]
    assert {file.name for file in (folder / "out").iterdir()} == PNGS | {"report.html"}
    assert sorted(data) == sorted((folder / "out" / name).read_bytes() for name in PNGS)
    assert all(image.startswith(b"\x89PNG") for image in data)
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base", "form"}
    assert not [attributes for _, attributes in tags if "href" in attributes or "http-equiv" in attributes]
    assert not any(part in page for part in ("http://", "https://", "url(", "@import", "src='", "//cdn"))


def test_names_from_files_are_text_and_no_tags(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "planted8", tmp_path / "<i>a&b")
    config = json.loads((tmp_path / "<i>a&b" / "config.json").read_text())
    config["architectures"] = ["<script>alert(1)</script>"]
    config["quantization_config"]["llmint8"]["source"]["name"] = '"><img src=x>'
    config["quantization_config"]["llmint8"]["outliers"]["criterion"] = "<i>"
    config["quantization_config"]["llmint8"]["calibration"] = {"text": "<i>", "tokens": "<i>"}
    (tmp_path / "<i>a&b" / "config.json").write_text(json.dumps(config))
    path, _ = write_report(tmp_path / "<i>a&b", tmp_path / "out", run=False)
    page = Tags(path.read_text(encoding="utf-8"))
    assert {"i", "script"}.isdisjoint(tag for tag, _ in page.tags)
    assert sum(tag == "img" for tag, _ in page.tags) == len(PNGS)
    assert page.row("Made from")[1] == '"><img src=x>'
    assert page.row("<i>a&b")[1] == "2"


def test_layer_names_are_no_formulas(folder: Path, planted: tuple[str, Findings]) -> None:
    """matplotlib would take what is between dollars for TeX, and fail."""
    odd = [replace(one, kinds="$\\frac{$, b.0.\u4e16" * 9) for one in planted[1].inputs]
    multiples.errors(odd).savefig(folder / "odd.png")
    plots.heat_map(odd, [5, 40]).savefig(folder / "odd.png")


# The command


def test_the_command_writes_and_says_where(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(folder / "planted8", "--no-run")
    assert result.exit_code == 0, result.output
    made = tmp_path / "planted8-report"
    assert {file.name for file in made.iterdir()} == PNGS | {"report.html"}
    assert "Outlier features: 2, in 100% of the layers" in result.stdout
    assert "left out with --no-run" in result.stdout
    assert f"Report: {Path('planted8-report') / 'report.html'}" in result.stdout
    first = {file.name: file.read_bytes() for file in made.iterdir()}
    again = run(folder / "planted8", "--no-run", "--quiet")
    assert (again.exit_code, again.output) == (0, "")
    assert first == {file.name: file.read_bytes() for file in made.iterdir()}


@pytest.mark.usefixtures("no_pictures")
def test_the_command_runs_the_model(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "planted8", "--output", tmp_path / "a" / "b", "--text", folder / "text.txt")
    assert result.exit_code == 0, result.output
    assert "without them" in result.stdout
    page = Tags((tmp_path / "a" / "b" / "report.html").read_text(encoding="utf-8"))
    assert page.row("without the outlier features")[0].endswith(": 5, 40")


@pytest.mark.usefixtures("no_pictures")
def test_no_tokenizer_is_said_and_no_error(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "mute8", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no tokenizer" in result.stdout
    assert "Not measured: no tokenizer beside the checkpoint" in (tmp_path / "report.html").read_text(encoding="utf-8")


def edit_statistics(path: Path, edit: Any) -> None:
    manifest = json.loads((path / "llmint8_manifest.json").read_text())
    edit(next(entry for entry in manifest["modules"].values() if "dims" in entry))
    (path / "llmint8_manifest.json").write_text(json.dumps(manifest))


def test_no_statistics(folder: Path, tmp_path: Path) -> None:
    assert_one_line_error(run(folder / "none8", "--output", tmp_path / "a"), "no statistics", "--outliers top-k=16")
    shutil.copytree(folder / "planted8", tmp_path / "bnb")
    (tmp_path / "bnb" / "llmint8_manifest.json").unlink()
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())
    del config["quantization_config"]["llmint8"]
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(config))
    assert_one_line_error(run(tmp_path / "bnb", "--output", tmp_path / "a"), "bitsandbytes", "llmint8-convert")
    assert_one_line_error(run(folder / "planted"), "not an int8 checkpoint")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    result = run(folder / "planted8", "--output", tmp_path / "a", "--text", empty)
    assert_one_line_error(result, "empty.txt", "no text")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"absmax": None},
        {"dims": [WIDTH] * 16},
        {"dims": ["5"] * 16},
        {"positions": [0.5]},
        {"quartiles": [[1, 2]] * 16},
        {"ks": [2, 4], "errors": [1, 1]},
        {"errors": "x"},
        {"absmax_median": "nan"},
        {"absmax_median": 10**400},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_malformed_statistics(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "planted8", tmp_path / "in")
    edit_statistics(tmp_path / "in", lambda entry: entry.update(changes))
    result = run(tmp_path / "in", "--output", tmp_path / "out", "--no-run")
    assert_one_line_error(result, "llmint8_manifest.json", "q_proj: malformed statistics", "convert the source again")


def test_without_matplotlib(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "llmint8.runtime.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line_error(run(folder / "planted8", "--output", tmp_path), "pip install 'llmint8[report]'")
