"""What `load` makes of its arguments and of what a checkpoint says, and what the manifest says of the calibration."""

import logging
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from llmint8.formats import BITSANDBYTES, NATIVE, KBit, LLMInt8Error, Quantization, TensorInfo
from llmint8.formats.int8.schemes import Scheme
from llmint8.runtime.layers import arguments
from llmint8.runtime.layers.arguments import (
    check_choice,
    check_searchable,
    check_threshold,
    chosen_dims,
    group_to_run,
    kernels_group,
    outlier_mode,
    recorded_group,
    settled_dtype,
)
from llmint8.runtime.model.calibration import Calibration, calibration_of, missed_layers, read_calibration


def quantization(**values: Any) -> Quantization:
    return Quantization(**{"skip_modules": [], "outliers": {}, **values})


OURS, THEIRS, NONE = (
    quantization(),
    quantization(llmint8=False, threshold=5.0),
    quantization(llmint8=False, threshold=0.0),
)


@pytest.mark.parametrize(
    ("of", "outliers", "threshold", "expected"),
    [
        (OURS, None, None, ("static", 6.0)),
        (OURS, "dynamic", None, ("dynamic", 6.0)),
        (OURS, "dynamic", 3.5, ("dynamic", 3.5)),
        (OURS, "none", None, ("none", 6.0)),
        (OURS, None, 3.5, r"^threshold is 3\.5, which only outliers='dynamic' uses, not 'static'$"),
        (OURS, "none", 3.5, r"^threshold is 3\.5, which only outliers='dynamic' uses, not 'none'$"),
        (THEIRS, None, None, ("dynamic", 5.0)),
        (THEIRS, None, 3.5, ("dynamic", 3.5)),
        (THEIRS, "none", None, ("none", 5.0)),
        (THEIRS, "static", None, "^outliers is 'static', but bitsandbytes stores none; expected 'dynamic' or 'none'$"),
        (NONE, None, None, ("none", 0.0)),  # to bitsandbytes 0 means that nothing is an outlier
        (NONE, None, 2.0, ("dynamic", 2.0)),
        (NONE, "dynamic", None, r"^threshold is 0\.0, expected a number above 0 with outliers='dynamic'$"),
    ],
)
def test_outliers_and_their_threshold_are_settled(
    of: Quantization, outliers: Any, threshold: Any, expected: Any
) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            outlier_mode(of, outliers, threshold)
    else:
        assert outlier_mode(of, outliers, threshold) == expected


def test_what_can_find_nothing_is_refused() -> None:
    for outliers, threshold in (("dynamic", 1e-9), ("static", 0.0), ("none", math.nan)):
        check_threshold(outliers, threshold)  # type: ignore[arg-type]
    for threshold in (0.0, -1.0, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^threshold is .*, expected a number above 0 with outliers='dynamic'$"):
            check_threshold("dynamic", threshold)
    kbit = KBit(4, "int", 64)
    for outliers in ("static", "none"):
        check_searchable(outliers, 64, kbit)  # type: ignore[arg-type]
    check_searchable("dynamic", None, None)
    for rotation, coded, why in (
        (64, None, "the layer is rotated"),
        (None, kbit, "of k bits"),
        (64, kbit, "of k bits"),
    ):
        with pytest.raises(ValueError, match=rf"^outliers is 'dynamic', and .*{why}.*; expected 'static' or 'none'$"):
            check_searchable("dynamic", rotation, coded)
    check_choice("x", None, (1, 2))
    check_choice("x", 2, (1, 2))
    with pytest.raises(ValueError, match=r"^x is 3, expected one of 1, 2$"):
        check_choice("x", 3, (1, 2))


def test_dims_are_those_of_the_layer_in_order() -> None:
    weight = torch.zeros(2, 5)
    assert chosen_dims(None, weight).tolist() == []
    for dims in (torch.tensor([0, 4]), torch.tensor([0, 4], dtype=torch.uint8)):
        found = chosen_dims(dims, weight)
        assert (found.tolist(), found.dtype) == ([0, 4], torch.int64)
    for wrong in (torch.tensor([5]), torch.tensor([-1]), torch.tensor([2, 2]), torch.tensor([3, 1])):
        with pytest.raises(ValueError, match="outlier_dims"):
            chosen_dims(wrong, weight)
    for other in (torch.tensor([1.0]), torch.tensor([True])):
        with pytest.raises(ValueError, match=rf"^outlier_dims is {other.dtype}, expected integers$"):
            chosen_dims(other, weight)


def test_a_group_runs_where_there_are_kernels_for_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "llmint8")
    whole, grouped = quantization(), quantization(schemes={"int8": Scheme(activation_group=64)})
    assert (recorded_group(whole), recorded_group(grouped)) == ("row", 64)
    assert (kernels_group("row"), kernels_group(64)) == (None, 64)
    for has_kernels in (True, False):
        monkeypatch.setattr(arguments, "has_groups", lambda device, has=has_kernels: has and device.type == "cpu")
        for of, device in ((whole, "cpu"), (grouped, "cpu"), (grouped, "meta")):
            runs = of is whole or (has_kernels and device == "cpu")
            caplog.clear()
            found = group_to_run(of, torch.device(device), "here")
            assert found == (recorded_group(of) if runs else "row")
            said = (
                [] if runs else [f"here: one scale for each input, and not one for each 64 .* on {device}, .*=64 asks"]
            )
            assert len(caplog.messages) == len(said)
            for words, message in zip(said, caplog.messages, strict=True):
                assert re.search(words, message)


