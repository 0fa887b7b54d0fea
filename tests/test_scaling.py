"""`llmint8 scaling`: what is simulated, what is counted, what is written down once, and what follows from it."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor

from llmint8.formats import LLMInt8Error
from llmint8.kernels.kbit.levels import levels_of
from llmint8.runtime.accuracy.methods import NotRowsError
from llmint8.runtime.commands.main import main
from llmint8.runtime.scaling import simulation
from llmint8.runtime.scaling.family import left_to_do, measure_family, open_family
from llmint8.runtime.scaling.layers import Weights
from llmint8.runtime.scaling.runs import RunFile
from llmint8.runtime.scaling.schemes import BASE, Scheme, combinations

pytestmark = pytest.mark.usefixtures("quiet_transformers")
TEXT = "The capital of France is Paris \n" * 20
SMALL = ("--tokens", 48, "--window", 24, "--bits", "3,4", "--data-type", "int,nf4", "--block-size", "32,row")
# Of the only block: what makes the inputs of a layer.
BEFORE = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
BEFORE |= {"mlp.gate_proj": "self_attn.o_proj", "mlp.up_proj": "self_attn.o_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_of_words: Callable[[Path, int], None]) -> Path:
    """`small` and `wide`, a family of two, and `text.txt`."""
    folder = tmp_path_factory.mktemp("scaling")
    for name, width in (("small", 48), ("wide", 80)):
        model_of_words(folder / name, width)
        sharpened(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def sharpened(path: Path) -> None:
    """Make the weights large enough for quantization to change what the model says, and none lie between two levels."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.1234567 if parameter.ndim > 1 else 1)
    model.save_pretrained(path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["scaling", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """Quantize and dequantize a matrix, block by block and level by level."""
    levels, out = levels_of(scheme.data_type, scheme.bits), weight.clone()
    width = scheme.block or weight.shape[1]
    for start in range(0, weight.shape[1], width):
        part = weight[:, start : start + width].float()
        absmax = part.abs().amax(1, keepdim=True).half().float()
        codes = ((part / absmax)[..., None] - levels).abs().argmin(-1)
        out[:, start : start + width] = levels[codes] * absmax
    return out


@torch.no_grad()
def logits(path: Path, scheme: Scheme | None, windows: Tensor) -> Tensor:
    """What transformers' own model says when its weights are replaced."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if scheme is None or parameter.ndim < 2 or "embed" in name or "lm_head" in name or ".gate.weight" in name:
            continue
        for matrix in parameter if parameter.ndim == 3 else [parameter]:
            matrix.copy_(rounded(matrix, scheme))
    own = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, before in BEFORE.items() if scheme and scheme.proxy else ():
        weights = [one.model.layers[0].get_submodule(name).weight for one in (model, own)]
        spread = own.model.layers[0].get_submodule(before).weight.std(1)
        kept = spread.topk(round(scheme.proxy * len(spread))).indices
        weights[0][:, kept] = weights[1][:, kept]
    return model(windows).logits[:, :-1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_a_run_is_the_model_with_its_weights_replaced(kind: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "small" if kind == "llama" else mixture(tmp_path / "experts", folder)
    member = open_family([path], folder / "text.txt", 48, 24)[0]
    schemes = [BASE, Scheme(3, "int", 32), Scheme(4, "nf4", None), Scheme(8, "float", 64), Scheme(5, "dynamic", 32)]
    schemes += [Scheme(3, "int", 32, 0.1)] if kind == "llama" else []
    file = RunFile(tmp_path / "runs.jsonl")
    measure_family(left_to_do([member], schemes, file), file, "cpu", lambda name, done: None)
    found = {run.scheme: run for run in file.of(member.measured)}
    assert found.keys() == set(schemes)
    expected = logits(path, None, member.windows)
    targets = member.windows[:, 1:, None]
    for scheme in schemes:
        got = expected if scheme == BASE else logits(path, scheme, member.windows)
        kl = float((expected.exp() * (expected - got)).sum(-1).mean())
        assert found[scheme].kl_mean == pytest.approx(kl, rel=1e-3, abs=1e-6), scheme
        assert found[scheme].perplexity == pytest.approx(math.exp(-float(got.gather(-1, targets).mean())), rel=1e-4)
    assert found[Scheme(3, "int", 32)].kl_mean > 0.01


def mixture(path: Path, folder: Path) -> Path:
    """A Mixtral, of which experts take the rows of all windows together."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=8, initializer_range=0.2, bos_token_id=None, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder / "small").save_pretrained(path)
    return path


def test_bits_are_counted_by_hand(folder: Path) -> None:
    """Of hidden size 32: four layers 32 x 32, two 48 x 32 and one 32 x 48; embedding and head 8 x 32, three norms."""
    shapes = open_family([folder / "small"], folder / "text.txt", 48, 24)[0].shapes
    weights = 4 * 1024 + 3 * 1536
    assert (shapes.weights, shapes.others) == (weights, 2 * 256 + 3 * 32)
    assert shapes.total_bits(BASE) == 16 * (weights + 608)
    # Of 48 inputs a block of 32 makes two.
    blocks = 4 * 32 + 2 * 48 + 2 * 32
    assert shapes.weight_bits(Scheme(4, "int", 32)) == 4 * weights + 16 * blocks
    assert shapes.weight_bits(Scheme(3, "float", None)) == 3 * weights + 16 * (5 * 32 + 2 * 48)
    assert shapes.weight_bits(Scheme(4, "quantile", 32)) == 4 * weights + 16 * blocks + 7 * 16 * 16
    # A tenth of 32 columns is 3, of 48 it is 5; each costs 12 bits more. Of q, k and v there is no layer before.
    kept = 3 * (32 + 2 * 48) + 5 * 32
    assert shapes.total_bits(Scheme(4, "int", 32, 0.1)) == 4 * weights + 16 * blocks + 12 * kept + 16 * 608


def measure(
    folder: Path, names: Sequence[str], file: Path, text: str = "text.txt", bits: Sequence[int] = (3, 4)
) -> None:
    """What the command does, without the page."""
    members = open_family([folder / name for name in names], folder / text, 48, 24)
    schemes = combinations(bits, ["int", "nf4"], [32, None], [0.0], ["nearest"])
    runs = RunFile(file)
    measure_family(left_to_do(members, schemes, runs), runs, "cpu", lambda name, done: None)


def test_a_run_that_was_interrupted_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_MOST_TOGETHER", 2)
    measure(folder, ["small", "wide"], tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == 2 * (1 + 2 * 3)
    add, added = RunFile.add, []

    def interrupted(self: RunFile, runs: Any) -> None:
        add(self, runs)
        added.append(1)
        if len(added) == 6:
            raise KeyboardInterrupt

    file = tmp_path / "cut.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(folder, ["small", "wide"], file)
    part = file.read_bytes()
    assert len(part.splitlines()) == 10
    file.write_bytes(part + b'{"model": "wi')
    measure(folder, ["small", "wide"], file)
    assert file.read_bytes() == whole
    # What is there is not done again, whatever the directory is called.
    shutil.copytree(folder / "small", folder / "renamed")
    monkeypatch.setattr(simulation.Simulation, "measure", None)
    measure(folder, ["wide", "renamed"], file)
    assert file.read_bytes() == whole


def test_other_weights_or_another_text_are_measured(folder: Path, tmp_path: Path) -> None:
    (folder / "other.txt").write_text(TEXT[4:])
    what = [("small", "text.txt"), ("wide", "text.txt"), ("small", "other.txt")]
    for name, text in [*what, what[2]]:
        measure(folder, [name], tmp_path / "runs.jsonl", text, bits=[3])
    found = lines(tmp_path / "runs.jsonl")
    assert [(line["model"], line["text"], line["bits"]) for line in found] == [
        (*pair, bits) for pair in what for bits in (16, 3, 3)
    ]


def test_rows_that_cannot_be_told_apart_run_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = open_family([folder / "small"], folder / "text.txt", 24, 24)[0]
    together: list[int] = []

    def parted(name: str, x: Tensor, count: int) -> Sequence[Tensor]:
        together.append(count)
        raise NotRowsError(name)

    monkeypatch.setattr(simulation, "parted_rows", parted)
    found: dict[Scheme, Any] = {}
    schemes = [Scheme(3, "int", 32), Scheme(4, "int", 32)]
    given = member.plan, member.windows, member.calibration, torch.device("cpu"), lambda name, numbers: None
    simulation.Simulation(*given).measure(schemes, found.update)
    assert list(found) == schemes
    assert together == [2]


def test_gptq_is_calibrated_with_the_model_in_16_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = open_family([folder / "small"], folder / "text.txt", 48, 24)[0]
    assert member.calibration.shape == (512 // 24, 24)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    simulated = Weights.simulated

    def recorded(self: Weights, name: str, scheme: Scheme, weight: Tensor, x: Tensor, calibration: Tensor) -> Tensor:
        seen[name].append(calibration.clone())
        return simulated(self, name, scheme, weight, x, calibration)

    monkeypatch.setattr(Weights, "simulated", recorded)
    found: dict[Scheme, Any] = {}
    schemes = [Scheme(3, "int", 32, rounding="gptq"), Scheme(4, "int", 32), Scheme(4, "int", 32, 0.1, "gptq")]
    given = member.plan, member.windows, member.calibration, torch.device("cpu"), lambda name, numbers: None
    simulation.Simulation(*given).measure(schemes, found.update)
    assert found.keys() == set(schemes)
    expected: dict[str, Tensor] = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name in seen:
            module.register_forward_pre_hook(
                lambda _, given, name=name: expected.update({name: given[0].flatten(0, 1)})
            )
    with torch.no_grad():
        model(member.calibration)
    for name, rows in seen.items():
        # The model as it is, both of GPTQ together, and the one that needs none.
        assert [len(one) for one in rows] == [0, 504, 504, 0], name
        assert torch.allclose(rows[1], expected[name], atol=1e-4), name


def test_the_page_is_one_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("small", "wide"):
        shutil.copytree(folder / name, tmp_path / f"<b>{name}")
    result = run(*tmp_path.iterdir(), "--text", folder / "text.txt", *SMALL, "--output", tmp_path / "family")
    assert result.exit_code == 0, result.output
    assert re.search(r"For \S+ kB: \d+-bit.*of .*\(perplexity [\d.]+\)", result.output, re.IGNORECASE)
    page = (tmp_path / "family" / "scaling.html").read_text()
    assert not re.search("<b>(small|wide)", page)
    assert "&lt;b&gt;wide" in page
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 3
    for words in ("Which precision", "Which data type", "How large the blocks", "32", "by row"):
        assert words in page
    assert "Columns in 16 bit" not in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "9"), "9 bits, expected 3 to 8"),
        (("--bits", "three"), "expected numbers"),
        (("--data-type", "fp4"), "data type 'fp4'"),
        (("--bits", "3", "--data-type", "nf4"), "no combination"),
        (("--block-size", "48"), "block size 48"),
        (("--proxy", "1"), "proxy share 1.0"),
        (("--rounding", "up"), "rounding 'up'"),
        (("--window", "4096", "--tokens", "4096"), "a window of 4096 tokens is too long"),
        (("--device", "nowhere"), "device 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], words: str, folder: Path, tmp_path: Path) -> None:
    small = ("--tokens", 48, "--window", 24)
    result = run(folder / "small", "--text", folder / "text.txt", *small, *options, "--output", tmp_path / "out")
    assert result.exit_code != 0
    assert words in result.output.splitlines()[-1]
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_another_tokenizer_is_no_family(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "wide", other)
    words = {word: number for number, word in enumerate(["<unk>", "Paris", "is", "The"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(other)
    with pytest.raises(LLMInt8Error, match="other: its tokenizer cuts the text in another way"):
        open_family([folder / "small", other], folder / "text.txt", 48, 24)


def test_a_weight_that_no_scale_holds_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "large"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder / "small").save_pretrained(path)
    result = run(path, "--text", folder / "text.txt", *SMALL, "--output", tmp_path / "out")
    assert "mlp.up_proj.weight: has values beyond 65504" in result.output.splitlines()[-1]
