"""What belongs where in a model, and what changes how all of its layers run, on modules without a checkpoint."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmint8.converter.model.experts import expert_matrices
from llmint8.formats import KBit, LLMInt8Error
from llmint8.formats.int8.records import Int8Record
from llmint8.formats.int8.schemes import Scheme
from llmint8.runtime import Int8Linear, KBitLinear, configure
from llmint8.runtime.accuracy.runs import stored_columns
from llmint8.runtime.layers.experts import Int8Experts, replace_experts
from llmint8.runtime.model import compiled
from llmint8.runtime.model.generate import _pad
from llmint8.runtime.model.places import (
    check_in_one_place,
    check_matrix,
    check_shapes,
    embedding_for,
    linear_for,
    matrices_of,
    take_hook,
)
from llmint8.runtime.model.settings import let_cast, log_summary
from llmint8.runtime.parallel.cut import plan_cut
from llmint8.runtime.parallel.plan import Parallel


def record(name: str, out_features: int, in_features: int, **scheme: Any) -> Int8Record:
    return Int8Record(name, out_features, in_features, 0, False, Scheme(**scheme))


class Odd(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class Model(nn.Module):
    """With `head` tied to `table`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.turned, self.odd = nn.Linear(4, 6), Conv1D(6, 4), Odd(4, 6)
        self.table, self.head, self.alone, self.act = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Embedding(9, 4), nn.GELU()
        self.all_tied_weights_keys: dict[str, str] = {"head.weight": "table.weight"}


def test_an_int8_layer_is_a_linear_one_of_its_shape() -> None:
    model = Model()
    for name in ("up", "turned"):
        assert linear_for(model, name, record("x.up", 6, 4)) is model.get_submodule(name)
        for shape in ((6, 5), (7, 4), (4, 6)):
            with pytest.raises(
                LLMInt8Error, match=rf"^x.up: .* Model wants shape \[6, 4\], not \[{shape[0]}, {shape[1]}\]$"
            ):
                linear_for(model, name, record("x.up", *shape))
    for name, found in (("odd", "Odd"), ("act", "GELU"), ("table", "Embedding")):
        with pytest.raises(LLMInt8Error, match=f"^x: .*, but Model has {found} there, expected Linear or Conv1D$"):
            linear_for(model, name, record("x", 6, 4))
    with pytest.raises(LLMInt8Error, match=r"^x: int8 in the checkpoint, but Model has no layer of its own for it$"):
        linear_for(model, "", record("x", 6, 4))


def test_an_int8_table_is_an_embedding_and_its_head_is_tied_to_it() -> None:
    model = Model()
    both, only = record("x", 9, 4, lookup="too"), record("x", 9, 4, lookup="only")
    assert embedding_for(model, "table", both) == (model.table, "head")
    assert embedding_for(model, "table", only) == (model.table, None)
    assert embedding_for(model, "alone", only) == (model.alone, None)
    for shape in ((8, 4), (9, 5)):
        with pytest.raises(LLMInt8Error, match=r"wants shape \[9, 4\], not"):
            embedding_for(model, "table", record("x", *shape, lookup="only"))
    for name, found in (("", "NoneType"), ("head", "Linear")):
        with pytest.raises(LLMInt8Error, match=f"has {found} there, expected Embedding"):
            embedding_for(model, name, only)
    for tied in ({}, {"alone.weight": "table.weight"}, {"up.weight": "table.weight", "head.weight": "table.weight"}):
        model.all_tied_weights_keys = tied
        with pytest.raises(LLMInt8Error, match="has no output head that is tied to it; expected one"):
            embedding_for(model, "table", both)
    model.all_tied_weights_keys = {"table.weight": "head.weight"}
    assert embedding_for(model, "table", both)[1] == "head"


def test_a_pair_is_in_one_place_in_memory() -> None:
    for device_map in (None, "auto", {}, {"": "cpu"}, {"a": 0, "b": 0}, {"a": 0, "b": "0"}):
        check_in_one_place("table", device_map)
    for wrong in ({"a": 0, "b": 1}, {"": "disk"}, {"a": "cpu", "b": "disk"}):
        with pytest.raises(LLMInt8Error, match=r"^table: int8, and the output head multiplies by it"):
            check_in_one_place("table", wrong)


def test_a_tensor_of_another_shape_is_named() -> None:
    model = Model()
    check_shapes(model, {"x": (6, 4), "b": (6,)}, {"x": "up.weight", "b": "up.bias"})
    with pytest.raises(LLMInt8Error, match=r"^b: shape \[5\], Model wants \[6\]$"):
        check_shapes(model, {"x": (6, 4), "b": (5,)}, {"x": "up.weight", "b": "up.bias"})


def test_a_hook_goes_along() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer, made, hook = nn.Linear(2, 2), nn.Linear(2, 2), ModelHook()
    take_hook(layer, made)
    assert not hasattr(made, "_hf_hook")
    take_hook(add_hook_to_module(layer, hook), made)
    assert made._hf_hook is hook