def checkpoint(*tensors: tuple[str, str, tuple[int, ...]], layout: Any = BITSANDBYTES, **values: Any) -> Any:
    infos = {name: TensorInfo(name, dtype, shape, "", 0) for name, dtype, shape in tensors}
    records = {name.removesuffix(".weight"): None for name, info in infos.items() if info.dtype == "I8"}
    return types.SimpleNamespace(
        tensors=infos,
        layout=layout,
        records=records,
        path=Path("x"),
        quantization=quantization(layout=layout, **values),
    )


@pytest.mark.parametrize("layout", [BITSANDBYTES, NATIVE], ids=["format 1", "format 2"])
def test_a_dtype_is_what_is_asked_for_or_said_or_that_of_most_bytes(layout: Any) -> None:
    scale = ("a.weight", "I8", (9, 99)), (f"a.{layout.absmax}", "F32", (99,))
    several = checkpoint(*scale, ("b", "BF16", (9,)), ("c", "F16", (5,)), ("d", "F16", (6,)), layout=layout)
    said, silent = types.SimpleNamespace(dtype=torch.float32), types.SimpleNamespace(dtype=None)
    for asked, expected in (
        (torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (None, torch.float32),
        ("auto", torch.float32),
    ):
        assert settled_dtype(asked, several, said) == expected
    for asked in (None, "auto"):
        assert settled_dtype(asked, several, silent) == torch.float16  # 22 bytes, and 18
    # The scale of each row says nothing: where there is no other float, it is float32.
    assert settled_dtype(None, checkpoint(*scale, layout=layout), silent) == torch.float32
    assert settled_dtype(None, checkpoint(*scale, ("b", "BF16", (1,)), layout=layout), silent) == torch.bfloat16
    for wrong in ("int8", torch.int8, "float64", "half"):
        with pytest.raises(ValueError, match=r"^dtype is .*, expected one of bfloat16, float16, float32$"):
            settled_dtype(wrong, several, said)


def test_what_is_known_of_an_input_is_known_of_all_that_share_it() -> None:
    modules: dict[str, Any] = {
        "q": {"kept_absmax": 2.5, "absmax": [9, 7.5]},
        "k": {"shares_input_with": "q"},
        "up": {"kept_absmax": 0, "absmax": [1.0, None]},
        "down": {"absmax": []},
        "gone": {"kept_absmax": 1.0},
        "odd": {"absmax": [1.0, "a"]},
    }
    found = calibration_of(["q", "k", "up", "down", "new", "odd"], modules, frozenset({"new"}))
    assert found.limits == {"q": 2.5, "k": 2.5, "up": 0.0}
    assert found.largest == {"q": 9, "k": 9, "up": math.inf}
    assert found.missed == {"new"}
    largest = float(torch.finfo(torch.float32).max)
    assert calibration_of(["q"], {"q": {"kept_absmax": largest}}, frozenset()).limits == {"q": largest}
    for wrong in (-1e-9, 2 * largest, math.nan, math.inf, True, "1", None, [1.0]):
        with pytest.raises(ValueError, match=r"^q: malformed statistics \(kept_absmax is .*, expected a magnitude in"):
            calibration_of(["q"], {"q": {"kept_absmax": wrong}}, frozenset())


def test_a_layer_that_the_calibration_should_have_reached_is_missed() -> None:
    manifest: Any = types.SimpleNamespace(modules={"a": {"kept_absmax": 1.0}})
    layers = ("a.weight", "I8", (1, 1)), ("b.weight", "I8", (1, 1))
    for criterion, missed in (("top-k=4", {"b"}), ("systematic", {"b"}), ("none", set()), ("proxy=2%", set())):
        assert missed_layers(checkpoint(*layers, criterion=criterion), manifest) == missed
    assert missed_layers(checkpoint(*layers, criterion="top-k=4", llmint8=False), manifest) == set()
    assert read_calibration(checkpoint(*layers), None) == Calibration()
    found = read_calibration(checkpoint(*layers, criterion="top-k=4"), manifest)
    assert (found.limits, found.missed) == ({"a": 1.0}, {"b"})
    manifest.modules["a"]["kept_absmax"] = -1
    with pytest.raises(LLMInt8Error, match=r"^x.llmint8_manifest\.json: a: malformed .*; convert the source again$"):
        read_calibration(checkpoint(*layers), manifest)


def test_inputs_that_float16_cannot_hold_are_told() -> None:
    known = Calibration(largest={"a": 65504.0, "b": 65505.0, "c": 7e5, "d": math.inf, "e": 7e5})
    assert known.overflow(["a", "new"]) is None
    said = "b: its input reached 65505 in the calibration; float16 ends at 65504, so expect NaN: load with dtype="
    assert known.overflow(["a", "b"]) == f"{said}'bfloat16'"
    assert str(known.overflow(["b", "e", "c"])).startswith(
        "c: its input reached 700000 in the calibration, and so did those of 2 more; float16 ends at 65504"
    )
    assert str(known.overflow("abcd")).startswith("d: its input reached inf in")
