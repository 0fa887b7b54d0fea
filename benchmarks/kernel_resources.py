"""Compile the Triton kernels for GPUs that are not there, and show what ptxas made of them.

Every tile that `kernels/gpu/tiles.json` ships is compiled for its architecture as the launcher would launch it, in the
heaviest form: float16, zero point, bias, 64 outlier columns; and once more for outliers that are searched, or where a
layer is one launch for 16, rotated and not; and all again with inputs in groups of 128. Printed for each: registers,
bytes spilled, shared memory, instructions that multiply int8 (tensor cores or dp4a), and what is wrong with it, if
anything. Needs Triton and its interpreter off, and no GPU.

    python benchmarks/kernel_resources.py [--json]
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from llmint8.kernels.gpu import decode, experts, linear, matmul, outlier_search, quantize_rows
from llmint8.kernels.gpu.tiles import TENSOR_CORE_ROWS, DecodeTile, Gpu, MatmulTile, Tile, shipped_table
from llmint8.kernels.operands import Operands
from llmint8.kernels.reference import Group, Int8Weight, Rotation

# Bytes of shared memory that one program may have. The tiles of `any` are compiled for sm_80, and have to do with the
# shared memory of the smallest GPUs.
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "any": 64 * 1024}
TARGETS = {"sm_80": 80, "sm_90": 90, "any": 80}
WIDTHS = (64, 4096, 8192, 16384, 65536)  # K of the row quantization: each number of warps, and the loop
GROUP: Group = 128
ROTATION: Rotation = 64
SETTINGS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
POINTERS |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}


@dataclass
class Resources:
    """What one compiled kernel takes of the GPU."""

    architecture: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    int8_instructions: int
    narrow_loads: int  # from global memory, of less than 8 bytes
    problems: list[str]


class Recorder:
    """Stands where a kernel stands, and compiles for `architecture` what would be launched."""

    def __init__(self, kernel: Any, architecture: str) -> None:
        """Keep the kernel; `compiled` is the last one, `options` are its arguments by name."""
        self.kernel, self.architecture, self.compiled = kernel, architecture, None
        self.options: dict[str, Any] = {}
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        """Take the place of a launch."""
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile for these arguments, specialized as Triton's launcher specializes."""
        names = [parameter.name for parameter in self.kernel.params]
        self.options = dict(options)
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        values = dict(zip(names, args, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value, specialize = values[parameter.name], not parameter.do_not_specialize
            aligned = True
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{POINTERS[value.dtype]}"
            elif isinstance(value, TensorDescriptor):
                block = ", ".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype]}[{block}]>"
                aligned = False
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
                aligned = False
            elif parameter.is_constexpr or value is None or (value == 1 and specialize):
                signature[parameter.name], constants[(position,)] = "constexpr", value
                aligned = False
            else:
                signature[parameter.name] = "i32"
                aligned = value % 16 == 0 and specialize
            if aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", TARGETS[self.architecture], 32)
        self.compiled = triton.compile(source, target=target, options=settings)


class Nothing:
    """Stands where a kernel stands that is not to be compiled."""

    arg_names: tuple[str, ...] = ()

    def __getitem__(self, grid: Any) -> Any:
        """Take the place of a launch."""
        return lambda *args, **options: None


