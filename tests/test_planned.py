"""What a plan says of disk and memory before anything is done, against what is read and written then."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter
from llmint8.converter.hub.resolve import resolve
from llmint8.converter.planning.memory import peak_memory
from llmint8.converter.planning.options import Options
from llmint8.converter.planning.plan import make_plan
from llmint8.converter.planning.selected import SelectedLayer, Selection, kept_output_bytes
from llmint8.converter.planning.sizes import size_notices
from llmint8.converter.words import size
from llmint8.formats import TensorInfo
from llmint8.formats.containers import tensors

MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, quiet_transformers: None) -> Path:
    path = tmp_path_factory.mktemp("planned") / "source"
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("how", "times_read"),
    [
        ({"outliers": "none"}, 1),
        ({"outliers": "top-k=4", "calibration_tokens": 32}, 1),  # with columns, norms and outputs put aside
        ({"format": 2, "bits": 5, "outliers": "proxy=0.05"}, 3),
        ({"format": 2, "bits": 3, "on_nonfinite": "keep"}, 3),  # levels of each layer, and NaN
    ],
    ids=str,
)
def test_a_run_takes_the_disk_that_was_planned(
    how: dict[str, Any], times_read: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = make_plan(resolve(source, None, "source"), out, Options(**how))
    read, most = 0, [0]
    read_into = tensors.read_into

    def counted(file: Any, path: Path, name: str, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view) if path.parent == source else 0
        read_into(file, path, name, offset, view)

    def progress(name: str, nbytes: int) -> None:
        most.append(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))

    monkeypatch.setattr(tensors, "read_into", counted)
    report = converter.convert(source, out, progress=progress, **how)
    assert report.bytes_before == plan.bytes_before == sum(info.nbytes for info in plan.source.tensors.values())
    # A budget goes to columns of more rows than others have, or fewer, and the last of it perhaps nowhere.
    assert report.bytes_after == pytest.approx(plan.bytes_after, rel=0.01 if plan.calibrated else 0)
    # All of the source counts where only its layers, which are two thirds of it, are read once more.
    assert plan.bytes_to_read == times_read * (source / "model.safetensors").stat().st_size
    assert plan.bytes_to_read / 1.6 < read <= plan.bytes_to_read
    assert max(most) <= plan.bytes_to_write < 1.15 * max(most)
    assert plan.disk_needed == plan.bytes_to_write


def test_bits_are_chosen_by_reading_all_once_more_for_a_size_that_is_given(source: Path, tmp_path: Path) -> None:
    plan = make_plan(resolve(source, None, "source"), tmp_path / "out", Options(format=2, target_size=600_000))
    assert plan.bytes_after == 600_000
    assert plan.bytes_to_read == 2 * (source / "model.safetensors").stat().st_size


def test_what_makes_the_result_larger_than_it_need_be_is_told(source: Path, tmp_path: Path) -> None:
    in_half = make_plan(resolve(source, None, "source"), tmp_path / "out", Options(outliers="none"))
    assert size_notices(in_half) == []
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")

    def planned(**options: Any) -> Any:
        how = Options(**{"outliers": "none", **options})
        return make_plan(resolve(tmp_path / "source", None, "source"), tmp_path / "out", how)

    plain, cast = planned(), planned(dtype="bfloat16")
    head, both = planned(quantize_head=True), planned(quantize_head=True, dtype="bfloat16")
    share = f"{plain.bytes_after / plain.bytes_before:.0%} of the source"
    stays = "what is not quantized stays in float32, as it is in the source: OUT takes"
    assert size_notices(plain) == [
        f"{stays} {size(plain.bytes_after)}, {share}; with --dtype bfloat16 {size(cast.bytes_after)}"
    ]
    assert size_notices(cast) == []
    added, rest = size_notices(head)
    assert added == (
        f"--quantize-head adds {size(head.bytes_after - plain.bytes_after)}: the embedding it shares stays beside it. "
        f"OUT takes {size(head.bytes_after)}, {head.bytes_after / head.bytes_before:.0%} of the source; "
        f"without it {size(plain.bytes_after)}"
    )
    assert rest.endswith(f"with --dtype bfloat16 {size(both.bytes_after)}")
    assert len(size_notices(both)) == 1
    assert (plain.precision, cast.precision) == ("float32", "16 bit")


def test_without_the_model_it_is_said_where_a_pass_was_wanted(source: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "source"
    unknown.mkdir()
    shutil.copy(source / "model.safetensors", unknown)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "unheard-of"}
    (unknown / "config.json").write_text(json.dumps(config))
    search = ", and layers search for their outliers in every call"
    for options, expected in (
        ({"outliers": "none"}, None),
        ({"outliers": "top-k=4"}, search),
        ({"outliers": "top-k=4", "format": 2}, ""),
        ({"outliers": "none", "format": 2, "rounding": "gptq"}, ""),
        ({"format": 2, "target_size": 600_000}, ""),
        ({"outliers": "proxy=0.05", "format": 2}, None),
    ):
        plan = make_plan(resolve(unknown, None, "source"), tmp_path / "out", Options(**options))
        said = [notice for notice in plan.selection.notices if "calibration" in notice]
        whole = f"without the model there is no calibration: no outlier columns are stored{expected}"
        assert said == ([] if expected is None else [whole]), options


def info(name: str, mib: int, columns: int, **changes: Any) -> TensorInfo:
    """A matrix of so many MiB in 16 bit."""
    shape = (mib * MIB // 2 // columns, columns)
    return TensorInfo(name, "BF16", shape, changes.get("file", "a.safetensors"), 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Six blocks of 4 MiB a thread, and 64 MiB beside all; whatever the size of the tensors.
        ({}, 64 + 24),
        ({"threads": 8}, 64 + 8 * 24),
        # What is no block of rows is there whole, and half of it again.
        ({"transposed": True}, 64 + 24 + 96),
        ({"transposed": True, "threads": 8}, 64 + 8 * (24 + 96)),
        ({"whole": ["embedding"]}, 64 + 24 + 300),
        ({"whole": ["layer"]}, 64 + 24 + 96),
        # In the pass the largest weight, its codes and the next one; the activations of a batch as wide as the widest
        # layer, eight times in float32; and with the head its logits twice.
        ({"rows": 512}, 64 + 500 + 512 * 4 * 8 * 8192 / MIB),
        ({"rows": 512, "head": True}, 64 + 500 + 512 * 4 * (8 * 8192 + 2 * 16384) / MIB),
        ({"rows": 1, "threads": 64}, 64 + 64 * 24),
    ],
    ids=str,
)
def test_the_memory_that_is_planned(changes: dict[str, Any], expected: float) -> None:
    layer, narrow, embedding = info("layer", 64, 8192), info("narrow", 64, 2048), info("embedding", 200, 4096)
    whole = changes.pop("whole", [])
    source: Any = SimpleNamespace(
        tensors={one.name: one for one in (layer, narrow, embedding)}, in_blocks=lambda name: name not in whole
    )
    selected = [SelectedLayer("layer", layer, changes.pop("transposed", False)), SelectedLayer("narrow", narrow, False)]
    table = SelectedLayer("embedding", embedding, False, lookup="only")  # nobody multiplies by it
    selection = Selection({one.name: one for one in (*selected, table)}, {}, {}, [])
    found = peak_memory(source, selection, **{"threads": 1, "rows": 0, "head": False, **changes})
    assert found / MIB == pytest.approx(expected, rel=1e-6)


def test_an_output_is_put_aside_when_it_takes_a_quarter_of_its_weight_at_most() -> None:
    layer = SelectedLayer("layer", info("layer", 64, 8192), False)
    assert (layer.out_features, layer.in_features) == (4096, 8192)
    transposed = SelectedLayer("layer", info("layer", 64, 8192), True)
    assert (transposed.out_features, transposed.in_features) == (8192, 4096)
    assert [kept_output_bytes(layer, tokens) // MIB for tokens in (0, 512, 1024, 1025)] == [0, 8, 16, 0]
