"""Every tile that ships, and layers of every kind, compiled for their GPUs without one.

Another process compiles, because this one interprets Triton.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile, shipped_table
from llmint8.kernels.kbit.gpu.tiles import shipped_table as kbit_table

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kernel_resources.py"

KBIT = SCRIPT.with_name("kbit_resources.py")

BAD = {
    "spills registers": ("sm_90", MatmulTile(128, 256, 128, 8, 4, 3)),
    "no IGMMA": ("sm_90", MatmulTile(64, 64, 128, 8, 2, 3)),
    "more than 166912 bytes of shared memory": ("sm_80", MatmulTile(128, 128, 128, 8, 8, 7)),
}


def run(arguments: list[str], cache: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_ships_compiles_without_a_spill_and_into_int8_instructions(tmp_path: Path) -> None:
    found = run([str(SCRIPT), "--json"], tmp_path)
    assert [item for item in found if item["problems"]] == []
    products = [item for item in found if item["int8_instructions"]]
    tiles = {(entry.architecture, entry.tile) for entry in shipped_table()}
    # Each with the outliers that are stored and with those that are searched, or with two numbers of them and rotated;
    # and all of that again in groups.
    few = sum(isinstance(tile, DecodeTile) for _, tile in tiles)
    assert len(products) == 4 * len(tiles) + 2 * few
    assert {item["kernel"].split()[0] for item in found} == {
        "flag_kernel",
        "int8_decode",
        "int8_matmul",
        "list_kernel",
        "quantize_rows",
    }
    assert {item["architecture"] for item in found} == {"sm_80", "sm_90", "any"}


def test_layers_of_every_kind_compile(tmp_path: Path) -> None:
    """The interpreter does not look at what no call reaches, and the compiler does: a layer without outliers, say."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k, torch\n"
        "from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile\n"
        "for dtype, kind in ((torch.float16, (0, False, 4096)), (torch.float16, (5, False, 255)), (torch.bfloat16,"
        " (1, True, 1)), (torch.float32, (33, True, 4096)), (torch.float32, (0, True, 40000))):\n"
        "    k.row_resources('sm_90', kind[2], dtype, *kind[:2])\n"
        "    k.row_resources('sm_90', kind[2], dtype, *kind[:2], rotation=64)\n"
        "    k.row_resources('sm_90', kind[2], dtype, 0, kind[1], searched=True)\n"
        "    k.search_resources('sm_90', 'flag_kernel', 17, dtype)\n"
        "    for tile in (MatmulTile(64, 64, 64, 8, 4, 3), MatmulTile(16, 64, 64, 8, 4, 3, False, 4)):\n"
        "        for searched in (False, True):\n"
        "            for group in (None, 64, 256):\n"
        "                k.layer_resources('sm_90', tile, dtype, *kind, searched=searched, group=group)\n"
        "for kind in ((torch.float16, 0, False, 4096), (torch.bfloat16, 512, True, 4080),"
        " (torch.float32, 5, True, 64)):\n"
        "    for group in (None, 64, 256):\n"
        "        for rotation in (None, 64):\n"
        "            k.layer_resources('sm_90', DecodeTile(1, 16, 128, 4), *kind, group=group, rotation=rotation)\n"
        "print('true')"
    )
    assert run(["-c", code], tmp_path)


def test_one_of_every_kind_that_ships_compiles_without_a_spill_and_into_int8_instructions(tmp_path: Path) -> None:
    """Every other one with inputs in groups; the test above compiles all of them."""
    kinds: dict[Any, tuple[str, Any]] = {}
    for entry in shipped_table():
        tile = entry.tile
        kind: tuple[Any, ...] = (entry.architecture, entry.kernel)
        if isinstance(tile, MatmulTile):
            kind += (tile.block_m < 64, tile.tma, tile.split_k > 1)
        kinds.setdefault(("any",) if entry.architecture == "any" else kind, (entry.architecture, tile))
    assert Counter(architecture for architecture, _ in kinds.values()) == {"any": 1, "sm_80": 4, "sm_90": 6}
    tiles = list(kinds.values())
    code = (
        f"import dataclasses, json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k\n"
        f"from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile\n"
        f"found = [k.layer_resources(a, t, group=(None, 128)[i % 2]) for i, (a, t) in enumerate({tiles})]\n"
        "found += [k.row_resources('sm_90', 4096, group=g) for g in (None, 128)]\n"
        "found += [k.search_resources('sm_90', 'list_kernel', 1)]\n"
        "print(json.dumps([dataclasses.asdict(item) for item in found]))"
    )
    found = run(["-c", code], tmp_path)
    assert [item for item in found if item["problems"]] == []
    assert all(item["int8_instructions"] for item in found[: len(tiles)])


def test_a_bad_tile_is_found_out(tmp_path: Path) -> None:
    code = (
        f"import json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k\n"
        "from llmint8.kernels.gpu.tiles import MatmulTile\n"
        f"print(json.dumps([k.layer_resources(a, t).problems for a, t in {list(BAD.values())}]))"
    )
    # Before 3.7 Triton spills registers for the second, too.
    for problem, found in zip(BAD, run(["-c", code], tmp_path), strict=True):
        assert problem in found