def resources(compiled: Any, architecture: str, name: str, instruction: str | None = None) -> Resources:
    """Read what was compiled with the `cuobjdump` that Triton brings; `instruction` is the one it has to have."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = Resources(
        architecture,
        name,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        compiled.metadata.shared,
        len(re.findall(rf"\b{instruction}\b", sass)) if instruction else 0,
        len(re.findall(r"\bLDG(?:STS)?\.E(?!\S*\.(?:64|128)\b)", sass)),
        [],
    )
    if found.spilled_bytes or re.search(r"\b(STL|LDL)\b", sass):
        found.problems.append("spills registers")
    if found.shared_bytes > LIMITS[architecture]:
        found.problems.append(f"more than {LIMITS[architecture]} bytes of shared memory")
    if instruction and not found.int8_instructions:
        found.problems.append(f"no {instruction}")
    return found


def layer_resources(
    architecture: str,
    tile: Tile,
    dtype: torch.dtype = torch.float16,
    outliers: int = 64,
    zeropoint: bool = True,
    k: int = 4096,
    searched: bool = False,
    group: Group | None = None,
    rotation: Rotation | None = None,
) -> Resources:
    """Compile the product, or the whole, of a layer with K inputs; one without a zero point has no bias either.

    `searched`: with outliers that `outlier_search` found, in place of stored ones. `group`: of the inputs. `rotation`:
    as in `Int8Weight`.
    """

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    few = isinstance(tile, DecodeTile)
    # With groups, a call of so many rows is a kernel of its own.
    m, n = tile.block_m if few or tile.block_m == TENSOR_CORE_ROWS else 512, 4096
    weight = Int8Weight(
        empty(n, k, kind=torch.int8),
        empty(n, kind=torch.float32),
        empty(outliers, kind=torch.int32),
        empty(n, outliers),
        empty(n) if zeropoint else None,
        6.0 if searched else None,
        group,
        rotation,
    )
    layer = linear.GpuLinear(Operands.prepare(weight), tile)
    module, kernel = (decode, "int8_decode_kernel") if few else (matmul, "int8_matmul_kernel")
    recorder = Recorder(getattr(module, kernel), architecture)
    others = {"flag_kernel": Nothing(), "list_kernel": Nothing()}
    with (
        patch.object(matmul, "gpu_of", lambda device: Gpu(architecture)),
        patch.object(module, kernel, recorder),
        patch.object(quantize_rows, "quantize_rows_kernel", Nothing()),
        patch.multiple(outlier_search, **others),
    ):
        layer(empty(m, k), zeropoint)
    grouped = (f", groups of {group}" if group else "") + (", rotated" if rotation else "")
    name = f"{kernel.removesuffix('_kernel')} {tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps"
    if few:
        found = resources(recorder.compiled, architecture, f"{name}, {outliers} outliers{grouped}", "IDP")
        # Triton chooses which of two operands it moves between threads; the rows of x take a fraction of the time.
        block_k = recorder.options["BLOCK_K"]
        block = f"x{tile.block_n}x{block_k // 16}x4xi32"
        if re.search(f"convert_layout .*{block}", recorder.compiled.asm["ttgir"]):
            found.problems.append("moves the weight through shared memory")
        return found
    name += f", {tile.num_stages} stages" + (", TMA" if tile.tma else "") + (", K divided" if tile.split_k > 1 else "")
    name += (", searched" if searched else "") + grouped
    # Hopper's own instruction needs 64 rows; below, its tensor cores take Ampere's.
    instruction = "IGMMA" if architecture == "sm_90" and tile.block_m >= 64 else "IMMA"
    return resources(recorder.compiled, architecture, name, instruction)


def outliers_of(x: torch.Tensor) -> outlier_search.Found:
    """Return what a search of x finds, without looking."""
    k = x.shape[1]
    lists = ((k, torch.int8), (k, torch.int32), (1, torch.int32))
    return outlier_search.Found(x, (k, 1), *(torch.empty(size, dtype=kind, device="meta") for size, kind in lists))


def row_resources(
    architecture: str,
    k: int,
    dtype: torch.dtype = torch.float16,
    outliers: int = 64,
    zeropoint: bool = True,
    searched: bool = False,
    group: Group | None = None,
    rotation: Rotation | None = None,
) -> Resources:
    """Compile the row quantization for K dimensions."""
    x = torch.empty(512, k, dtype=dtype, device="meta")
    dims = torch.empty(0 if searched else outliers, dtype=torch.int32, device="meta")
    recorder = Recorder(quantize_rows.quantize_rows_kernel, architecture)
    with patch.object(quantize_rows, "quantize_rows_kernel", recorder):
        launch = quantize_rows.QuantizeRows(k, dims, zeropoint, group, rotation)
        launch(x, (k, 1), outliers_of(x) if searched else None)
    name = f"quantize_rows K={k}" + (", searched" if searched else "") + (f", groups of {group}" if group else "")
    name += ", rotated" if rotation else ""
    return resources(recorder.compiled, architecture, name)


def expert_resources(
    architecture: str,
    tile: MatmulTile,
    kernel: str,
    dtype: torch.dtype = torch.float16,
    outliers: int = 16,
    zeropoint: bool = True,
    k: int = 4096,
    group: Group | None = None,
    rotation: Rotation | None = None,
) -> Resources:
    """Compile a kernel of the experts of a mixture, by its name, eight of them; without a zero point, without bias."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    n = 4096
    how = empty(n) if zeropoint else None, None, group, rotation
    stored = empty(n, k, kind=torch.int8), empty(n, kind=torch.float32), empty(outliers, kind=torch.int32)
    names = "quantize_expert_rows_kernel", "int8_experts_kernel"
    recorders: dict[str, Any] = dict.fromkeys(names, Nothing())
    recorders[kernel] = Recorder(getattr(experts, kernel), architecture)
    with patch.object(experts, "gpu_of", lambda device: Gpu(architecture)), patch.multiple(experts, **recorders):
        run = experts.GpuExperts([Int8Weight(*stored, empty(n, outliers), *how)] * 8, tile)
        rows = 8 * tile.block_m
        run(empty(rows, k), empty(rows, kind=torch.int64), zeropoint)
    name = f"{kernel.removesuffix('_kernel')} {tile.block_m}x{tile.block_n}x{tile.block_k}, {outliers} outliers"
    name += (f", groups of {group}" if group else "") + (", rotated" if rotation else "")
    multiplies = kernel == "int8_experts_kernel"
    instruction = "IGMMA" if architecture == "sm_90" and tile.block_m >= 64 else "IMMA"
    return resources(recorders[kernel].compiled, architecture, name, instruction if multiplies else None)


