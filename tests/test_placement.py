"""Where the parts of a loaded model are, what dtype they have, and how they run: all of that may change later."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from llmint8 import converter, runtime
from llmint8.formats import check_values, open_checkpoint

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module", params=[1, 2], ids=["format 1", "format 2"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.3, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", outliers="top-k=4", calibration_tokens=48, format=request.param)
    return path / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def int8_layers(model: Any) -> list[runtime.Int8Linear]:
    return [module for module in model.modules() if isinstance(module, runtime.Int8Linear)]


PLACEMENTS: list[dict[str, Any]] = [
    {"device_map": "auto"},
    {"device_map": "disk"},
    {"device_map": {"": "disk"}},
    {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": "offloaded"},
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["auto", "disk", "a dict", "little memory"])
def test_whatever_the_placement_it_computes_the_same(
    checkpoint: Path, tmp_path: Path, placement: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = logits(runtime.load(checkpoint))
    model = runtime.load(checkpoint, **placement)
    offloaded = [layer.is_meta for layer in int8_layers(model)]
    assert all(offloaded) if "disk" in str(placement) else any(offloaded) == ("max_memory" in placement)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert check_values(open_checkpoint(tmp_path / "saved")) == []


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_what_is_offloaded_later_moves_as_int8(
    checkpoint: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(runtime.load(checkpoint))
    model = runtime.load(checkpoint)
    moved: dict[str, torch.dtype] = {}
    set_tensor = accelerate.hooks.set_module_tensor_to_device

    def noting(module: Any, name: str, device: Any, value: Any = None, **named: Any) -> Any:
        if isinstance(module, runtime.Int8Linear) and value is not None:
            moved[name] = value.dtype
        return set_tensor(module, name, device, value=value, **named)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", noting)
    if how == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path / "offloaded"), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert moved["weight"] == torch.int8
    if how == "disk":
        layer = "model.layers.0.mlp.up_proj"
        assert (tmp_path / "offloaded" / f"{layer}.weight.dat").stat().st_size == 96 * 64


def test_device_maps_that_do_not_fit(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_memory is for device_map='auto' and the like, which is None$"):
        runtime.load(checkpoint, max_memory={"cpu": 1})
    with pytest.raises(ValueError, match=r"^device is 'cpu' and device_map is 'disk'; give one of them$"):
        runtime.load(checkpoint, device="cpu", device_map="disk")


CASTS: dict[str, Any] = {
    "half": (lambda model: model.half(), torch.float16),
    "float": (lambda model: model.float(), torch.float32),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to a dtype": (lambda model: model.to(torch.float16), torch.float16),
    "to a device and a dtype": (lambda model: model.to("cpu", torch.float32), torch.float32),
    "to a device": (lambda model: model.to("cpu"), torch.bfloat16),
    "load": (lambda model: runtime.load(model.name_or_path, dtype="float16"), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_of_what_is_not_int8(checkpoint: Path, tmp_path: Path, cast: str) -> None:
    how, dtype = CASTS[cast]
    before = runtime.load(checkpoint)
    model = how(runtime.load(checkpoint))
    assert model.dtype == dtype
    for layer, other in zip(int8_layers(model), int8_layers(before), strict=True):
        assert torch.equal(layer.unpacked_weight(), other.unpacked_weight())
        assert torch.equal(layer.row_absmax, other.row_absmax)
        assert layer.outlier_weight is not None
        assert layer.outlier_weight.dtype == dtype
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path)
    assert check_values(open_checkpoint(tmp_path)) == []


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = runtime.load(model.name_or_path, outliers="none")
    for layer in int8_layers(other):
        layer.unpacked_weight().zero_()
        layer.outliers = "static"
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch, by_state],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)
def test_a_copy_computes_the_same_and_is_one_of_ours(checkpoint: Path, duplicate: Any) -> None:
    model = runtime.load(checkpoint)
    other = duplicate(model)
    assert torch.equal(logits(other), logits(model))
    runtime.configure(other, outliers="none")
    assert not torch.equal(logits(other), logits(model))
    assert other.half().dtype == torch.float16
    assert model.dtype == torch.bfloat16


def test_one_call_changes_how_all_layers_run(checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    for settings in (
        {"outliers": "none"},
        {"outliers": "dynamic", "threshold": 0.5},
        {"threshold": 2.0},
        {"outliers": "static", "activation": "absmax"},
        {"activation_group": 64},
        {"activation": "zeropoint", "activation_group": "row"},
    ):
        before = logits(model)
        assert runtime.configure(model, **settings) is None  # type: ignore[arg-type, func-returns-value]
        for layer in int8_layers(model):
            assert {name: getattr(layer, name) for name in settings} == settings
        assert not torch.equal(logits(model), before)
    expected = runtime.load(checkpoint, activation="zeropoint", activation_group="row")
    assert torch.equal(logits(model), logits(expected))


def test_all_layers_change_or_none(checkpoint: Path) -> None:
    model = runtime.load(checkpoint)
    last = int8_layers(model)[-1]
    last.outliers = "none"
    last.outlier_dims = last.outlier_weight = None  # as bitsandbytes stores none
    runtime.configure(model, outliers="none")
    with pytest.raises(ValueError, match=r"down_proj: outliers is 'static', but it stores none; expected 'dynamic' or"):
        runtime.configure(model, outliers="static")
    assert {layer.outliers for layer in int8_layers(model)} == {"none"}
    for settings, message in (
        ({"outliers": "maybe"}, "^outliers is 'maybe', expected one of 'static', 'dynamic', 'none'$"),
        ({"threshold": 3.0}, "^threshold is 3.0, which only outliers='dynamic' uses$"),
        ({"outliers": "dynamic", "threshold": 0.0}, "^threshold is 0.0, expected a number above 0"),
        ({"activation": "max"}, "^activation is 'max', expected one of 'absmax', 'zeropoint'$"),
        ({"activation_group": 65}, "^activation_group is 65, expected one of 64, 128, 256, 'row'$"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.configure(model, **settings)  # type: ignore[arg-type]
    assert {(layer.outliers, layer.threshold) for layer in int8_layers(model)} == {("none", 6.0)}
    with pytest.raises(ValueError, match=r"^Linear: has no quantized layers"):
        runtime.configure(torch.nn.Linear(2, 2), outliers="none")
