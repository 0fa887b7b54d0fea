"""What `llmint8 scaling` counts and concludes: bits, runs in their file, fronts, curves and choices."""

import json
import math
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llmint8.formats import LLMInt8Error
from llmint8.runtime.scaling.comparing import (
    best_within,
    budgets,
    by_precision,
    choice,
    is_family,
    pareto,
    quality,
    value_words,
    winners,
)
from llmint8.runtime.scaling.layers import Weights
from llmint8.runtime.scaling.runs import Measured, Run, RunFile, encoded
from llmint8.runtime.scaling.schemes import BASE, Layer, Rounding, Scheme, Shapes, combinations


def made_up(bits: int, total: int, perplexity: float, model: str = "m", **scheme: Any) -> Run:
    values: dict[str, Any] = {"data_type": "int", "block": 64} | scheme
    kl = math.log(perplexity)
    measured = Measured(model, model, "text", "text", 48, 24)
    return Run(measured, Scheme(bits, **values), 100, 100 * bits, total, perplexity, kl, kl, kl, 0.5)


def test_combinations_are_all_there_are() -> None:
    found = combinations([3, 4, 16], ["int", "nf4"], [64, None], [0.0], ["nearest"])
    named = {(3, "int"), (4, "int"), (4, "nf4")}
    assert found[0] == BASE
    assert {(one.bits, one.data_type, one.block) for one in found[1:]} == {
        (*pair, block) for pair, block in product(named, (64, None))
    }
    assert len(found) == 7
    assert combinations([4], ["int"], [64], [0.0], ["nearest"]) == [BASE, Scheme(4, "int", 64)]
    assert combinations([3, 3, 16], ["int"], [64, 64], [0.0], ["nearest"]) == [BASE, Scheme(3, "int", 64)]
    for wrong, message in (
        (
            ([3, 16], ["nf4"], [64], [0.0], ["nearest"]),
            "^no combination of these bits and data types: 'nf4'",
        ),
        (([4], ["int", "nf4"], [64, 48], [0.0], ["nearest"]), "^block size 48"),
        (([4], ["int"], [64], [0.0, 1.0], ["nearest"]), r"^proxy share 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            combinations(*wrong)  # type: ignore[arg-type]


def test_gptq_loses_less_of_what_the_layer_says_and_columns_stay() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(256, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(256, 64)
    weights = Weights.__new__(Weights)
    vars(weights).update(_before={"layer": "before"}, _heads=None, _spread={}, _last=None)
    weights.see("before", torch.arange(1, 65)[:, None] * torch.tensor([1.0, -1.0]))
    errors = []
    for rounding in get_args(Rounding):
        found = weights.simulated("layer", Scheme(3, "int", 32, 0.05, rounding), weight, x, x)
        same = (found == weight).all(0).nonzero().flatten().tolist()
        assert same == [61, 62, 63]
        errors.append(float((x @ (found - weight).t()).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_the_front_is_what_brute_force_finds() -> None:
    draw = random.Random(0)
    for _ in range(20):
        runs = [made_up(4, draw.randint(1, 30), 1 + draw.randint(1, 30) / 10) for _ in range(25)]
        pairs = {(run.total_bits, run.perplexity) for run in runs}
        best = {(b, p) for b, p in pairs if not any(c <= b and q <= p and (c, q) != (b, p) for c, q in pairs)}
        front = pareto(runs, "perplexity")
        assert [(run.total_bits, run.perplexity) for run in front] == sorted(best)
        for budget in range(32):
            fitting = [run.perplexity for run in runs if run.total_bits <= budget]
            found = best_within(front, budget)
            assert (None if found is None else found.perplexity) == (min(fitting) if fitting else None)


def test_a_number_that_was_not_finite_is_on_no_front() -> None:
    assert (
        pareto([replace(made_up(3, 10, 2.0), perplexity=None), made_up(4, 20, 3.0)], "perplexity")[0].total_bits == 20
    )


def test_the_lowest_curve_wins_its_part() -> None:
    """Perplexities of 10 / size^0.5 and of 10 (4 / size^3)^0.25 cross at 4; each model is known at three sizes."""
    runs = []
    for number, size in enumerate((1, 10, 256)):
        runs.append(made_up(4, 1000 * size, 10 / size**0.5, model=f"m{number}"))
        runs.append(made_up(8, 1000 * size, 10 * (4 / size**3) ** 0.25, model=f"m{number}"))
        runs.append(made_up(8, 1000 * size, 50.0, model=f"m{number}", data_type="float"))  # a worse way of 8 bits
    won = winners(runs)
    assert won is not None
    assert (won.low, won.high) == (pytest.approx(1000), pytest.approx(256000))
    assert won.shares == {4: pytest.approx(0.25, abs=0.01), 8: pytest.approx(0.75, abs=0.01)}
    assert winners(runs[:3]) is None
    apart = [made_up(bits, bits**5 * size, 2.0, model=f"m{size}") for bits in (3, 8) for size in (1, 2)]
    assert winners(apart) is None  # at no size are both known


def test_a_choice_holds_all_else() -> None:
    runs = [
        made_up(bits, 10 * bits, 2 + worse + (block or 500) / 1000, data_type=data_type, block=block)
        for bits, (data_type, worse), block in product((3, 4), (("int", 1), ("float", 0)), (64, None))
    ]
    runs.append(made_up(4, 40, 1.5, data_type="nf4", block=64))
    types, blocks = choice(runs, "data_type"), choice(runs, "block")
    assert types is not None
    assert blocks is not None
    assert (types.held, types.values) == ("block 64, no proxy, rounding nearest", ["int", "float", "nf4"])
    assert types.table[3] == {"int": pytest.approx(math.log(3.064)), "float": pytest.approx(math.log(2.064))}
    assert types.table[4]["nf4"] == pytest.approx(math.log(1.5))
    assert (blocks.held, blocks.values) == ("float, no proxy, rounding nearest", [64, None])
    assert choice(runs, "proxy") is None


def test_choices_are_compared_at_equal_bits() -> None:
    """On curves of 10 / size^0.5, models that take a tenth more lie a twentieth higher where perplexity is the same."""
    runs = [
        made_up(4, round(larger * 10**power), 10 / 10 ** (power / 2) * 1000, model=f"m{power}", block=block)
        for power in (3, 4, 5)
        for block, larger in ((64, 1), (None, 1.1))
    ]
    found = choice(runs, "block")
    assert found is not None
    assert found.at_equal_bits == {4: {None: pytest.approx(1.1**0.5, rel=1e-3)}}
    assert choice([run for run in runs if run.measured.model == "m3"], "block").at_equal_bits == {}  # type: ignore


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ["m"]},
        {"source_sha256": {}},
        {"tokens": "48"},
        {"bits": 2},
        {"bits": [4]},
        {"data_type": "fp4"},
        {"block": -64},
        {"block": "64"},
        {"proxy": "all"},
        {"rounding": None},
        {"weights": 0},
        {"total_bits": 1.5},
        {"kl_mean": "small"},
        {"perplexity": True},
        {"unknown": 1},
        None,
    ],
    ids=str,
)
def test_a_line_that_is_no_run_is_named(changes: dict[str, Any] | None, tmp_path: Path) -> None:
    whole = json.loads(encoded(made_up(4, 10, 2.0)))
    (tmp_path / "runs.jsonl").write_text(json.dumps(whole) + "\n")
    assert len(RunFile(tmp_path / "runs.jsonl").of(made_up(4, 10, 2.0).measured)) == 1
    (tmp_path / "runs.jsonl").write_text(json.dumps([] if changes is None else whole | changes) + "\n")
    with pytest.raises(LLMInt8Error, match=r"runs.jsonl: line 1 is none of a run"):
        RunFile(tmp_path / "runs.jsonl")


def test_a_scheme_is_one_that_there_is() -> None:
    for block in (32, 4096, None):
        Scheme(3, "int", block, 0.999).check()
    BASE.check()
    for wrong, words in (
        (Scheme(4, "int", 16), "block size 16, expected a power of two from 32 to 4096, or the row"),
        (Scheme(4, "int", 8192), "block size 8192"),
        (Scheme(4, "int", 96), "block size 96"),
        (Scheme(4, "int", 64, 1.0), "proxy share 1.0, expected 0 or more, and less than 1"),
        (Scheme(4, "int", 64, -0.1), "proxy share -0.1"),
        (Scheme(4, "int", 64, rounding="up"), "rounding 'up', expected one of nearest, gptq"),  # type: ignore[arg-type]
        (Scheme(4), "4 bits without a data type"),
        (Scheme(16, block=64), "16 bits without a data type"),
        (Scheme(2, "int"), "2 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong.check()


def test_schemes_are_named_by_all_that_makes_them() -> None:
    labels = {
        BASE: "16-bit",
        Scheme(4, "float", 64): "4-bit float, block 64",
        Scheme(3, "int"): "3-bit int, by row",
        Scheme(3, "int", None, 0.025, "gptq"): "3-bit int, by row, proxy 2.5 %, gptq",
    }
    assert {scheme: scheme.label for scheme in labels} == labels
    words = [
        ("block", None),
        ("block", 64),
        ("proxy", 0.0),
        ("proxy", 0.02),
        ("rounding", "gptq"),
        ("data_type", "nf4"),
    ]
    found = [value_words(key, value) for key, value in words]  # type: ignore[arg-type]
    assert found == ["by row", "block 64", "no proxy", "proxy 2 %", "rounding gptq", "nf4"]


def test_a_model_takes_the_bits_of_its_layers_and_of_all_else() -> None:
    """Two layers of 10 x 100, of which one follows another: a tenth of its columns take 12 bits more."""
    shapes = Shapes([Layer(10, 100, False), Layer(10, 100, True)], 7)
    assert (shapes.weights, shapes.total_bits(BASE)) == (2000, 16 * 2007)
    plain = 4 * 2000 + 16 * 2 * 10 * 2
    assert shapes.weight_bits(Scheme(4, "int", 64)) == plain
    assert shapes.total_bits(Scheme(4, "int", 64)) == plain + 16 * 7
    assert shapes.weight_bits(Scheme(4, "int", 64, 0.1)) == plain + 10 * 10 * 12
    assert shapes.weight_bits(Scheme(4, "quantile", 64)) == plain + 2 * 16 * 16
    run = replace(made_up(4, plain, 2.0), weights=shapes.weights, weight_bits=plain)
    assert run.bits_per_weight == plain / 2000
    assert run.label == "4-bit int, block 64, of m"


def test_a_measure_is_of_the_family_or_of_the_model() -> None:
    one, other = made_up(4, 10, 2.0), made_up(4, 20, 2.0, model="n")
    assert (is_family([one]), is_family([one, other])) == (False, True)
    assert (quality([one, one]), quality([one, other])) == ("kl_mean", "perplexity")


def test_the_best_of_each_model_makes_a_curve_from_the_smallest_on() -> None:
    runs = [
        made_up(bits, size, perplexity, model=model, data_type=data_type)
        for bits, model, data_type, size, perplexity in (
            (8, "large", "int", 90, 1.5),
            (4, "large", "int", 50, 3.0),
            (4, "large", "float", 51, 2.5),
            (4, "small", "int", 20, 4.0),
            (4, "small", "float", 21, 4.5),
        )
    ]
    curves = by_precision([*runs, replace(made_up(3, 10, 2.0), perplexity=None)])
    assert {bits: [run.total_bits for run in curve] for bits, curve in curves.items()} == {4: [20, 51], 8: [90]}


def test_a_choice_is_the_geometric_mean_over_the_models() -> None:
    """All else is what most runs have; of two that as many have, the better."""
    kls = {("a", 64): 0.25, ("b", 64): 1.0, ("a", 128): 0.0, ("b", 128): 1e-3}
    runs = [replace(made_up(4, 10, 2.0, model=model, block=block), kl_mean=kl) for (model, block), kl in kls.items()]
    worse = [replace(run, scheme=replace(run.scheme, data_type="float"), kl_mean=2.0) for run in runs]
    more = [replace(run, scheme=replace(run.scheme, bits=3)) for run in worse]
    unknown = replace(runs[0], scheme=replace(runs[0].scheme, block=256), kl_mean=None)
    alone = replace(runs[0], scheme=replace(runs[0].scheme, bits=5))
    for order in (1, -1):
        found = choice([*worse, *runs, unknown, alone][::order], "block")
        assert found is not None
        assert (found.held, found.values) == ("int, no proxy, rounding nearest", [64, 128])
        # Below 1e-7 it is noise of float32.
        assert found.table == {4: {64: pytest.approx(0.5), 128: pytest.approx((1e-7 * 1e-3) ** 0.5)}}
    assert choice([*runs, *worse, *more], "block").held == "float, no proxy, rounding nearest"  # type: ignore[union-attr]
    assert choice([alone, unknown, replace(runs[0], scheme=BASE)], "block") is None


def test_budgets_are_round_sizes_between_the_smallest_and_the_largest() -> None:
    for low, high, expected in (
        (8_000, 80_000, [1_000, 2_000, 5_000, 10_000]),
        (8_001, 79_999, [2_000, 5_000]),
        (8_000, 80_000_000, [2_000, 20_000, 200_000, 2_000_000]),  # five at most, evenly spread
        (24_000, 36_000, [3_000, 4_000]),
        (8_000, 8_000, [1_000]),
        (8_001, 8_002, []),
    ):
        assert budgets([made_up(4, low, 2.0), made_up(4, high, 1.5)]) == expected, (low, high)


def test_runs_are_kept_in_their_file_by_model_and_scheme(tmp_path: Path) -> None:
    runs = [made_up(4, 30, 2.0), made_up(3, 30, 2.0), made_up(8, 20, 2.0), made_up(4, 30, 2.0, model="n")]
    file = RunFile(tmp_path / "runs.jsonl")
    assert not file.path.exists()
    file.add(runs[:1])
    file.add([replace(runs[1], perplexity=math.inf, kl_p99=math.nan), *runs[2:]])
    assert len(file.path.read_bytes().splitlines()) == 4
    again = RunFile(file.path)
    for known in (file, again):
        assert [run.total_bits for run in known.of(runs[0].measured)] == [20, 30, 30]
        assert [run.scheme.bits for run in known.of(runs[0].measured)] == [8, 3, 4]
        assert known.has(replace(runs[0].measured, model="renamed", text="other"), runs[0].scheme)
        for other in ({"source_sha256": "x"}, {"text_sha256": "x"}, {"tokens": 96}, {"window": 48}):
            assert not known.has(replace(runs[0].measured, **other), runs[0].scheme)  # type: ignore[arg-type]
        assert not known.has(runs[0].measured, replace(runs[0].scheme, block=32))
    assert again.of(runs[3].measured) == [runs[3]]
    assert (again.of(runs[0].measured)[1].perplexity, again.of(runs[0].measured)[1].kl_p99) == (None, None)
