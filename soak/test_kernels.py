"""Every tile that ships, and layers of every kind, compiled for their GPUs without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmint8.kernels.gpu.tiles import shipped_table

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kernel_resources.py"


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
    # Each with the outliers that are stored and with those that are searched, or with two numbers of them; and all of
    # that again in groups.
    assert len(products) == 4 * len(tiles)
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
        "    k.row_resources('sm_90', kind[2], dtype, 0, kind[1], searched=True)\n"
        "    k.search_resources('sm_90', 'flag_kernel', 17, dtype)\n"
        "    for tile in (MatmulTile(64, 64, 64, 8, 4, 3), MatmulTile(16, 64, 64, 8, 4, 3, False, 4)):\n"
        "        for searched in (False, True):\n"
        "            for group in (None, 64, 256):\n"
        "                k.layer_resources('sm_90', tile, dtype, *kind, searched=searched, group=group)\n"
        "for kind in ((torch.float16, 0, False, 4096), (torch.bfloat16, 512, True, 4080),"
        " (torch.float32, 5, True, 64)):\n"
        "    for group in (None, 64, 256):\n"
        "        k.layer_resources('sm_90', DecodeTile(1, 16, 128, 4), *kind, group=group)\n"
        "print('true')"
    )
    assert run(["-c", code], tmp_path)
