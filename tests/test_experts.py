"""Experts of mixtures in int8: found, calibrated by their own tokens, converted, loaded, run and saved."""

import copy
import dataclasses
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmint8 import converter, runtime
from llmint8.converter.conversion.comparison import compare_with_source
from llmint8.converter.model.build import meta_model
from llmint8.converter.model.experts import expert_by_expert, expert_matrices, experts_of, projections, run_experts
from llmint8.formats import NATIVE, LLMInt8Error, check_values, open_checkpoint, open_source
from llmint8.kernels import reference
from llmint8.runtime import Int8Linear
from llmint8.runtime.layers.experts import Int8Experts

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
}
_OF_DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
_OF_DEEPSEEK |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"moe_intermediate_size": 48, **_OF_DEEPSEEK},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
}
MATRICES = {"deepseek_v3": 12, "granitemoe": 16, "gpt_oss": 16}
IDS = torch.arange(48)[None] % 64
OUTPUT: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


def config_of(family: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))


def make(path: Path, family: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter, std=0.1)
        if name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter)  # so that no expert is chosen by a hair
    model.half().save_pretrained(path)
    return path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_loads_generates_and_is_saved(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family)
    report = converter.convert(source, tmp_path / "int8", format=2, rotate=True)
    checkpoint = open_checkpoint(tmp_path / "int8")
    assert check_values(checkpoint) == []
    assert report.uncalibrated == []
    assert not [notice for notice in report.notices if "experts" in notice]
    model = runtime.load(tmp_path / "int8", dtype=torch.float32)
    experts = [module for module in model.modules() if isinstance(module, Int8Experts)]
    matrices = [module for one in experts for module in one.modules() if isinstance(module, Int8Linear)]
    assert len(matrices) == MATRICES.get(family, 24)
    assert not list(experts_of(model))
    exact = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = logits(exact)
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert model.generate(IDS[:, :4], **OUTPUT).shape[1] > 4
    weights = sum(
        2 * stack.numel() for one in experts_of(exact).values() for stack in one.parameters() if stack.ndim == 3
    )
    int8 = sum(part.nbytes for one in matrices for part in (one.unpacked_weight(), one.row_absmax))
    assert int8 <= 0.55 * weights  # rows are of 48 and 96 here, with four bytes of absmax each
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    again = open_checkpoint(tmp_path / "saved")
    assert again.records.keys() == checkpoint.records.keys()
    assert check_values(again) == []
    assert torch.equal(logits(runtime.load(tmp_path / "saved", dtype=torch.float32)), found)
    assert compare_with_source(checkpoint, open_source(source)).problems == []


