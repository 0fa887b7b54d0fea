"""The table of tiles: what is chosen, what a machine's own measurements change, and what a broken file does."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmint8.kernels.gpu import tiles, tune
from llmint8.kernels.gpu.tiles import Row, Tile

A, B, C = (Tile(size, 64, 128, 8, 4, 3, False) for size in (16, 32, 64))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache, empty; tables are read anew before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    yield tmp_path / "llmint8" / "tiles.json"
    tiles.forget()


def test_a_table_is_read_as_it_was_written() -> None:
    rows = [Row("sm_90", 4096, 4096, 16, A), Row("any", None, None, None, B._replace(tma=True))]
    assert tiles.read_rows(tiles.write_rows(rows)) == rows
    assert tiles.read_rows(tiles.write_rows(tiles.shipped_rows())) == tiles.shipped_rows()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "any"])
def test_what_ships_has_a_tile_for_every_call(architecture: str) -> None:
    rows = [row for row in tiles.shipped_rows() if row.architecture == architecture]
    for m in (1, 16, 17, 128, 8192, 1 << 20):
        for n in (1, 1024, 4096, 49152):
            assert tiles.closest(rows, m, n, 4096) is not None
    # From 17 rows on Hopper's own instruction is used.
    assert all(row.tile.block_m >= 64 for row in rows if architecture == "sm_90" and (row.m or 17) > 16)
    assert not any(row.tile.tma for row in rows if architecture != "sm_90")


def test_the_closest_row_is_taken() -> None:
    rows = [
        Row("x", None, None, None, A),
        Row("x", 2048, None, None, B),
        Row("x", 2048, None, 64, C),
        Row("x", 999, 77, 32, C),
        Row("x", 999, 77, 512, B),
    ]
    assert tiles.closest(rows, 100, 4096, 64) == A  # wider than every row with an N
    assert tiles.closest(rows, 100, 2048, 64) == B
    assert tiles.closest(rows, 64, 10, 64) == C
    assert tiles.closest(rows, 32, 999, 77) == C  # the layer's own
    assert tiles.closest(rows, 33, 999, 77) == B
    assert tiles.closest(rows, 9999, 999, 77) == B  # beyond the largest that was measured
    assert tiles.closest(rows[3:], 1, 998, 77) is None


def test_no_tile_is_chosen_for_more_rows_than_it_computes() -> None:
    two = A._replace(block_m=2)
    assert tiles.closest([Row("x", 64, 64, 2, two), Row("x", None, None, None, B)], 2, 64, 64) == two
    for row in (Row("x", 64, 64, 2, two), Row("x", 64, 64, None, two), Row("x", None, None, 16, two)):
        for m in (4, 16, 8192):
            assert tiles.closest([row, Row("x", None, None, None, B)], m, 64, 64) == B
            assert tiles.closest([row], m, 64, 64) is None


def test_what_was_measured_on_this_machine_comes_first(cache: Path) -> None:
    before = tiles.choose_tile(CPU, 100, 4096, 4096)
    other = next(tile for tile in (A, B) if tile != before)
    cache.parent.mkdir()
    cache.write_text(tiles.write_rows([Row("any", 4096, 4096, 128, other), Row("sm_90", None, None, None, C)]))
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
        tiles.write_rows([Row("any", None, None, None, A)]).replace("128", "100"),
        tiles.write_rows([Row("any", None, None, None, A)]).replace("128", "1.5"),
        tiles.write_rows([Row("any", None, None, None, A)]).replace("128", "-128"),
        tiles.write_rows([Row("any", None, None, None, A)]).replace("128", "16"),
        tiles.write_rows([Row("any", None, None, None, A)]).replace("false", "0"),
        tiles.write_rows([Row("any", None, None, None, A)]).replace(', "split_k": 1', ""),
        "[" * 100_000,
    ],
    ids=["empty", "object", "number", "short", "no power", "fraction", "negative", "small", "no bool", "old", "deep"],
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


def test_the_shipped_file_is_one_row_a_line() -> None:
    text = Path(tiles.__file__).with_suffix(".json").read_text(encoding="utf-8")
    assert text == tiles.write_rows(tiles.shipped_rows())
    assert len(text.splitlines()) == len(json.loads(text)) + 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_the_tuner_tries_what_a_table_may_hold(capability: tuple[int, int]) -> None:
    for m in tune.CALL_ROWS:
        found = tune.candidates(m, capability)
        assert len(found) == len(set(found)) >= 10
        rows = [Row("x", 64, 64, m, tile) for tile in found]
        assert tiles.read_rows(tiles.write_rows(rows)) == rows
        assert capability >= (9, 0) or not any(tile.tma for tile in found)
        # Tiles of more rows add the outlier columns in another order.
        assert m > 16 or all(tile.block_m in (16, m) for tile in found)