TENSORS = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(4) for j in (1, 2, 3)]


def mixture() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def shape_of(name: str) -> tuple[int, int]:
    return (32, 48) if ".w2" in name else (48, 32)


def test_matrices_of_experts_are_layers_of_their_shape() -> None:
    model = mixture()
    names = [tensor.removesuffix(".weight") for tensor in TENSORS]
    matrices = matrices_of(model, [record(names[0], 48, 32)], TENSORS)
    assert sorted(matrices) == sorted(names)
    assert matrices_of(model, [record("lm_head", 16, 32)], TENSORS) == {}
    for name, matrix in matrices.items():
        rows, columns = shape_of(name)
        check_matrix(model, matrix, record(name, rows, columns))
        for shape in ((rows, columns + 1), (rows, columns - 1), (2 * 48 + 1, columns)):
            with pytest.raises(LLMInt8Error, match=f"^{name}: int8 in .* MixtralForCausalLM wants shape"):
                check_matrix(model, matrix, record(name, *shape))


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_process_has_its_own_experts_in_their_order(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, or of two processes the first two of four, or the last two."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    model = mixture()
    matrices = expert_matrices(model, TENSORS)
    parallel = Parallel(SimpleNamespace(tp_size=2, ep_size=1 if rank is None else 2))
    held = parallel.held(model, matrices)
    first = 2 * (rank or 0)
    here = range(first, first + (4 if rank is None else 2))
    assert {matrix.expert for matrix in held} == set(here)
    layers = {matrix.name: Int8Linear(*reversed(shape_of(matrix.name)), False, device="meta") for matrix in matrices}
    model.eval()
    replace_experts(model, held, layers)
    (experts,) = (module for module in model.modules() if isinstance(module, Int8Experts))
    assert (experts.num_experts, experts.training) == (len(here), False)
    assert experts.first_expert == (None if rank is None else first)
    assert f"num_experts={len(here)}" in repr(experts)
    base = "model.layers.0.block_sparse_moe.experts"
    for number, expert in enumerate(here):
        assert experts.layers_of("gate_up_proj", number) == [layers[f"{base}.{expert}.w{part}"] for part in (1, 3)]
        assert experts.layers_of("down_proj", number) == [layers[f"{base}.{expert}.w2"]]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    assert len(ignored) == (0 if rank is None else 6)
    if rank is None:
        layers.pop(f"{base}.3.w2")
        with pytest.raises(LLMInt8Error, match=rf"^{base}.3.w2: not int8 in the checkpoint, as other experts of"):
            replace_experts(mixture(), held, layers)


def int8(rotation: Any = None, name: str = "a") -> Int8Linear:
    layer = Int8Linear.from_linear(nn.Linear(64, 8), torch.tensor([3]), rotation=rotation)
    layer.name = name
    return layer


def kbit() -> KBitLinear:
    return KBitLinear.from_linear(nn.Linear(64, 8), KBit(4, "int", 32), torch.tensor([3]))


def test_all_layers_are_configured_or_none() -> None:
    plain, rotated, coded, bare = int8(), int8(64), kbit(), int8(name="bare")
    bare.outliers = "dynamic"
    bare.outlier_dims = bare.outlier_weight = None
    both = nn.Sequential(plain, nn.GELU(), coded)
    configure(both, outliers="none", activation="zeropoint")
    assert (plain.outliers, plain.activation, coded.outliers) == ("none", "zeropoint", "none")
    configure(both, outliers="static", activation_group=64)
    assert (plain.outliers, plain.activation_group, coded.outliers) == ("static", 64, "static")
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (both, {"outliers": "dynamic"}, "of k bits"),
        (nn.Sequential(plain, rotated), {"outliers": "dynamic"}, "the layer is rotated"),
        (nn.Sequential(plain, bare), {"outliers": "static"}, "^bare: outliers is 'static', but it stores none"),
        (both, {"threshold": 3.0}, "^threshold is 3.0, which only outliers='dynamic' uses$"),
        (nn.Sequential(plain, bare), {"threshold": 0.0}, "^threshold is 0.0, expected a number above 0"),
        (plain, {"outliers": "dynamic", "threshold": -1.0}, "^threshold is -1.0, expected a number above 0"),
        (nn.Sequential(coded), {"activation": "absmax"}, "^activation is 'absmax', and the inputs of these layers are"),
        (nn.GELU(), {"outliers": "none"}, "^GELU: has no quantized layers; expected a model from runtime.load$"),
    ]
    for model, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            configure(model, **settings)
    assert (plain.outliers, plain.threshold, bare.outliers, coded.outliers) == ("static", 6.0, "dynamic", "static")
    configure(nn.Sequential(plain, bare), threshold=3.0)  # for those that search
    assert (bare.threshold, plain.outliers) == (3.0, "static")
    configure(plain, outliers="dynamic", threshold=2.0)
    assert (plain.outliers, plain.threshold) == ("dynamic", 2.0)