def search_resources(architecture: str, kernel: str, m: int, dtype: torch.dtype = torch.float16) -> Resources:
    """Compile a kernel of the outlier search, by its name, for M rows."""
    recorders = {name: Recorder(getattr(outlier_search, name), architecture) for name in ("flag_kernel", "list_kernel")}
    with patch.multiple(outlier_search, **recorders):
        outlier_search.OutlierSearch(6.0, dtype, m)(torch.empty(m, 4096, dtype=dtype, device="meta"), (4096, 1))
    return resources(recorders[kernel].compiled, architecture, f"{kernel} M={m}")


def compile_one(job: Callable[[], Resources]) -> Resources:
    """Run a job in a process of its own."""
    return job()


def main() -> None:
    """Compile everything that ships, on every core."""
    tiles = dict.fromkeys((row.architecture, row.tile) for row in shipped_table())
    jobs = [partial(layer_resources, *tile) for tile in tiles]
    for tile in tiles:
        decode = isinstance(tile[1], DecodeTile)
        # What takes the most registers of a whole layer is not the number of its outliers.
        jobs.append(partial(layer_resources, *tile, **({"outliers": 16} if decode else {"searched": True})))
    # Of the kernels that multiply, only those that quantize too have anything to do with a rotation.
    few = [tile for tile in tiles if isinstance(tile[1], DecodeTile)]
    jobs += [partial(layer_resources, *tile, outliers=16, rotation=ROTATION) for tile in few]
    jobs += [partial(job, group=GROUP) for job in jobs]
    for architecture in ("sm_80", "sm_90"):
        for how in ({}, {"searched": True}, {"rotation": ROTATION}):
            jobs += [
                partial(row_resources, architecture, width, group=group, **how)
                for width in WIDTHS
                for group in ((None, GROUP) if width > GROUP else (None,))
            ]
        jobs += [partial(search_resources, architecture, "flag_kernel", m) for m in (1, 16, 512)]
        jobs += [partial(search_resources, architecture, "list_kernel", 1)]
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(compile_one, jobs))
    if "--json" in sys.argv:
        print(json.dumps([asdict(item) for item in found]))
        return
    print(
        f"Triton {triton.__version__}\n\n| for | kernel | registers | spilled | shared memory | int8 instructions | |"
    )
    print("|---|---|---|---|---|---|---|")
    for item in found:
        print(
            f"| {item.architecture} | {item.kernel} | {item.registers} | {item.spilled_bytes} | {item.shared_bytes:,} "
            f"| {item.int8_instructions} | {', '.join(item.problems)} |"
        )


if __name__ == "__main__":
    main()