def test_layers_of_other_kinds_compile(tmp_path: Path) -> None:
    """The interpreter does not look at what no call reaches, and the compiler does: a layer without outliers, say.

    `test_layers_of_every_kind_compile` has more of them.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k, torch\n"
        "from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile\n"
        "k.row_resources('sm_90', 1, torch.bfloat16, 1)\n"
        "for dtype, kind in ((torch.float16, (0, False, 255)), (torch.float32, (33, True, 40000))):\n"
        "    searched = dtype == torch.float32\n"
        "    k.row_resources('sm_90', kind[2], dtype, 0 if searched else kind[0], kind[1], searched=searched)\n"
        "    tile = MatmulTile(16, 64, 64, 8, 4, 3, False, 4) if searched else MatmulTile(64, 64, 64, 8, 4, 3)\n"
        "    k.layer_resources('sm_90', tile, dtype, *kind, searched=searched)\n"
        "k.search_resources('sm_90', 'flag_kernel', 17, torch.float32)\n"
        "for kind in ((torch.float16, 0, False, 4096), (torch.bfloat16, 512, True, 4080),"
        " (torch.float32, 5, True, 64)):\n"
        "    k.layer_resources('sm_90', DecodeTile(1, 16, 128, 4), *kind)\n"
        "print('true')"
    )
    assert run(["-c", code], tmp_path)


def test_every_weight_with_k_a_multiple_of_16_is_read_16_bytes_at_a_time(tmp_path: Path) -> None:
    """4112 is not a multiple of anything larger. Some loads are narrow: scales, row sums, outlier dims."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k\n"
        "from llmint8.kernels.gpu.tiles import DecodeTile, MatmulTile\n"
        "tiles = DecodeTile(1, 16, 512, 4), MatmulTile(16, 64, 256, 8, 4, 5)\n"
        "print(json.dumps([[k.layer_resources('sm_90', t, k=n).narrow_loads for n in (4096, 4112)] for t in tiles]))"
    )
    for whole, odd in run(["-c", code], tmp_path):
        assert odd <= whole + 1


def test_kernels_of_experts_compile_without_a_spill_and_into_int8_instructions(tmp_path: Path) -> None:
    code = (
        f"import dataclasses, json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kernel_resources as k\n"
        "from llmint8.kernels.gpu.tiles import MatmulTile\n"
        "tiles = [MatmulTile(16, 64, 256, 1, 4, 4), MatmulTile(64, 64, 256, 8, 4, 4)]\n"
        "rows, product = 'quantize_expert_rows_kernel', 'int8_experts_kernel'\n"
        "found = [k.expert_resources('sm_90', t, product, group=g) for t in tiles for g in (None, 128)]\n"
        "found += [k.expert_resources('sm_90', tiles[0], rows, group=g, rotation=64) for g in (None, 128)]\n"
        "print(json.dumps([dataclasses.asdict(item) for item in found]))"
    )
    found = run(["-c", code], tmp_path)
    assert len(found) == 6
    assert [item for item in found if item["problems"]] == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "any"])
def test_what_ships_for_k_bits_compiles_without_a_spill(architecture: str, tmp_path: Path) -> None:
    """Every number of bits with every tile; the tensor cores' instructions are among what is looked for."""
    found = run([str(KBIT), "--architectures", architecture, "--json"], tmp_path)
    assert [item for item in found if item["problems"]] == []
    tiles = {
        entry.tile._replace(split_k=min(entry.tile.split_k, 2))
        for entry in kbit_table()
        if entry.architecture == architecture
    }
    assert len(found) >= 6 * len(tiles)
    assert {item["kernel"].split()[0] for item in found} == {"3", "4", "5", "6", "7", "8"}


def test_layers_of_k_bits_of_other_kinds_compile(tmp_path: Path) -> None:
    """Without outliers and bias, of odd sizes: what the interpreter does not look at, the compiler does."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import kbit_resources as k, torch\n"
        "from llmint8.kernels.kbit.gpu.tiles import _choose\n"
        "found = []\n"
        "for a, m, bits, block, dtype, outliers, width, bias in (\n"
        "    ('sm_90', 1, 3, None, torch.float16, 0, 100, False), ('sm_90', 2, 4, 32, torch.bfloat16, 1, 64, True),\n"
        "    ('sm_80', 2, 8, 32, torch.float32, 0, 4095, True), ('sm_80', 16, 5, 32, torch.bfloat16, 0, 255, False),\n"
        "    ('sm_90', 17, 6, 4096, torch.float16, 500, 8191, True),\n"
        "    ('sm_90', 999, 7, 32, torch.bfloat16, 0, 1, True),\n"
        "    ('sm_90', 3, 8, None, torch.float32, 33, 63, False)):\n"
        "    tile = _choose(a, dtype == torch.float32, m, 1000)\n"
        "    found.append(k.kbit_resources(a, tile, bits, block, dtype, outliers, width, bias).spilled_bytes)\n"
        "print(json.dumps(found))"
    )
    assert run(["-c", code], tmp_path) == [0] * 7