def test_one_line_says_how_a_model_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmint8")

    def said(*layers: Any, outliers: str = "static") -> str:
        model: Any = nn.Sequential(*layers)
        settings = {"outliers": outliers, "threshold": 5.0, "activation": "absmax", "activation_group": "row"}
        model.config = SimpleNamespace(quantization_config=SimpleNamespace(**settings))
        caplog.clear()
        log_summary(model)
        (message,) = caplog.messages
        return message

    runs, coded_runs, searching, away = int8().prepared, kbit().prepared, int8(), int8()
    assert runs is not None
    assert coded_runs is not None
    searching.outliers, away.prepared = "dynamic", None
    assert said(int8(), int8()) == f"2 Int8Linear layers, outliers static, activation absmax, 2 x {runs.runs_on}"
    assert said(kbit()) == f"1 KBitLinear layers, outliers static, 1 x {coded_runs.runs_on}"
    assert said(int8(), kbit()).startswith("1 Int8Linear and 1 KBitLinear layers, outliers static, activation absmax, ")
    assert said(away, outliers="dynamic") == (
        "1 Int8Linear layers, outliers dynamic (|x| >= 5), activation absmax, 1 x offloaded"
    )
    assert said(searching, int8()).startswith(
        "2 Int8Linear layers, outliers static (but in 1 that were not calibrated: dynamic, |x| >= 5), activation"
    )
    assert said(searching, outliers="none").startswith("1 Int8Linear layers, outliers none, activation")


def test_ours_are_cast_and_other_quantized_models_refuse_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    assert model.half().dtype == torch.float16
    model.is_quantized = True
    for name in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            getattr(model, name)()
        monkeypatch.setattr(
            transformers.PreTrainedModel, name, getattr(transformers.PreTrainedModel, name)
        )  # to be undone
    let_cast(lambda one: one is model)
    assert model.float().dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert transformers.PreTrainedModel.half.__name__ == "half"
    other = transformers.LlamaForCausalLM(model.config)
    assert other.half().dtype == torch.float16
    other.is_quantized = True
    with pytest.raises(ValueError, match="not supported for quantized model"):
        other.float()


class Compilable(nn.Sequential):
    """What `compile_decode` asks of a model."""

    _can_compile_fullgraph = True
    device = torch.device("cpu")

    def can_generate(self) -> bool:
        return True


def test_what_stands_in_the_way_of_compiling_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    searching, cut, offloaded, kept, elsewhere = (int8() for _ in range(5))
    searching.outliers = elsewhere.outliers = "dynamic"
    plan_cut(cut, "outputs", 1, SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 0))
    offloaded._hf_hook, kept._hf_hook = SimpleNamespace(offload=True), SimpleNamespace(offload=False)
    experts = Int8Experts.__new__(Int8Experts)
    nn.Module.__init__(experts)
    for layer, why in (
        (int8(), None),
        (searching, None),
        (kept, None),
        (elsewhere.to("meta"), "outliers='dynamic' makes tensors whose size depends on the input, on meta"),
        (experts, "experts are run one by one, as many as a call has"),
        (cut, "several processes hold the model"),
        (offloaded, "some layers are offloaded"),
    ):
        assert compiled._obstacle(Compilable(int8(), layer)) == why
    for name, value in (("can_generate", lambda self: False), ("_can_compile_fullgraph", False)):
        with monkeypatch.context() as patch:
            patch.setattr(Compilable, name, value)
            assert compiled._obstacle(Compilable()) == "transformers has no static cache for Compilable"
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: None)
    assert str(compiled._obstacle(Compilable())).startswith("no C++ compiler found")
    monkeypatch.setattr(Compilable, "device", torch.device("cuda"))
    assert compiled._obstacle(Compilable()) is None  # where Triton compiles


def test_the_compiler_is_the_one_that_will_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for cxx, platform, expected in (("mine", "linux", "mine"), ("", "linux", "g++"), ("", "darwin", "clang++")):
        monkeypatch.setenv("CXX", cxx)
        monkeypatch.setattr("sys.platform", platform)
        assert compiled._cpp_compiler() == f"/bin/{expected}"


def test_a_tokenizer_without_a_token_to_pad_with_ends_texts_with_another() -> None:
    for pad, eos, expected in ((None, 2, 2), (0, 2, 0), (None, None, None)):
        assert _pad(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


def test_the_share_of_stored_columns_is_of_all_inputs() -> None:
    bare = int8()
    bare.outlier_dims = bare.outlier_weight = None
    assert stored_columns([]) == 0
    assert stored_columns([int8(), kbit(), bare, bare]) == 2 / 256
