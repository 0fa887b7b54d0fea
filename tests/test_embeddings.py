"""`--quantize-embeddings`: tokens are looked up in int8, and a head that is the same tensor multiplies by it."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.converter.export.export import export
from llmint8.formats import LLMInt8Error, SourceError, check_values, open_checkpoint
from llmint8.kernels.reference import quantize_weight
from llmint8.runtime.commands.main import main
from llmint8.runtime.layers.embedding import Int8Embedding, TiedHead
from llmint8.runtime.layers.tensors import QuantizedTensors

pytestmark = pytest.mark.usefixtures("quiet_transformers")
_SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_LLAMA = {**_SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1}
TOKENS = torch.arange(3, 35)[None]
TIED = {
    "llama": transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**_LLAMA, head_dim=32),  # it scales what it looks up
}
NAME = "model.embed_tokens"


def save(config: Any, path: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).half()
    model.save_pretrained(path)
    return model.float().eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def convert(path: Path, **options: Any) -> Any:
    how = {"format": 2, "calibration_tokens": 64, "outliers": "top-k=4", "jobs": 1} | options
    return converter.convert(path / "source", path / "out", quantize_embeddings=True, **how)


@pytest.fixture(scope="module", params=[*TIED, "llama, rotated"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A directory with `source` and `out`, the 16-bit model in float32, and the int8 one."""
    name, _, rotated = request.param.partition(", ")
    path = tmp_path_factory.mktemp(name)
    model = save(TIED[name], path / "source")
    convert(path, rotate=bool(rotated))
    return path, model, runtime.load(path / "out", dtype=torch.float32)


def test_a_tied_pair_is_stored_once(pair: tuple[Path, Any, Any], spec_reader: Any) -> None:
    path, model, loaded = pair
    checkpoint = open_checkpoint(path / "out")
    assert check_values(checkpoint) == []
    assert checkpoint.quantization.format_version == "2.1"
    (record,) = (record for record in checkpoint.records.values() if record.scheme.lookup is not None)
    assert (record.name, record.scheme.lookup) == (NAME, "too")
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors)
    weight = model.get_input_embeddings().weight.detach()
    assert torch.equal(checkpoint.read(f"{NAME}.weight"), quantize_weight(weight.half(), record.scheme.rotation)[0])
    assert checkpoint.config["tie_word_embeddings"] is True
    rows = spec_reader.look_up(spec_reader.stored(spec_reader.open_checkpoint(path / "out"), NAME), np.arange(3, 35))
    if record.scheme.rotation is None:
        scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
        assert torch.allclose(loaded.get_input_embeddings()(TOKENS)[0], torch.from_numpy(rows).float() * scale)


def test_it_is_close_to_its_source(pair: tuple[Path, Any, Any]) -> None:
    _, model, loaded = pair
    # Rounding of 8 layers one after another, and of the rows: 0.77 % each, by the root of their number.
    assert 0 < apart(logits(loaded), logits(model)) < 2 * 0.0077 * 3
    assert isinstance(loaded.get_input_embeddings(), type(model.get_input_embeddings()))
    assert isinstance(loaded.get_output_embeddings(), runtime.Int8Linear)


def test_the_two_have_one_set_of_tensors_wherever_they_go(pair: tuple[Path, Any, Any]) -> None:
    _, _, loaded = pair
    expected = logits(loaded)
    for there in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(there), expected)
        halved = there.to(torch.bfloat16)
        embedding, head = halved.get_input_embeddings(), halved.get_output_embeddings()
        assert embedding(TOKENS).dtype == head(embedding(TOKENS)).dtype == torch.bfloat16
        assert embedding.row_absmax is head.row_absmax
        assert embedding.unpacked_weight() is head.unpacked_weight()
        assert embedding.unpacked_weight() is not loaded.get_input_embeddings().unpacked_weight()
    assert not any("lm_head" in name for name in loaded.state_dict())
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        other.get_input_embeddings().row_absmax.zero_()
    assert other.load_state_dict(loaded.state_dict()) == ([], [])
    assert torch.equal(logits(other), expected)


def test_it_is_saved_and_comes_back(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, _, loaded = pair
    loaded.save_pretrained(tmp_path)
    assert check_values(open_checkpoint(tmp_path)) == []
    again = runtime.load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(loaded))
    assert again.get_output_embeddings().kept_limit == loaded.get_output_embeddings().kept_limit is not None


