"""The calibrated pass through models of any build: experts without tokens, blocks that run again, and what is said."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from torch.nn import functional
from transformers import dynamic_module_utils

from llmint8 import converter, formats, runtime
from llmint8.converter.coding import round_to_nearest
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.outliers.choosing import select
from llmint8.converter.outliers.criterion import Criterion
from llmint8.converter.outliers.measuring import InputStatistics, column_norms

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# The experts of Mixtral as many have written them: each is called, whether it has tokens or not.
CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "somebodys-own"

    def __init__(self, width=64, vocab_size=32, loops=1, **kwargs):
        super().__init__(**kwargs)
        self.width, self.vocab_size, self.loops = width, vocab_size, loops


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.experts = nn.ModuleList(Expert(config.width) for _ in range(3))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids).flatten(0, 1)
        for loop in range(self.config.loops):
            chosen = input_ids.flatten() % 2 + loop
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                x = x.index_add(0, rows, expert(x[rows]))
        return CausalLMOutput(logits=self.lm_head(x))
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a checkpoint with model code of its own, random weights and so many loops; returns its directory."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)

    def write(code: str = CODE, **config: Any) -> Path:
        path = tmp_path / "source"
        path.mkdir()
        (path / "own.py").write_text(code)
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        names = {"model_type": "somebodys-own", "architectures": ["OwnModel"], "auto_map": auto_map}
        (path / "config.json").write_text(json.dumps(names | {"dtype": "float32"} | config))
        torch.manual_seed(0)
        tensors = {"embed.weight": torch.randn(32, 64), "lm_head.weight": torch.randn(32, 64)}
        for number in range(3):
            tensors[f"experts.{number}.up.weight"] = torch.randn(128, 64) / 8
            tensors[f"experts.{number}.up.bias"] = torch.randn(128)
            tensors[f"experts.{number}.down.weight"] = torch.randn(64, 128) / 8
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return write


def convert(source: Path, out: Path, **options: Any) -> converter.ConversionReport:
    return converter.convert(source, out, trust_remote_code=True, **options)


def test_an_expert_without_a_token_is_converted_and_listed(own_model: Any, tmp_path: Path) -> None:
    report = convert(own_model(), tmp_path / "out")
    assert not any("ended early" in notice for notice in report.notices)
    assert report.uncalibrated == ["experts.2.up", "experts.2.down"]
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert formats.check_values(checkpoint) == []
    assert checkpoint.quantization.outliers["experts.2.up"] == 0
    assert checkpoint.quantization.outliers["experts.1.up"] > 0


def test_an_expert_whose_tokens_come_later_is_measured_then(own_model: Any, tmp_path: Path) -> None:
    report = convert(own_model(loops=2), tmp_path / "out")
    assert report.uncalibrated == []
    modules = formats.read_manifest(tmp_path / "out").modules
    tokens = [modules[f"experts.{number}.up"]["tokens"] for number in range(3)]
    assert tokens[0] + tokens[2] == tokens[1] == 512  # all tokens pass through the second, in one loop or the other


def test_the_calls_of_a_shared_block_add_up(tmp_path: Path) -> None:
    """ALBERT has one block, which runs as often as its config says."""
    config = transformers.AlbertConfig(
        vocab_size=256,
        embedding_size=32,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    transformers.AlbertForMaskedLM(config).half().save_pretrained(tmp_path / "source")
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    modules = formats.read_manifest(tmp_path / "out").modules
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert {modules[f"{block}.{name}"]["tokens"] for name in ("attention.query", "ffn", "ffn_output")} == {3 * 512}
    assert modules["albert.encoder.embedding_hidden_mapping_in"]["tokens"] == 512
    assert modules[f"{block}.attention.key"]["shares_input_with"] == f"{block}.attention.query"
    assert report.uncalibrated == []


def test_a_conversion_of_a_shared_block_goes_on_with_the_same_bytes(own_model: Any, tmp_path: Path) -> None:
    source = own_model(loops=2)
    convert(source, tmp_path / "whole")
    for count in range(1, 11, 2):
        left = iter(range(count))

        def progress(name: str, nbytes: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        out = tmp_path / str(count)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, progress=progress, jobs=1)
        convert(source, out)
        for file in (tmp_path / "whole").iterdir():
            assert file.read_bytes() == (out / file.name).read_bytes(), (count, file.name)


CRITERIA = [Criterion("top-k", 8), Criterion("threshold", 4.0), Criterion("systematic", None)]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_two_calls_show_what_one_with_the_rows_of_both_does(criterion: Criterion) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(96, 64), torch.randn(32, 64)
    first[:, 5] *= 20
    second[:, 40] *= 60  # seen in the second call only
    weight = torch.randn(24, 64)
    norms = column_norms(weight, *round_to_nearest(weight, formats.Scheme()))

    def measured(*inputs: torch.Tensor) -> Any:
        statistics = InputStatistics(criterion, formats.Scheme("zeropoint"))
        for x in inputs:
            for layer in ("q", "k"):
                dims = statistics.see(layer, x, x.view_as(x), norms, functional.linear(x, weight))
        (group,) = statistics.finish()
        assert group.dims.equal(dims)
        return group

    apart, together = measured(first, second), measured(torch.cat([first, second]))
    assert apart.layers == together.layers == ["q", "k"]
    assert apart.dims.equal(together.dims)
    assert apart.dims[:2].tolist() == [40, 5]
    assert apart.absmax.equal(together.absmax)
    for key in ("tokens", "absmax_median", "outlier_features", "dims", "absmax", "positions"):
        assert apart.statistics[key] == together.statistics[key], key
    if criterion.kind != "top-k":  # for a budget the errors count, and those of a call are relative to its own output
        assert select([apart], criterion) == select([together], criterion)
        assert apart.order.equal(together.order)
    assert apart.ks == together.ks
    assert apart.errors == pytest.approx(together.errors, rel=0.3)


# Computed when the model is built, in no file, and unknown to transformers, as in much code on the Hub.
COMPUTED = CODE.replace(
    "        self.lm_head =",
    """        gain = torch.ones(config.width).index_fill(0, torch.tensor([9]), 50.0)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("even", torch.arange(config.width) % 2 == 0, persistent=False)
        self.register_buffer("order", torch.empty(config.width, dtype=torch.int64), persistent=False)
        self.order[:] = torch.arange(config.width).flip(0)
        self.shift = torch.full((config.width,), 3.0)
        self.lm_head =""",
).replace(
    "x = self.embed(input_ids).flatten(0, 1)",
    "x = (self.embed(input_ids)[..., self.order] * self.gain * self.even + self.shift).flatten(0, 1)",
)


@pytest.mark.usefixtures("poisoned_memory")  # memory that nobody wrote to looked like values
def test_what_a_model_computes_when_it_is_built_is_there_in_the_pass_and_after_loading(
    own_model: Any, tmp_path: Path
) -> None:
    source = own_model(COMPUTED)
    report = convert(source, tmp_path / "out")
    assert len(report.notices) == 1  # of the tokenizer
    embedding = formats.open_source(source).read("embed.weight").flip(1)
    embedding[:, 9] *= 50
    embedding[:, 1::2] = 0
    expected = embedding[::2].add(3).abs().amax(0)  # the first expert has the even ids
    found = formats.read_manifest(tmp_path / "out").modules["experts.0.up"]
    assert found["dims"][:4] == expected.argsort(descending=True)[:4].tolist()
    assert found["absmax"][:4] == pytest.approx(expected.sort(descending=True).values[:4].tolist(), rel=1e-3)

    model: Any = runtime.load(tmp_path / "out", trust_remote_code=True)
    assert model.gain.tolist() == [50.0 if number == 9 else 1.0 for number in range(64)]
    assert model.even.tolist() == [True, False] * 32
    assert model.order.tolist() == list(range(63, -1, -1))
    assert model.shift.tolist() == [3.0] * 64
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_initialisation_that_looks_at_weights_takes_nothing_away(own_model: Any, tmp_path: Path) -> None:
    looks = """    def _init_weights(self, module):
        if hasattr(module, "bias"):
            assert module.bias.sum().item() > -1e9

    def get_input_embeddings"""
    source = own_model(COMPUTED.replace("    def get_input_embeddings", looks))
    assert convert(source, tmp_path / "out").uncalibrated == ["experts.2.up", "experts.2.down"]
    model: Any = runtime.load(tmp_path / "out", trust_remote_code=True)
    assert model.order.tolist() == list(range(63, -1, -1))


def test_what_is_computed_at_random_is_the_same_in_every_run(own_model: Any, tmp_path: Path) -> None:
    source = own_model(COMPUTED.replace("torch.ones(config.width)", "torch.randn(config.width)"))
    state = torch.random.get_rng_state()
    for out in ("a", "b"):
        convert(source, tmp_path / out)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert torch.random.get_rng_state().equal(state)


def test_what_is_drawn_at_random_on_the_way_is_the_same_in_every_run(own_model: Any, tmp_path: Path) -> None:
    """As Reformer draws its hashes."""
    code = CODE.replace("flatten(0, 1)", "flatten(0, 1) * torch.rand(64).to(input_ids.device)", 1)
    source = own_model(code.replace("self.embed =", "torch.rand(1, device='cpu')\n        self.embed ="))
    for out in ("a", "b"):
        torch.manual_seed(ord(out))
        state = torch.random.get_rng_state()
        convert(source, tmp_path / out)
        assert torch.random.get_rng_state().equal(state)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


NOBODYS = COMPUTED.replace("torch.full((config.width,), 3.0)", "0").replace(
    "self.lm_head =",
    """self.register_buffer("nobodys", (torch.empty(config.width)).detach(), persistent=False)
        self.lm_head =""",
    1,
)


@pytest.mark.parametrize(
    "made", ["torch.empty(64)", "torch.Tensor(64)", "self.embed.weight[0]", "torch.empty(64).long()"]
)
def test_a_buffer_that_nobody_wrote_to_is_named(
    own_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, made: str
) -> None:
    made = made.replace("torch.empty(64).long()", "torch.empty(64, dtype=torch.int64)")
    report = convert(
        own_model(NOBODYS.replace("torch.empty(config.width)).detach", f"{made}).detach")), tmp_path / "out"
    )
    assert "1 buffers of the model seem to have no values, nobodys among them" in report.notices[0]
    model: Any = runtime.load(tmp_path / "out", trust_remote_code=True)
    assert "1 buffers of the model seem to have no values, nobodys among them" in caplog.text
    assert model.nobodys.isnan().all() or (model.nobodys == torch.iinfo(torch.int64).max).all()


def test_a_buffer_that_nobody_wrote_to_is_believed_by_nobody(own_model: Any, tmp_path: Path) -> None:
    source = own_model(NOBODYS.replace("self.even + ", "self.even + 0 * self.nobodys + "))
    report = convert(source, tmp_path / "out")
    assert "1 buffers of the model seem to have no values, nobodys among them" in report.notices[0]
    assert report.notices[1].startswith(
        "the input of experts.0.up and 3 more holds NaN or infinity and was not measured"
    )
    assert len(report.uncalibrated) == 6
    quantization = formats.open_checkpoint(tmp_path / "out").quantization
    assert (quantization.criterion, quantization.calibration) == ("top-k=16", None)


@pytest.mark.parametrize("made", ["torch.arange(10**12)", "torch.ones(10**6, 10**6)[:1]"])
def test_what_would_fill_the_memory_is_not_computed(own_model: Any, tmp_path: Path, made: str) -> None:
    source = own_model(COMPUTED.replace("torch.full((config.width,), 3.0)", f"float(({made}).shape[0])"))
    with pytest.raises(formats.SourceError, match=r"a tensor of \d+\.\d GB would be computed"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**_VISION, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_LLAMA), image_token_index=255
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("model", [llama, t5, llava])
def test_no_layers_keys_and_values_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    model().half().save_pretrained(tmp_path / "source")
    kept, original = [], transformers.Cache.update

    def update(cache: Any, keys: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        kept.extend([] if keys.is_meta else [keys])  # the plan runs the model without data
        return original(cache, keys, *arguments, **named)

    monkeypatch.setattr(transformers.Cache, "update", update)
    report = converter.convert(tmp_path / "source", tmp_path / "out")
    assert not kept
    assert not any("ended early" in notice for notice in report.notices)


def whisper(path: Path) -> None:
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    transformers.WhisperForConditionalGeneration(config).half().save_pretrained(path)


def test_a_model_of_sounds_is_calibrated_on_made_up_ones_and_says_so(tmp_path: Path) -> None:
    whisper(tmp_path / "source")
    result = CliRunner().invoke(convert_command, [str(tmp_path / "source"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "Note: calibrated with made-up input_features, which is worse" in result.stderr
    assert "layers are calibrated" not in result.stderr  # all of them are
    checkpoint = formats.open_checkpoint(tmp_path / "out")
    assert min(checkpoint.quantization.outliers.values()) >= 0
    assert sum(checkpoint.quantization.outliers.values()) > 0
    calibration = checkpoint.quantization.calibration
    assert calibration is not None
    assert calibration["inputs"] == ["made-up input_features"]
    assert calibration["layers"] == len(checkpoint.records)
    card = (tmp_path / "out" / "README.md").read_text()
    # Its decoder takes 64 tokens in a row, and as many rows as there are sounds.
    assert (
        calibration["tokens"] == formats.read_manifest(tmp_path / "out").modules["model.decoder.layers.0.fc1"]["tokens"]
    )
    assert calibration["tokens"] == 2 * 64
    assert "| Calibration | 128 tokens: `random ids`, and made-up input_features |" in card
    report = converter.convert(tmp_path / "source", tmp_path / "none", outliers="none")
    assert report.notices == report.uncalibrated == []
    assert formats.open_checkpoint(tmp_path / "none").quantization.calibration is None


def vit(path: Path) -> None:
    config = transformers.ViTConfig(**_VISION, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(config).half().save_pretrained(path)


def unknown(path: Path) -> None:
    llama().half().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "nobody-knows", "architectures": ["Nobodys"]}))


def known(path: Path) -> None:
    llama().half().save_pretrained(path)


@pytest.mark.parametrize(
    ("make", "outliers"), [(vit, "none"), (unknown, "top-k=16"), (known, "none"), (known, "top-k=16")]
)
def test_a_text_that_is_not_used_is_said(tmp_path: Path, make: Any, outliers: str) -> None:
    """The last one has no tokenizer."""
    make(tmp_path / "source")
    (tmp_path / "own.txt").write_text("a text")
    report = converter.convert(
        tmp_path / "source", tmp_path / "out", calibration=tmp_path / "own.txt", outliers=outliers
    )
    assert [notice.rpartition("own.txt ")[2] for notice in report.notices if "own.txt" in notice] == ["was not used"]


def test_a_model_of_images_is_calibrated_without_any_text(tmp_path: Path) -> None:
    vit(tmp_path / "source")
    converter.convert(tmp_path / "source", tmp_path / "out")
    calibration = formats.open_checkpoint(tmp_path / "out").quantization.calibration
    assert calibration is not None
    assert (calibration["text"], calibration["tokens"]) == ("made-up pixel_values", 0)
    assert "files" not in calibration


def test_the_plan_reckons_with_the_rows_of_sounds(tmp_path: Path) -> None:
    whisper(tmp_path / "source")
    plan = converter.make_plan(converter.Resolved(tmp_path / "source"), tmp_path / "out")
    rows = 2 * 150_000  # below, blocks of weights take more than a tiny model's activations
    assert plan.peak_memory < rows * 4 * 8 * 48
    plan.config.max_source_positions = rows // 2  # type: ignore[union-attr]
    assert plan.peak_memory >= rows * 4 * 8 * 48  # float32, copies, the widest layer


@pytest.mark.parametrize("forward", ["return CausalLMOutput()", "raise TypeError('pixels, please')"])
def test_a_pass_that_reaches_no_layer_leaves_the_search_to_the_loader(
    own_model: Any, tmp_path: Path, forward: str
) -> None:
    code = CODE.replace("x = self.embed(input_ids).flatten(0, 1)", forward)
    report = convert(own_model(code), tmp_path / "out")
    assert "nothing could be measured: without calibration no outlier columns are stored" in report.notices
    assert any("ended early (TypeError: pixels, please)" in notice for notice in report.notices) == (
        "pixels" in forward
    )
    assert len(report.uncalibrated) == report.layers == 6
    quantization = formats.open_checkpoint(tmp_path / "out").quantization
    assert (quantization.criterion, quantization.calibration) == ("top-k=16", None)
    assert set(quantization.outliers.values()) == {0}
    assert formats.read_manifest(tmp_path / "out").modules == {}


@pytest.mark.parametrize("quiet", [False, True])
def test_how_many_layers_are_calibrated_is_recorded_and_said(own_model: Any, tmp_path: Path, quiet: bool) -> None:
    source = own_model(CODE.replace("return CausalLMOutput(logits=self.lm_head(x))", "raise ValueError('no, thanks')"))
    options = ["--trust-remote-code", *["--quiet"] * quiet]
    result = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    said = (
        "Note: 4 of 6 layers are calibrated; the others have no outlier columns, and search for outliers in every "
        "call: 2 in experts.2; --verbose names them\n"
    )
    assert result.stderr == said if quiet else result.stderr.endswith(said)
    assert ("ended early (ValueError: no, thanks)" in result.stderr) is not quiet
    calibration = formats.open_checkpoint(tmp_path / "out").quantization.calibration
    assert calibration is not None
    assert (calibration["tokens"], calibration["layers"]) == (512, 4)
    assert "| Calibration | 512 tokens: `random ids`; 4 of 6 layers |" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_calibrated_whole_says_no_number(own_model: Any, tmp_path: Path) -> None:
    convert(own_model(loops=2), tmp_path / "out")
    calibration = formats.open_checkpoint(tmp_path / "out").quantization.calibration
    assert calibration is not None
    assert calibration["layers"] == 6
    assert "| Calibration | 512 tokens: `random ids` |" in (tmp_path / "out" / "README.md").read_text()


def test_activations_that_float16_cannot_hold_are_said_with_their_layer(own_model: Any, tmp_path: Path) -> None:
    source = own_model(CODE.replace("self.embed(input_ids)", "(self.embed(input_ids) * 1e5)"))
    report = convert(source, tmp_path / "out", dtype="float16")
    (notice,) = [notice for notice in report.notices if "float16" in notice]
    found = re.fullmatch(r"the (input|output) of (experts\.\d\.\w+) reaches (\S+) in the .* --dtype bfloat16", notice)
    assert found is not None, notice
    modules = formats.read_manifest(tmp_path / "out").modules
    largest = max(found["absmax"][0] for found in modules.values() if "absmax" in found)
    assert float(found[3]) >= largest > 1e5
    for dtype in ("bfloat16", None):
        assert not any("float16" in notice for notice in convert(source, tmp_path / str(dtype), dtype=dtype).notices)


@pytest.mark.parametrize("known", [2, 24])
def test_a_text_that_the_tokenizer_does_not_know_is_said_with_its_share(tmp_path: Path, known: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz"[:known]])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    llama().half().save_pretrained(tmp_path / "source")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnop" * 8)
    report = converter.convert(tmp_path / "source", tmp_path / "out", calibration=text)
    said = [notice for notice in report.notices if "unknown" in notice]
    assert [notice[: notice.index(":")] for notice in said] == (
        ["112 of 128 tokens of text.txt are unknown to the tokenizer (88%)"] if known == 2 else []
    )


def test_a_pass_that_ends_behind_the_last_layer_ended_well(own_model: Any, tmp_path: Path) -> None:
    code = CODE.replace("return CausalLMOutput(logits=self.lm_head(x))", "raise ValueError('no, thanks')")
    report = convert(own_model(code, loops=2), tmp_path / "out")
    assert report.uncalibrated == []
    assert not any("ended early" in notice for notice in report.notices)


# An image branch that text does not take, and that no made-up image gets through.
BRANCH = CODE.replace(
    "    def forward(self, input_ids, **kwargs):\n",
    """    def forward(self, input_ids, pixels=None, **kwargs):
        if pixels is not None:
            last = self.experts[2].down
            return torch.nn.functional.linear(pixels, last.weight)
        if self.training:
            return self.experts[1].up.weight
        if self.config.loops > 7:
            return self.experts[1].down.weight
        self.experts[0].up.weight.shape
        if self.experts[0].down.weight.dtype != torch.int8:
            pass
""",
)


def test_a_weight_that_a_branch_takes_is_kept_and_one_that_none_can_take_is_not(own_model: Any, tmp_path: Path) -> None:
    report = convert(own_model(BRANCH), tmp_path / "out", outliers="none")
    assert [name for name, reason in report.kept.items() if "own code" in reason] == ["experts.2.down"]


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_what_is_cast_in_blocks_is_the_same(
    own_model: Any, tmp_path: Path, monkeypatch: Any, dtype: str | None
) -> None:
    from llmint8.formats.containers import tensors

    source = own_model()
    convert(source, tmp_path / "whole", dtype=dtype)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1000)
    convert(source, tmp_path / "blocks", dtype=dtype)
    checkpoint = formats.open_checkpoint(tmp_path / "blocks")
    embedding = formats.open_source(source).read("embed.weight")
    assert torch.equal(checkpoint.read("embed.weight"), embedding.bfloat16() if dtype else embedding)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "blocks" / file.name).read_bytes(), file.name
