"""The table of tiles: what is chosen, what a machine's own measurements change, and what a broken file does."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmint8.kernels.gpu import tiles, tune
from llmint8.kernels.gpu.tiles import DecodeTile, Entry, Gpu, MatmulTile
from llmint8.runtime.commands import bench

A, B, C = (MatmulTile(size, 64, 128, 8, 4, 3) for size in (16, 32, 64))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache, empty; tables are read anew before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    yield tmp_path / "llmint8" / "tiles.json"
    tiles.forget()


def test_a_table_is_read_as_it_was_written() -> None:
    rows = [Entry("sm_90", 4096, 4096, 16, A), Entry("any", None, None, None, B._replace(tma=True))]
    assert tiles.read_table(tiles.write_table(rows)) == rows
    assert tiles.read_table(tiles.write_table(tiles.shipped_table())) == tiles.shipped_table()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "any"])
def test_what_ships_has_a_tile_for_every_call(architecture: str) -> None:
    rows = [row for row in tiles.shipped_table() if row.architecture == architecture]
    for m in (1, 16, 17, 128, 8192, 1 << 20):
        for n in (1, 1024, 4096, 49152):
            assert tiles.closest(rows, m, n, 4096) is not None
    products = [(row.m, row.tile) for row in rows if isinstance(row.tile, MatmulTile)]
    # From 17 rows on Hopper's own instruction is used.
    assert all(tile.block_m >= 64 for m, tile in products if architecture == "sm_90" and (m or 17) > 16)
    assert not any(tile.tma for _, tile in products if architecture != "sm_90")


def test_the_closest_row_is_taken() -> None:
    rows = [
        Entry("x", None, None, None, A),
        Entry("x", 2048, None, None, B),
        Entry("x", 2048, None, 64, C),
        Entry("x", 999, 77, 32, C),
        Entry("x", 999, 77, 512, B),
    ]
    assert tiles.closest(rows, 100, 4096, 64) == A  # wider than every row with an N
    assert tiles.closest(rows, 100, 2048, 64) == B
    assert tiles.closest(rows, 64, 10, 64) == C
    assert tiles.closest(rows, 32, 999, 77) == C  # the layer's own
    assert tiles.closest(rows, 33, 999, 77) == B
    assert tiles.closest(rows, 9999, 999, 77) == B  # beyond the largest that was measured
    assert tiles.closest(rows[3:], 1, 998, 77) is None


def test_no_tile_is_chosen_for_more_rows_than_it_computes() -> None:
    two = DecodeTile(2, 64, 128, 4)
    assert tiles.closest([Entry("x", 64, 64, 2, two), Entry("x", None, None, None, B)], 2, 64, 64) == two
    for row in (Entry("x", 64, 64, 2, two), Entry("x", 64, 64, None, two), Entry("x", None, None, 16, two)):
        for m in (4, 16, 8192):
            assert tiles.closest([row, Entry("x", None, None, None, B)], m, 64, 64) == B
            assert tiles.closest([row], m, 64, 64) is None


def test_what_was_measured_on_this_machine_comes_first(cache: Path) -> None:
    before = tiles.choose_tile(CPU, 100, 4096, 4096)
    other = next(tile for tile in (A, B) if tile != before)
    cache.parent.mkdir()
    cache.write_text(tiles.write_table([Entry("any", 4096, 4096, 128, other), Entry("sm_90", None, None, None, C)]))
    tiles.forget()
    assert tiles.choose_tile(CPU, 100, 4096, 4096) == other
    assert tiles.choose_tile(CPU, 100, 4096, 4095) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"architecture": "any"}]',
        tiles.write_table([Entry("any", None, None, None, A)]).replace("128", "100"),
        tiles.write_table([Entry("any", None, None, None, A)]).replace("128", "1.5"),
        tiles.write_table([Entry("any", None, None, None, A)]).replace("128", "-128"),
        tiles.write_table([Entry("any", None, None, None, A)]).replace("128", "16"),
        tiles.write_table([Entry("any", None, None, None, A)]).replace("false", "0"),
        tiles.write_table([Entry("any", None, None, None, A)]).replace(', "split_k": 1', ""),
        tiles.write_table([Entry("any", None, None, None, A)]).replace('"kernel": "matmul", ', ""),
        tiles.write_table([Entry("any", None, None, None, A)]).replace('"matmul"', '"decode"'),
        tiles.write_table([Entry("any", None, None, None, A)]).replace('"split_k": 1', '"split_k": 1000000'),
        "[" * 100_000,
    ],
    ids=[
        "empty",
        "object",
        "number",
        "short",
        "no power",
        "fraction",
        "negative",
        "small",
        "no bool",
        "old",
        "no kernel",
        "another kernel",
        "absurd",
        "deep",
    ],
)
def test_a_broken_file_is_not_used_and_a_warning_names_it(
    text: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tiles.choose_tile(CPU, 100, 4096, 4096)
    cache.parent.mkdir()
    cache.write_text(text)
    tiles.forget()
    with caplog.at_level(logging.WARNING):
        assert tiles.choose_tile(CPU, 100, 4096, 4096) == before
        tiles.choose_tile(CPU, 1, 4096, 4096)
    assert [str(cache) in record.getMessage() for record in caplog.records] == [True]


_ONE, _FEW = DecodeTile(1, 8, 32, 1), MatmulTile(16, 16, 32, 1, 1, 1)
_WIDE = MatmulTile(16, 16, 512, 1, 1, 1)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (Entry("x", None, None, 1024, _FEW._replace(split_k=64)), {"m": 1025}),  # sums are kept for every row
        (Entry("x", None, None, 1024, _FEW._replace(split_k=64)), {"tile": _FEW._replace(split_k=65)}),
        (Entry("x", None, None, 2, _FEW._replace(split_k=2)), {"m": None}),
        (Entry("x", None, None, None, _FEW._replace(block_k=256, tma=True)), {"tile": _WIDE._replace(tma=True)}),
        (Entry("x", None, None, None, _WIDE), {"tile": _WIDE._replace(num_stages=0)}),
        (Entry("x", None, None, None, _FEW._replace(num_stages=226)), {"tile": _FEW._replace(num_stages=227)}),  # 227 K
        (Entry("x", None, None, None, _FEW._replace(block_n=256)), {"tile": _FEW._replace(block_n=512)}),
        (Entry("x", None, None, None, _FEW), {"tile": _FEW._replace(block_n=8)}),
        (Entry("x", None, None, None, _FEW), {"tile": _FEW._replace(block_m=8)}),
        (Entry("x", None, None, None, _FEW), {"tile": _FEW._replace(block_k=16)}),
        (Entry("x", None, None, None, _FEW._replace(num_warps=32)), {"tile": _FEW._replace(num_warps=64)}),
        (Entry("x", None, None, None, _ONE), {"tile": _ONE._replace(block_n=4)}),
        (Entry("x", None, None, None, _ONE._replace(block_m=4)), {"tile": _ONE._replace(block_m=8)}),
        (Entry("x", 1, 1, 1, _ONE), {"n": 0}),
        (Entry("x", 1, 1, 1, _ONE), {"k": -1}),
        (Entry("x", 1, 1, 1, _ONE), {"architecture": 90}),
    ],
)
def test_what_is_just_a_tile_and_what_is_just_none(right: Entry, wrong: dict[str, Any]) -> None:
    assert tiles.read_table(tiles.write_table([right])) == [right]
    with pytest.raises(ValueError, match="not a tile"):
        tiles.read_table(tiles.write_table([right._replace(**wrong)]))


def test_the_shipped_file_is_one_row_a_line() -> None:
    text = Path(tiles.__file__).with_suffix(".json").read_text(encoding="utf-8")
    assert text == tiles.write_table(tiles.shipped_table())
    assert len(text.splitlines()) == len(json.loads(text)) + 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_the_tuner_tries_what_a_table_may_hold(capability: tuple[int, int]) -> None:
    for m in tune.TUNED_M:
        found = tune.candidates(m, capability)
        assert len(found) == len(set(found)) >= 10
        rows = [Entry("x", 64, 64, m, tile) for tile in found]
        assert tiles.read_table(tiles.write_table(rows)) == rows
        products = [tile for tile in found if isinstance(tile, MatmulTile)]
        assert capability >= (9, 0) or not any(tile.tma for tile in products)
        # Tiles of more rows add the outlier columns in another order.
        assert m > 16 or all(tile.block_m in (16, m) for tile in found)


def test_a_gpu_without_tiles_takes_those_of_the_nearest_lower_one_that_fit_it() -> None:
    for name, shared, expected in [
        ("sm_90", 227, "sm_90"),
        ("sm_80", 163, "sm_80"),
        ("sm_86", 99, "sm_80"),
        ("sm_89", 99, "sm_80"),
        ("sm_100", 227, "sm_90"),
        ("sm_120", 99, "sm_80"),
        ("sm_75", 64, "any"),
        ("gfx942", 64, "any"),
        ("any", 227, "any"),
    ]:
        found, entries = tiles.table_for(Gpu(name, shared * 1024))
        assert found == expected, name
        products = [entry.tile for entry in entries if isinstance(entry.tile, MatmulTile)]
        assert products
        assert all(tile.shared_bytes <= shared * 1024 for tile in products), name
        for m in (1, 3, 16, 17, 4096, 1 << 20):
            for decode in (True, False):
                tile = tiles._choose(Gpu(name, shared * 1024), min(m, 8192), 4096, 4096, decode)
                assert decode or isinstance(tile, MatmulTile)
                assert isinstance(tile, MatmulTile) or m <= tile.block_m
                # Larger tiles add the outlier columns in another order.
                assert m > 16 or isinstance(tile, tiles.DecodeTile) or tile.block_m == 16


def test_what_was_measured_on_such_a_gpu_comes_first(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(tiles.write_table([Entry("sm_89", 4096, 4096, 128, A)]))
    tiles.forget()
    gpu = Gpu("sm_89", 99 * 1024)
    assert tiles._choose(gpu, 128, 4096, 4096, True) == A
    before = tiles._choose(gpu, 128, 4096, 4095, True)
    assert before in [entry.tile for entry in tiles.shipped_table() if entry.architecture == "sm_80"]


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    tiles.forget()
    assert tiles.cache_path() is None
    assert tiles.choose_tile(CPU, 100, 4096, 4096)
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        bench._tune([], CPU, True)