@pytest.mark.parametrize("device_map", ["disk", {"model": "cpu", "lm_head": "disk"}])
def test_a_pair_is_in_one_place(device_map: Any, pair: tuple[Path, Any, Any]) -> None:
    path, _, loaded = pair
    with pytest.raises(
        LLMInt8Error, match=f"{NAME}: int8, and the output head multiplies by it: such a model is neith"
    ):
        runtime.load(path / "out", device_map=device_map)
    assert torch.equal(logits(runtime.load(path / "out", device_map="auto", dtype="float32")), logits(loaded))


def test_the_commands_know_it(pair: tuple[Path, Any, Any]) -> None:
    path, _, _ = pair
    verified = CliRunner().invoke(main, ["verify", str(path / "out"), "--source", str(path / "source")])
    assert (verified.exit_code, verified.stderr) == (0, "")
    assert f"{NAME}  relative error 0.00" in verified.stdout
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(path / "out"), "--json"]).stdout)
    assert (inspected["int8_embeddings"], inspected["int8_head"]) == ([NAME], NAME)
    planned = CliRunner().invoke(main, ["plan", str(path / "out")])
    assert planned.exit_code == 0, planned.output


def test_it_becomes_floating_point_again(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    path, model, loaded = pair
    plain = copy.deepcopy(loaded).dequantize()
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert not any(isinstance(module, QuantizedTensors) for module in plain.modules())
    assert type(plain.get_input_embeddings()) is type(model.get_input_embeddings())
    report = export(path / "out", tmp_path / "half", "float16")
    assert report.int8 == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    # float16 rounds what is dequantized once more.
    assert apart(logits(plain), logits(exported)) < 0.002
    other = export(path / "out", tmp_path / "other", "compressed-tensors")
    assert any(notice.startswith(f"{NAME}: an embedding, in 16 bit") for notice in other.notices)
    assert (other.int8, other.restored) == (7, 1)


@pytest.mark.parametrize("with_head", [False, True])
def test_an_embedding_by_itself_is_only_looked_up(with_head: bool, tmp_path: Path) -> None:
    model = save(transformers.LlamaConfig(**_LLAMA), tmp_path / "source")
    report = convert(tmp_path, quantize_head=with_head)
    assert (report.layers, report.uncalibrated) == (7 + with_head, [])
    checkpoint = open_checkpoint(tmp_path / "out")
    scheme = checkpoint.records[NAME].scheme
    assert (scheme.lookup, checkpoint.records[NAME].outlier_count) == ("only", 0)
    assert scheme.to_dict() == {
        "bits": 8,
        "data_type": "int",
        "group": None,
        "rotation": None,
        "inputs": None,
        "input_group": None,
        "lookup": True,
    }
    loaded = runtime.load(tmp_path / "out", dtype=torch.float32)
    assert apart(logits(loaded), logits(model)) < 0.03
    head = loaded.get_output_embeddings()
    assert not isinstance(head, TiedHead)
    assert isinstance(head, runtime.Int8Linear) == with_head
    table = loaded.get_input_embeddings()
    assert isinstance(table, Int8Embedding)
    assert (table.padding_idx, table.num_embeddings, table.embedding_dim) == (1, 128, 64)
    assert torch.equal(table(TOKENS), table.dequantize()[TOKENS])
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(runtime.load(tmp_path / "saved", dtype=torch.float32)), logits(loaded))


def test_a_reader_that_does_not_know_it_refuses_it() -> None:
    """As spec.md has it: one of 2.0 knows no scheme with such a key."""
    from llmint8.formats import Scheme

    known = Scheme(lookup="too").to_dict()
    assert Scheme.from_dict(known).lookup == "too"
    for wrong in ({"lookup": False}, {"lookup": "too"}, {"looked_up": True}, {"inputs": None, "input_group": 64}):
        with pytest.raises(ValueError, match="cannot compute; update llmint8"):
            Scheme.from_dict(known | wrong)
    with pytest.raises(ValueError, match="cannot compute"):
        Scheme.from_dict(Scheme().to_dict() | {"inputs": None})


def test_what_has_no_such_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--quantize-embeddings takes --format 2: bitsandbytes"):
        converter.convert(tmp_path, tmp_path / "out", quantize_embeddings=True)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(t5).half().save_pretrained(tmp_path / "t5")
    with pytest.raises(SourceError, match="--quantize-embeddings: t5 cannot do without its tied head"):
        converter.convert(tmp_path / "t5", tmp_path / "out", quantize_embeddings=True, format=2)
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    image = transformers.ViTConfig(**vit, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(image).half().save_pretrained(tmp_path / "vit")
    with pytest.raises(SourceError, match="no plain embedding of tokens"):
        converter.convert(tmp_path / "vit", tmp_path / "out", quantize_embeddings=True, format=2)