def test_expert_weights_take_half_the_memory(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt_oss", hidden_size=768, intermediate_size=768, num_hidden_layers=1)
    converter.convert(source, tmp_path / "int8", format=2, outliers="none")
    model = runtime.load(tmp_path / "int8")
    stacks = sum(
        2 * tensor.numel() for name, tensor in load_file(source / "model.safetensors").items() if tensor.ndim == 3
    )
    resident = 0
    for module in model.modules():
        if isinstance(module, Int8Experts):
            layers = [layer for layer in module.modules() if isinstance(layer, Int8Linear)]
            tensors = [part for layer in layers for part in (*layer._parameters.values(), *layer._buffers.values())]
            for layer in layers:
                prepared: Any = layer.prepared
                parts = prepared.operands if hasattr(prepared, "operands") else vars(prepared).values()
                tensors += [part for part in parts if isinstance(part, Tensor)]
            stores = {
                part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                for part in tensors
                if part is not None
            }
            resident += sum(stores.values())
    assert resident <= 0.52 * stacks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arithmetic_is_that_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    model.set_experts_implementation("eager")
    experts = next(iter(experts_of(model).values()))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)

    def multiply(projection: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(experts, projection)[expert]
        return x @ (weight if experts.is_transposed else weight.t())

    x, index = torch.randn(9, 64), torch.randint(3, (9, 2))
    weights = torch.rand(9, 2)
    each = {(name, expert): [partial(multiply, name, expert)] for name in projections(experts) for expert in range(4)}
    multiply_rows = expert_by_expert(each, 4)
    with torch.no_grad():
        found = run_experts(experts, multiply_rows, x, index, weights)
        assert torch.allclose(found, experts(x, index, weights), atol=1e-5)
        if not experts.has_bias:  # which of its own forward passes over them too
            index[4] = 4
            kept = index < 4
            none = run_experts(experts, multiply_rows, x, index, weights * kept)
            assert not none[4].any()
            assert torch.allclose(none[:4], found[:4])
        assert run_experts(experts, multiply_rows, x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_layers_are_named_as_their_tensors(tmp_path: Path) -> None:
    for family, names in {
        "mixtral": ["block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.w3", "block_sparse_moe.experts.3.w2"],
        "granitemoe": ["block_sparse_moe.input_linear.weight.3", "block_sparse_moe.output_linear.weight.3"],
        "gpt_oss": ["mlp.experts.gate_up_proj.3", "mlp.experts.down_proj.3"],
    }.items():
        source = open_source(make(tmp_path / family, family))
        found = expert_matrices(meta_model(config_of(family)), source.tensors)
        last = [matrix for matrix in found if matrix.expert == 3 and ".1." in matrix.name]
        assert [matrix.name for matrix in last] == [f"model.layers.1.{name}" for name in names]
        assert [matrix.part for matrix in last] == ([0, 1, 0] if family == "mixtral" else [0, 0])
        # Of what is written they are found again.
        converter.convert(tmp_path / family, tmp_path / f"{family}-int8", format=2, outliers="none")
        tensors = open_checkpoint(tmp_path / f"{family}-int8").tensors
        again = expert_matrices(meta_model(config_of(family)), tensors)
        assert {matrix.name for matrix in again} == {matrix.name for matrix in found}
        assert {matrix.module for matrix in again} == {matrix.module for matrix in found}
        for name in (matrix.name for matrix in last):
            assert tensors[f"{name}.weight"].dtype == "I8"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_matrices_of_stacks_and_of_files_of_their_own_are_quantized_alike(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family)
    converter.convert(source, tmp_path / "int8", format=2, rotate=True, outliers="top-k=4")
    checkpoint, tensors = open_checkpoint(tmp_path / "int8"), load_file(source / "model.safetensors")
    for matrix in expert_matrices(meta_model(config_of(family)), tensors.keys()):
        weight = tensors[matrix.tensor]
        weight = weight[matrix.expert].t() if matrix.shared else weight
        values, absmax = reference.quantize_weight(weight, 64)
        assert torch.equal(checkpoint.read(f"{matrix.name}.weight"), values)
        assert torch.equal(checkpoint.read(f"{matrix.name}.absmax"), absmax)
        dims = checkpoint.read(f"{matrix.name}.outlier_dims").long()
        assert torch.equal(checkpoint.read(f"{matrix.name}.outlier_weight"), weight[:, dims])
    if family == "gpt_oss":
        bias = "model.layers.0.mlp.experts.gate_up_proj_bias"
        assert torch.equal(checkpoint.read(bias), tensors[bias])


def test_experts_that_no_token_reaches_are_counted_and_get_no_columns(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe", num_experts=40)
    report = converter.convert(source, tmp_path / "int8", format=2, calibration_tokens=8)
    starved = [name for name in report.uncalibrated if ".experts." in name]
    # 8 tokens in 2 layers, each with 2 of 40 experts of 3 matrices.
    assert 2 * 3 * (40 - 16) <= len(starved) < 240
    notice = f"{len(starved)} of 240 matrices of experts were reached by no token of the calibration"
    assert [one for one in report.notices if one.startswith(notice)]
    counts = open_checkpoint(tmp_path / "int8").quantization.outliers
    assert not any(counts[name] for name in starved)
    assert any(counts[name] for name in counts if ".experts." in name)
    model = runtime.load(tmp_path / "int8")
    assert {module.outliers for module in model.modules() if isinstance(module, Int8Linear)} == {"static"}
    assert logits(model).isfinite().all()


def test_gate_and_up_of_an_expert_share_their_columns(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mixtral")
    converter.convert(source, tmp_path / "int8", format=2)
    checkpoint = open_checkpoint(tmp_path / "int8")
    seen = set()
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}"
        dims = [checkpoint.read(f"{name}.{part}.outlier_dims").tolist() for part in ("w1", "w3")]
        assert dims[0] == dims[1]
        seen.add(tuple(dims[0]))
    assert len(seen) > 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family)
    how: dict[str, Any] = {"format": 2, "rotate": True, "outliers": "top-k=4", "jobs": 1}
    converter.convert(source, tmp_path / "whole", **how)
    for count in (2, 11, 20):
        done: list[str] = []

        def stop(name: str, nbytes: int, done: list[str] = done, count: int = count) -> None:
            done.append(name)
            if len(done) == count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            converter.convert(source, tmp_path / str(count), progress=stop, **how)
        converter.convert(source, tmp_path / str(count), **how)
        assert files(tmp_path / str(count)) == files(tmp_path / "whole")
    assert converter.convert(source, tmp_path / "whole", **how).already


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_all_in_int8_or_none(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family)
    report = converter.convert(source, tmp_path / "skipped", format=2, outliers="none", skip=[r"layers\.1\..*experts"])
    assert sum(reason == "other experts are not in int8" for reason in report.kept.values()) > 0
    checkpoint = open_checkpoint(tmp_path / "skipped")
    assert not [name for name in checkpoint.records if "experts" in name]
    tensors = load_file(source / "model.safetensors")
    assert {name for name in checkpoint.tensors if "experts" in name} == {name for name in tensors if "experts" in name}
    assert logits(runtime.load(tmp_path / "skipped")).isfinite().all()
    # One that holds NaN is found only when the source has been split.
    name = next(name for name, tensor in tensors.items() if "experts" in name and not name.endswith("bias"))
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = converter.convert(source, tmp_path / "kept", format=2, outliers="none", on_nonfinite="keep")
    assert "holds NaN or infinity" in report.kept.values()
    kept = open_checkpoint(tmp_path / "kept")
    assert {name for name in kept.tensors if "experts" in name} == {name for name in tensors if "experts" in name}
    assert check_values(kept) == []


def test_with_format_1_they_stay_and_it_is_said_what_they_take(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mixtral")
    report = converter.convert(source, tmp_path / "int8", outliers="none")
    (notice,) = (one for one in report.notices if "of experts" in one)
    assert notice.startswith("24 matrices of experts (294.9 kB,")
    assert notice.endswith("they are 78% of it, which --format 2 halves")
    tensors = load_file(source / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "int8")
    for name in (name for name in tensors if "experts" in name):
        assert torch.equal(checkpoint.read(name), tensors[name])


def test_rows_of_all_experts_at_once_are_what_each_makes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, but for the kernels, of which tests/test_triton_experts.py knows."""
    source = make(tmp_path / "source", "gpt_oss")
    converter.convert(source, tmp_path / "int8", format=2, rotate=True)
    model = runtime.load(tmp_path / "int8", dtype=torch.float32)
    expected = logits(model)
    monkeypatch.setattr(Int8Experts, "_is_grouped", staticmethod(lambda x: True))
    assert torch.allclose(logits(model), expected, atol=1e-6)
    experts = next(module for module in model.modules() if isinstance(module, Int8Experts))
    before = {key: prepared for key, (prepared, _) in experts._prepared.items()}
    assert len(before) == 2
    logits(model)
    assert before == {key: prepared for key, (prepared, _) in experts._prepared.items()}
    for layer in experts.modules():
        if isinstance(layer, Int8Linear):
            layer.activation_group = 64
    changed = logits(model)
    assert not torch.equal(changed, expected)
    monkeypatch.undo()
    assert torch.allclose(logits(model), changed, atol=1e-6)


def test_a_stack_takes_the_place_of_the_weights_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmint8.kernels import experts as kernel
    from llmint8.runtime.layers import experts as module

    source = make(tmp_path / "source", "gpt_oss")
    converter.convert(source, tmp_path / "int8", format=2, rotate=True)
    model = runtime.load(tmp_path / "int8", dtype=torch.float32)
    expected = logits(model)

    class Stacked(kernel.PreparedExperts):
        def __init__(self, weights: Any) -> None:
            self.values, self._each = torch.stack([one.values for one in weights]), kernel.prepare_experts(weights)

        def linear(self, x: Tensor, expert_of_row: Tensor, activation: reference.Activation = "absmax") -> Tensor:
            return self._each.linear(x, expert_of_row, activation)

    monkeypatch.setattr(module, "prepare_experts", Stacked)
    monkeypatch.setattr(Int8Experts, "_is_grouped", staticmethod(lambda x: True))
    assert torch.allclose(logits(model), expected, atol=1e-6)
    experts = next(one for one in model.modules() if isinstance(one, Int8Experts))
    for (projection, _), (prepared, _) in experts._prepared.items():
        stack = prepared.values
        assert stack is not None
        for number, values in enumerate(stack):
            layer = experts.get_submodule(f"{projection}.{number}")
            assert isinstance(layer, Int8Linear)
            assert layer.unpacked_weight().data_ptr() == values.data_ptr()
    model.save_pretrained(tmp_path / "saved")
    assert check_values(open_checkpoint(tmp_path / "saved")) == []


def test_copies_and_pickles_are_of_their_own(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mixtral")
    converter.convert(source, tmp_path / "int8", format=2, outliers="none")
    model = runtime.load(tmp_path / "int8", dtype=torch.float32)
    expected = logits(model)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for one in model.modules():
        if isinstance(one, Int8Linear):
            one.row_absmax.zero_()
            one.prepare()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(again), expected)
    assert not torch.equal(logits(model), expected)
    assert "Int8Experts(\n" in repr(twin)
    assert not runtime.load(tmp_path / "int8", compile=True).generation_config.cache_implementation


@pytest.mark.parametrize("low_disk", [False, True], ids=["fetched", "low disk"])
def test_experts_of_a_repo_are_those_of_a_directory(low_disk: bool, tmp_path: Path, hub: Any) -> None:
    source = make(tmp_path / "source", "gpt_oss")
    hub.add("alice/mixture", files(source))
    how: dict[str, Any] = {"format": 2, "rotate": True, "outliers": "top-k=4"}
    converter.convert("alice/mixture", tmp_path / "of repo", low_disk=low_disk, **how)
    converter.convert(source, tmp_path / "of directory", **how)
    one, other = (open_checkpoint(tmp_path / name) for name in ("of repo", "of directory"))
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    assert converter.convert("alice/mixture", tmp_path / "of repo", low_disk=low_disk, **how).already


def test_a_checkpoint_with_some_experts_only_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mixtral")
    converter.convert(source, tmp_path / "int8", format=2, outliers="none")
    checkpoint = open_checkpoint(tmp_path / "int8")
    gone = "model.layers.1.block_sparse_moe.experts.2.w2"
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    del tensors[f"{gone}.absmax"], tensors[f"{gone}.outlier_dims"], tensors[f"{gone}.outlier_weight"]
    tensors[f"{gone}.weight"] = torch.zeros(64, 96).half()
    save_file(tensors, tmp_path / "int8" / NATIVE.single, metadata={"format": "pt"})
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    for table in (config["quantization_config"]["layers"], config["quantization_config"]["outliers"]["counts"]):
        del table[gone]
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    (tmp_path / "int8" / "llmint8_manifest.json").unlink()
    with pytest.raises(LLMInt8Error, match=f"{gone}: not int8 in the checkpoint, as other experts"):
        runtime.load(tmp_path / "int8")


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "granitemoe")
    converter.convert(source, tmp_path / "int8", format=2, outliers="none")
    path = tmp_path / "int8" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(LLMInt8Error, match=r"wants shape|shape \["):
        runtime.load(tmp_path / "int8")


def test_matrices_know_where_they_are() -> None:
    model = meta_model(config_of("mixtral"))
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    experts = experts_of(model)["model.layers.0.mlp.experts"]
    assert projections(experts) == ("gate_up_proj", "down_proj")
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")]
    assert len(expert_matrices(model, names)) == 12
    assert expert_matrices(model, names[:-1]) == []  # not all of them
    matrix = expert_matrices(model, names)[0]
    assert matrix.module == "model.layers.0.mlp.experts.0.w1"
    assert dataclasses.replace(matrix, shared=True, name="x.0").inside == "gate_up_proj.0"
