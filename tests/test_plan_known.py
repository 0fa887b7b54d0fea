"""`llmint8 plan` of sizes that are known by name: on the GPUs of the LLM.int8() paper, and what runs of them takes."""

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.modeling import check_device_map
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmint8.converter.model.build import meta_model
from llmint8.converter.words import size
from llmint8.runtime.commands.main import main
from llmint8.runtime.placement.cache import activation_bytes, cache_of
from llmint8.runtime.placement.gpus import parse_machine
from llmint8.runtime.placement.known import known_config
from llmint8.runtime.placement.opened import open_sized
from llmint8.runtime.placement.parts import Part
from llmint8.runtime.placement.plan import Plan

Facts = Callable[..., dict[str, Any]]

# Of the models that the tables name, by parameters; T5-11B and GPT-2 have a test of their own.
OF_THE_TABLES = ("gpt-j-6b", "opt-13b", "opt-30b", "opt-66b", "opt-175b", "bloom-176b")
LARGEST = {
    "A100-80GB:8": ("bloom-176b", "bloom-176b"),
    "A100-40GB:8": ("bloom-176b", "opt-66b"),
    "RTX-3090:8": ("bloom-176b", "opt-66b"),
    "RTX-3090:4": ("opt-66b", "opt-30b"),
    "T4": ("opt-13b", "gpt-j-6b"),
}


@pytest.mark.soak
def test_the_largest_models_that_fit_are_those_of_the_paper() -> None:
    """arXiv 2208.07339, tables 2 and 3. They are about weights, so this asks for a few tokens only."""
    plans = {name: Plan(open_sized(name), 32, 1) for name in OF_THE_TABLES}
    for machine, largest in LARGEST.items():
        gpus = parse_machine(machine)
        for int8, name in zip((True, False), largest, strict=True):
            fitting = [one for one, plan in plans.items() if plan.fits(gpus, int8)]
            assert fitting == list(OF_THE_TABLES[: OF_THE_TABLES.index(name) + 1]), (machine, int8)


@pytest.mark.soak
def test_t5_11b_fits_a_t4_in_int8_only_but_no_12_gb() -> None:
    """The paper has it on 12 GB: since then transformers keeps a third of it, `wo`, out of int8."""
    t4, small = parse_machine("T4"), parse_machine("12GB")
    sized = open_sized("t5-11b")
    t5, gpt2 = Plan(sized, 32, 1), Plan(open_sized("gpt2-xl"), 32, 1)
    assert (t5.fits(t4, True), t5.fits(t4, False), gpt2.fits(t4, False)) == (True, False, True)
    assert (t5.fits(small, True), gpt2.fits(small, False)) == (False, True)
    wo = sum(part.half for part in sized.parts if part.kind == "kept")
    assert wo == 48 * 2 * 65536 * 1024
    assert any("keeps wo in float32" in notice and "6.44 GB" in notice for notice in sized.notices)


class Peak(TorchDispatchMode):
    """Adds up the bytes of tensors that are there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known | before:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.bytes -= nbytes


@pytest.mark.parametrize("context", [64, 2048])
@pytest.mark.parametrize(
    ("name", "fewer"),
    [
        ("opt-175b", {"num_hidden_layers": 2}),
        ("bloom-176b", {"n_layer": 2}),
        ("llama-2-70b", {"num_hidden_layers": 2}),
        ("gpt2-xl", {"n_layer": 2}),
        ("gpt-j-6b", {"n_layer": 2}),
        ("t5-11b", {"num_layers": 2, "num_decoder_layers": 2}),
    ],
)
def test_activations_take_no_more_than_is_reserved_and_a_fourth_of_it_at_least(
    name: str, fewer: dict[str, int], context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks in 16 bit, on the meta device, where memory is counted as on any other."""
    config, other = known_config(name), known_config(name)
    for key, value in fewer.items():
        setattr(config, key, value)
        setattr(other, key, value)
    model: Any = meta_model(config)
    cache: Any = cache_of(meta_model(other))
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    head = model.get_output_embeddings()
    width = max(sum(layer.weight.shape) for layer in layers if layer is not head)
    reserved = activation_bytes(model, [Part("", "", "linear", 0, 0, None, width)], context, 1)
    # The attention of GPUs, which does not write the scores down.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    model.half().eval()
    tokens = torch.zeros(1, context, dtype=torch.long, device="meta")
    more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {"logits_to_keep": 1}
    peak = Peak()
    with torch.no_grad(), peak:
        try:
            out = model(input_ids=tokens, use_cache=True, **more)
        except TypeError:
            out = model(input_ids=tokens, use_cache=True)
    assert out is not None
    assert reserved / 4 < peak.most - sum(cache.taken(context, 1).values()) < reserved


