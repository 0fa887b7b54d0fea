"""A model on two processes: the numbers of one, a part of every layer on each, and the whole when it is saved.

One pair of processes goes through all cases, because each of them takes seconds to begin (`two_processes.py`).
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, runtime
from llmint8.converter.model.experts import expert_matrices
from llmint8.formats import LLMInt8Error, check_values, open_checkpoint
from llmint8.runtime.parallel.cut import plan_cut
from llmint8.runtime.parallel.plan import Parallel

pytestmark = pytest.mark.usefixtures("quiet_transformers")

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# name -> family, its config, how it is converted
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # A layer of 16 bit where others of its name are int8, and an index of several files.
    "llama": ("llama", {"num_hidden_layers": 2}, {"skip": ["layers.0.mlp.down_proj"], "max_shard_size": 300_000}),
    # Biases; a head that is the int8 table of the embedding.
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {"format": 2, "rotate": True, "quantize_embeddings": True}),
    "neox": ("gpt_neox", {"vocab_size": 65}, {"quantize_head": True}),  # biases on what is cut by its inputs
    "phi3": ("phi3", {}, {"format": 2}),  # q, k and v are one layer, gate and up are one
    "mixtral": ("mixtral", {"num_local_experts": 4}, {"format": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 32}, {"format": 2}),  # in stacks, with biases
    "granite": ("granitemoe", {"num_local_experts": 4}, {"format": 2}),  # gate and up of an expert are one layer
    "odd": ("llama", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}, {"outliers": "none"}),
    "opt": ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}, {}),
}
GROUPS = {"activation_group": 64}
AUTO = {"tp_plan": "auto", **GROUPS}
OPT_PLAN = {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model": "llama", "options": AUTO, "saved": "llama-saved", "gradient": True, "generates": True},
    "row": {"model": "llama", "options": {"tp_plan": "auto", "activation_group": "row"}},
    "dynamic": {"model": "llama", "options": {**AUTO, "outliers": "dynamic", "threshold": 1.5}},
    "qwen2": {"model": "qwen2", "options": AUTO, "saved": "qwen2-saved"},
    "neox": {"model": "neox", "options": AUTO, "saved": "neox-saved"},
    "phi3": {"model": "phi3", "options": AUTO, "saved": "phi3-saved"},
    "mixtral": {"model": "mixtral", "options": AUTO, "saved": "mixtral-saved"},
    "mixtral-ep": {
        "model": "mixtral",
        "options": {"ep_size": 2, **GROUPS},
        "saved": "mixtral-ep-saved",
        "generates": True,
    },
    "gpt_oss-ep": {"model": "gpt_oss", "options": {"ep_size": 2, **GROUPS}, "saved": "gpt_oss-ep-saved"},
    "granite": {"model": "granite", "options": AUTO, "saved": "granite-saved"},
    "odd": {"model": "odd", "options": AUTO},
    "opt": {"model": "opt", "options": {"tp_plan": OPT_PLAN, **GROUPS}, "saved": "opt-saved"},
    "no-plan": {"model": "opt", "options": AUTO},
    "no-such-layer": {"model": "llama", "options": {"tp_plan": {"model.layers.*.mlp.up": "colwise"}}},
    "no-such-style": {"model": "llama", "options": {"tp_plan": {"model.layers.*.mlp.up_proj": "sequence_parallel"}}},
}
SAME = [name for name, case in CASES.items() if "saved" in case or name in ("odd", "dynamic")]
SAVED = [name for name, case in CASES.items() if "saved" in case]


def make(path: Path, family: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what two processes have left of the cases."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, (family, changes, options) in MODELS.items():
        make(folder / "sources" / name, family, changes)
        converter.convert(folder / "sources" / name, folder / name, calibration_tokens=64, jobs=1, **options)
    (folder / "cases.json").write_text(json.dumps(CASES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    said["CUDA_VISIBLE_DEVICES"] = ""
    pair = [
        subprocess.Popen(
            [sys.executable, HERE / "two_processes.py", folder],
            env={**os.environ, **said, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=300) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert codes == [0, 0], [(folder / f"{rank}.log").read_text()[-2000:] for rank in (0, 1)]
    return folder


def left(folder: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@functools.cache
def in_one(folder: Path, case: str) -> Any:
    how = {key: value for key, value in CASES[case]["options"].items() if key not in ("tp_plan", "ep_size")}
    return runtime.load(folder / CASES[case]["model"], dtype=torch.float32, **how)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", SAME)
def test_two_processes_give_the_numbers_of_one(case: str, folder: Path) -> None:
    """Where groups of inputs are not cut, each has the scale that it has in one: only sums in float32 differ."""
    ids, one = two_processes_ids(), in_one(folder, case)
    with torch.no_grad():
        expected = one(ids).logits
    for rank in left(folder, case):
        assert "error" not in rank, rank
        assert difference(rank["logits"], expected) < 1e-5
        if "generated" in rank:
            assert rank["generated"].equal(one.generate(ids, max_new_tokens=4, do_sample=False))


def two_processes_ids() -> torch.Tensor:
    return torch.arange(3, 51).view(2, 24) % 64


def test_a_row_that_is_cut_has_a_scale_for_each_part_and_is_no_worse_for_it(folder: Path) -> None:
    ids, one = two_processes_ids(), in_one(folder, "row")
    source = transformers.AutoModelForCausalLM.from_pretrained(folder / "sources" / "llama", dtype=torch.float32)
    with torch.no_grad():
        exact, expected = source(ids).logits, one(ids).logits
    found = left(folder, "row")[0]["logits"]
    assert 1e-4 < difference(found, expected) < 0.02
    assert difference(found, exact) < 1.1 * difference(expected, exact)


def test_the_gradient_of_the_input_is_that_of_one_process(folder: Path) -> None:
    one = in_one(folder, "llama")
    embedded = one.get_input_embeddings()(two_processes_ids()).detach().requires_grad_()
    one(inputs_embeds=embedded).logits.square().sum().backward()
    for rank in left(folder, "llama"):
        assert difference(rank["gradient"], embedded.grad) < 1e-4


@pytest.mark.parametrize("case", [name for name in SAME if name != "dynamic"])
def test_each_holds_its_part_of_every_tensor_and_no_more(case: str, folder: Path) -> None:
    """Against the tensors of the checkpoint, cut here."""
    layers = in_one(folder, case).named_modules()
    whole = {name: layer.stored() for name, layer in layers if isinstance(layer, runtime.Int8Linear)}
    ranks = left(folder, case)
    held = [set(rank["layers"]) for rank in ranks]
    assert held[0] | held[1] == set(whole)
    for number, rank in enumerate(ranks):
        for name, (parts, cut) in rank["layers"].items():
            expected = vars(whole[name]) if cut is None else part_of(whole[name], *cut, number)
            for key in ("values", "absmax", "outlier_dims", "outlier_weight", "bias"):
                assert_same(parts[key], expected[key], f"{name}.{key}")
    twice = {name for name in held[0] & held[1] if ranks[0]["layers"][name][1] is None}
    assert all("attn" in name for name in twice - {"lm_head"})
    assert ("lm_head" in twice) == (case == "qwen2")  # the table that rows are looked up in
    assert bool(twice) == (case in ("qwen2", "odd", "opt", "gpt_oss-ep", "granite"))


def part_of(weight: Any, by: str, pieces: tuple[range, ...], rank: int) -> dict[str, Any]:
    parts = dict(vars(weight))
    if by == "outputs":
        for key in ("values", "absmax", "outlier_weight", "bias"):
            if parts[key] is not None:
                matrices = parts[key].chunk(len(pieces))
                parts[key] = torch.cat([matrix.chunk(2)[rank] for matrix in matrices])
        return parts
    half = weight.values.shape[1] // 2
    here = (weight.outlier_dims >= rank * half) & (weight.outlier_dims < (rank + 1) * half)
    parts["values"] = weight.values[:, rank * half : (rank + 1) * half]
    parts["outlier_dims"] = weight.outlier_dims[here] - rank * half
    parts["outlier_weight"] = weight.outlier_weight[:, here]
    parts["bias"] = weight.bias if rank == 0 else None
    return parts


def assert_same(found: Any, expected: Any, name: str) -> None:
    assert (found is None) == (expected is None), name
    if found is not None:
        assert found.equal(expected), name


def test_what_is_not_int8_is_cut_by_transformers(folder: Path) -> None:
    first, second = left(folder, "llama")
    skipped = "model.layers.0.mlp.down_proj.weight"
    assert first["floats"][skipped] == second["floats"][skipped] == 128 * 256 * 4 // 2
    assert first["floats"]["model.embed_tokens.weight"] == 64 * 128 * 4 // 2


@pytest.mark.parametrize("case", SAVED)
def test_what_they_save_is_the_one_checkpoint_again(case: str, folder: Path) -> None:
    saved, source = (open_checkpoint(folder / name) for name in (CASES[case]["saved"], CASES[case]["model"]))
    assert check_values(saved) == []
    assert saved.config["quantization_config"] == source.config["quantization_config"]
    assert "distributed_config" not in saved.config
    assert saved.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        if source.tensors[name].dtype in ("I8", "I32", "U8") or name.endswith(source.layout.absmax):
            assert saved.read(name).equal(source.read(name)), name
        else:  # it was loaded in float32
            assert saved.read(name).equal(source.read(name).float()), name


ERRORS = {
    "no-plan": "LLMInt8Error: .*: OPTForCausalLM: transformers has no plan of how to cut it; give one",
    "no-such-layer": "LLMInt8Error: .*: tp_plan: 'model.layers.[*].mlp.up' names nothing in LlamaForCausalLM",
    "no-such-style": "LLMInt8Error: .*tp_plan: model.layers.0.mlp.up_proj: no style 'sequence_parallel' for a layer",
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_cut_is_named_in_one_line_by_both(case: str, folder: Path) -> None:
    for rank in left(folder, case):
        assert len(rank["error"].splitlines()) == 1
        with pytest.raises(AssertionError, match=ERRORS[case]):
            raise AssertionError(rank["error"])


@pytest.mark.parametrize(
    ("size", "processes", "options", "message"),
    [
        (192, 2, {"rotation": 64}, "each would have 96, and it is rotated in blocks of 64; start another number of"),
        (5, 4, {}, "cannot be cut for 4 processes: one would have none; start fewer"),
    ],
)
def test_a_layer_that_cannot_be_cut_says_so(size: int, processes: int, options: Any, message: str) -> None:
    layer = runtime.Int8Linear(size, 8, device="meta", **options)
    layer.name = "mlp.down_proj"
    mesh = SimpleNamespace(size=lambda: processes, get_local_rank=lambda: 0)
    with pytest.raises(LLMInt8Error, match=f"^mlp.down_proj: {size} inputs .*{message}"):
        plan_cut(layer, "inputs", 1, mesh)


def test_experts_that_cannot_be_dealt_out_evenly_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model("mixtral", **SIZES, num_local_experts=3)
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(3) for j in (1, 2, 3)]
    parallel = Parallel(SimpleNamespace(tp_size=2, ep_size=2))
    with pytest.raises(
        LLMInt8Error, match=r"^model[.]layers.0.mlp.experts: 3 experts cannot be dealt out evenly to 2 pro"
    ):
        parallel.held(model, expert_matrices(model, tensors))


def test_attention_whose_heads_cannot_be_dealt_out_is_whole_on_each_and_the_first_says_so(folder: Path) -> None:
    first, second = left(folder, "odd")
    cut = {name.rpartition(".")[2]: cut is not None for name, (_, cut) in first["layers"].items()}
    assert cut == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), False) | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), True
    )
    said = "LlamaForCausalLM: num_attention_heads = 3 and num_key_value_heads = 3 on 2 processes, so attention is whole"
    assert [any(line.startswith(said) for line in rank["log"]) for rank in (first, second)] == [True, False]


@pytest.mark.parametrize("case", ["llama", "mixtral", "mixtral-ep"])
def test_nothing_is_said_of_what_others_hold(case: str, folder: Path) -> None:
    for rank in left(folder, case):
        assert not [line for line in rank["log"] if re.search("UNEXPECTED|MISSING|match nothing", line)]
        assert any(line.endswith(" cut") or case == "mixtral-ep" for line in rank["log"])
        assert rank["dequantize"].endswith("several processes hold it; load it without tp_plan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": "auto", "device": "cpu"}, "leave out device and device_map"),
        ({"tp_plan": "auto", "device_map": "auto"}, "leave out device and device_map"),
        ({"tp_plan": "all"}, "tp_plan is 'all', expected 'auto'"),
        ({"distributed_config": {"pp_size": 2}}, "only tp_size and ep_size may be more than 1"),
        ({"tp_plan": "auto", "distributed_config": {}}, "both given"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused_first(options: dict[str, Any], message: str) -> None:
    from transformers.distributed import DistributedConfig

    if "distributed_config" in options:
        options = {**options, "distributed_config": DistributedConfig(**options["distributed_config"])}
    with pytest.raises(ValueError, match=message):
        runtime.load("nowhere", **options)


def test_one_process_loads_all_of_it_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = runtime.load(folder / "opt", tp_plan="auto")
    assert "One process, so nothing is cut; torchrun --nproc-per-node 2 starts two" in caplog.text
    assert model.get_submodule("model.decoder.layers.0.fc1").out_features == 256
