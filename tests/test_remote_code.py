"""Model code that comes with a checkpoint: it runs when the user says so, and never otherwise."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from llmint8 import formats, runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.runtime import Int8Linear

pytestmark = pytest.mark.usefixtures("quiet_transformers")

CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Path("ran").touch()


class OwnConfig(PreTrainedConfig):
    model_type = "somebodys-own"

    def __init__(self, width=64, vocab_size=32, **kwargs):
        super().__init__(**kwargs)
        self.width, self.vocab_size = width, vocab_size


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.down = nn.Linear(2 * config.width, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        return CausalLMOutput(logits=self.lm_head(x + self.down(torch.relu(self.up(x)))))
"""
CONFIG = {
    "model_type": "somebodys-own",
    "architectures": ["OwnModel"],
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "width": 64,
    "vocab_size": 32,
    "dtype": "float16",
}
# Its layers are in no numbered block: without its code, nothing else tells them from heads.
BY_NAME = ("--only", "up", "--only", "down")
TOKENS = torch.arange(8)[None]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that transformers does not know, its code beside it; the code leaves `ran` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    path = tmp_path / "source"
    path.mkdir()
    (path / "own.py").write_text(CODE)
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    shapes = {"embed.weight": (32, 64), "up.weight": (128, 64), "up.bias": (128,), "down.weight": (64, 128)}
    shapes |= {"down.bias": (64,), "lm_head.weight": (32, 64)}
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def convert(source: Path, *options: str) -> Any:
    return CliRunner().invoke(convert_command, [str(source), "out", *options])


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_without_the_flag_nothing_runs_and_the_flag_is_named(source: Path) -> None:
    result = convert(source, *BY_NAME)
    assert result.exit_code == 0, result.output
    assert "does not know the model type 'somebodys-own'" in result.stderr
    assert "--trust-remote-code runs the code beside it" in result.stderr
    quantization = formats.open_checkpoint("out").quantization
    assert (quantization.criterion, quantization.calibration) == ("top-k=16", None)
    assert set(quantization.outliers.values()) == {0}
    assert "layers search for their outliers in every call" in " ".join(result.stderr.split())
    with pytest.raises(formats.LLMInt8Error, match="trust_remote_code=True runs the code beside it") as caught:
        runtime.load("out")
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()
    assert not Path("modules").exists()


def test_with_the_flag_the_model_is_calibrated_and_runs(source: Path) -> None:
    result = convert(source, "--trust-remote-code", "--outliers", "top-k=4", "--verbose")
    assert result.exit_code == 0, result.output
    assert Path("ran").exists()
    assert "lm_head: output head" in result.stdout
    counts = formats.open_checkpoint("out").quantization.outliers
    assert counts.keys() == {"up", "down"}
    assert sum(counts.values()) > 0
    assert (Path("out") / "own.py").read_text() == CODE  # all that loading it needs
    shutil.rmtree(source)
    model = runtime.load("out", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert isinstance(model.up, Int8Linear)
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    Path("ran").unlink()
    with pytest.raises(formats.LLMInt8Error, match="trust_remote_code=True"):
        runtime.load("out")
    assert not Path("ran").exists()


def test_what_was_converted_without_the_code_loads_with_it(source: Path) -> None:
    assert convert(source, *BY_NAME).exit_code == 0
    assert isinstance(runtime.load("out", trust_remote_code=True).down, Int8Linear)


@pytest.mark.parametrize("reference", ["evil/repo--own.OwnModel", "../own.OwnModel", "own", 3, ["own.OwnModel"]])
def test_only_code_beside_the_checkpoint_is_run(source: Path, reference: Any) -> None:
    edit(source, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": reference})
    result = convert(source, "--trust-remote-code")
    assert result.exit_code == 1
    assert "expected module.Class of a file beside it" in result.stderr
    assert not Path("ran").exists()


def test_code_that_fails_is_one_line(source: Path) -> None:
    (source / "own.py").write_text("raise RuntimeError('no\\nway')")
    result = convert(source, "--trust-remote-code")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "RuntimeError: no way" in result.stderr


@pytest.mark.parametrize("trusted", [False, True])
def test_a_model_that_transformers_knows_needs_no_code(source: Path, trusted: bool) -> None:
    """config.json of a known type may name code too; without the flag the known class is used."""
    shutil.rmtree(source)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(source)
    (source / "own.py").write_text("from pathlib import Path; Path('ran').touch()\n" + KNOWN)
    edit(source, auto_map={"AutoModelForCausalLM": "own.LlamaForCausalLM"})
    assert convert(source, *["--trust-remote-code"] * trusted).exit_code == 0
    assert Path("ran").exists() == trusted
    Path("ran").unlink(missing_ok=True)
    model = runtime.load("out", trust_remote_code=trusted)
    assert type(model).__module__.startswith("transformers_modules" if trusted else "transformers.models")
    assert Path("ran").exists() == trusted


KNOWN = """
from transformers import LlamaForCausalLM as Known
class LlamaForCausalLM(Known):
    pass
"""


def test_a_tokenizer_with_code_does_not_run_it(source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}')
    assert convert(source, *BY_NAME).exit_code == 0
    assert not Path("ran").exists()