@pytest.mark.soak
@pytest.mark.parametrize("name", ["opt-350m", "t5-small", "mixtral-8x7b", "gpt2"])
def test_what_gpus_hold_is_a_device_map(name: str, facts: Facts) -> None:
    held = facts(name, "--gpu", "3x80GB")["machines"][0]["int8"]["gpus"]
    placed = {module: number for number, gpu in enumerate(held) for module in gpu["holds"]}
    assert len(placed) == sum(len(gpu["holds"]) for gpu in held)
    check_device_map(meta_model(known_config(name)), placed)


def test_what_does_not_fit_is_said_with_the_context_that_would(facts: Facts) -> None:
    machine = ("--gpu", "2x1.5GB")
    found = facts("opt-1.3b", *machine)
    held = found["machines"][0]
    longest = held["int8"]["longest_context"]
    assert not held["int8"]["fits"]
    assert min(gpu["free"] for gpu in held["int8"]["gpus"]) < 0
    assert 500 < longest < 2048
    text = CliRunner().invoke(main, ["plan", "opt-1.3b", *machine]).stdout
    assert f"does not fit, {size(-min(gpu['free'] for gpu in held['int8']['gpus']))} are missing on one GPU" in text
    assert f"with up to {longest:,} tokens of context it does" in text
    sized, gpus = open_sized("opt-1.3b"), parse_machine("2x1.5GB")
    assert [Plan(sized, context, 1).fits(gpus, True) for context in (longest, longest + 1)] == [True, False]
    assert held["half"]["longest_context"] == 0
    holds = [name for gpu in held["int8"]["gpus"] for name in gpu["holds"]]
    assert holds[0] == "model.decoder.embed_tokens"
    # The head has its weight in common with the embedding.
    assert holds[1] == "lm_head"
    assert holds[-24:] == [f"model.decoder.layers.{number}" for number in range(24)]


def test_the_smallest_set_is_the_first_number_of_gpus_that_fits() -> None:
    made = Plan(open_sized("opt-13b"), 2048, 1)
    counts = {name: [one["int8"], one["half"]] for one in made.smallest_sets() for name in one["gpus"]}
    for name, expected in (("T4", [2, 2]), ("RTX-3090", [1, 2]), ("H200", [1, 1])):
        (gpu,) = parse_machine(name)
        assert [next(n for n in range(1, 17) if made.fits([gpu] * n, int8)) for int8 in (True, False)] == expected
        assert counts[name] == expected
    (small,) = parse_machine("1GB")
    assert made.smallest(small, False) is None


@pytest.mark.soak
def test_the_document_has_the_machines_that_hold_opt_175b(facts: Facts) -> None:
    text = (Path(__file__).parent.parent / "docs" / "opt-175b.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "GB | " in line]
    rows = [row for row in rows if re.fullmatch(r"\d+x\d+GB", row[0])]
    assert len(rows) == 3
    machines = [argument for row in rows for argument in ("--gpu", row[0])]
    found_all = facts("opt-175b", "--context", 1024, *machines)["machines"]
    for (machine, weights, cache, reserved, free, longest), planned in zip(rows, found_all, strict=True):
        found = planned["int8"]
        low, high = min(gpu["weights"] for gpu in found["gpus"]), max(gpu["weights"] for gpu in found["gpus"])
        tightest = min(found["gpus"], key=lambda gpu: gpu["free"])
        gb = [low, high, tightest["cache"], tightest["reserved"] + tightest["activations"], tightest["free"]]
        lowest, highest = weights.removesuffix(" GB").split(" to ")
        said = [lowest, highest, *(cell.removesuffix(" GB") for cell in (cache, reserved, free))]
        assert said == [f"{nbytes / 1e9:.1f}" for nbytes in gb], machine
        assert found["fits"]
        assert not planned["half"]["fits"]
        assert int(longest) == found["longest_context"]
