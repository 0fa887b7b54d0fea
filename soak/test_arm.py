"""The compiled functions for Arm processors in an emulator, cross-compiled with clang: the integers of the reference.

Needs the packages ziglang, which is a clang for every target, and unicorn, which is QEMU's emulator as a library.
"""

import ctypes
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmint8.kernels import reference
from llmint8.kernels.cpu import native
from llmint8.kernels.operands import Operands
from llmint8.kernels.reference import Activation, Group, Int8Weight, Rotation, groups, quantize_weight, row_sums

pytest.importorskip("ziglang")
unicorn = pytest.importorskip("unicorn")
arm = pytest.importorskip("unicorn.arm64_const")

ROOT = Path(__file__).parent.parent
HEAP, DATA, STACK, END = 0x40000000, 0x60000000, 0x70000000, 0x7F000000
SIZE = 64 << 20
activations = pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def build(folder: Path, source: str, entry: str) -> bytes:
    """Compile a part of the library to an ELF file for a machine without an operating system, with `entry` first."""
    compiler = [sys.executable, "-m", "ziglang", "cc"]
    flags = ["-O3", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fno-stack-protector"]
    sources = {
        ROOT / "kernels/cpu/csrc" / source: [],
        ROOT / "soak/arm/library.c": ["-ffreestanding", "-fno-builtin"],
    }
    for path, more in sources.items():
        target = ["-target", "aarch64-linux-gnu", "-fno-sanitize=all", *flags, *more]
        subprocess.run([*compiler, *target, "-c", str(path), "-o", str(folder / f"{path.stem}.o")], check=True)
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    link = ["-target", "aarch64-freestanding", "-nostdlib", "-static", f"-Wl,--entry={entry}"]
    subprocess.run([*compiler, *link, *objects, "-o", str(folder / "program.elf")], check=True)
    return (folder / "program.elf").read_bytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The layer."""
    return build(tmp_path_factory.mktemp("layer"), "layer.c", "llmint8_linear")


class Machine:
    """A fresh one, with a program and what its entry is called with."""

    def __init__(self, program: bytes) -> None:
        self._machine = machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector registers may be used
        self._entry, headers = struct.unpack_from("<QQ", program, 24)
        machine.mem_map(0x1000000, 1 << 20)
        for number in range(struct.unpack_from("<H", program, 56)[0]):
            kind, _, offset, address, _, size, _, _ = struct.unpack_from("<IIQQQQQQ", program, headers + 56 * number)
            if kind == 1:
                machine.mem_write(address, program[offset : offset + size])
        for start in (HEAP, DATA):
            machine.mem_map(start, SIZE)
        machine.mem_map(STACK, 1 << 20)
        self._used = DATA

    def put(self, data: bytes) -> int:
        address, self._used = self._used, self._used + len(data) + 64 & ~63
        self._machine.mem_write(address, data)
        return address

    def call(self, *arguments: int) -> int:
        """Run the program with up to eight arguments, and return what it does."""
        for number, value in enumerate(arguments):
            self._machine.reg_write(arm.UC_ARM64_REG_X0 + number, value)
        self._machine.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 19))
        self._machine.reg_write(arm.UC_ARM64_REG_LR, END)
        self._machine.emu_start(self._entry, END)
        return int(self._machine.reg_read(arm.UC_ARM64_REG_W0))

    def get(self, address: int, like: Tensor) -> Tensor:
        """Return what a tensor of this shape and dtype holds there."""
        result = bytearray(self._machine.mem_read(address, like.numel() * like.element_size()))
        return torch.frombuffer(result, dtype=like.dtype).reshape(like.shape)


def run(program: bytes, operands: Operands, x: Tensor, zeropoint: bool) -> Tensor:
    """Run the layer on a fresh machine."""
    machine = Machine(program)
    values, scale, row_sum, dims, columns, bias, _, group, rotation = operands
    parts = [machine.put(raw(part)) for part in (values, scale, row_sum, dims, columns)]
    count, width = groups(values.shape[1], group)
    sizes = (*values.shape, len(dims), columns.shape[1], width, count, rotation or 0)
    types = (native.DTYPES[columns.dtype], 0 if bias is None else native.DTYPES[bias.dtype])
    weight = machine.put(struct.pack("<7q6Q2i", *sizes, *parts, 0 if bias is None else machine.put(raw(bias)), *types))
    out = torch.empty(len(x), len(values), dtype=x.dtype)
    found = machine.put(raw(out))
    kind = native.KINDS["Arm dotprod"]
    arguments = (weight, machine.put(raw(x)), found, len(x), native.DTYPES[x.dtype], int(zeropoint), kind, 1)
    assert machine.call(*arguments) == 0
    return machine.get(found, out)


def raw(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@pytest.fixture(scope="module")
def rows() -> Any:
    """The module of the tests on this machine's own processor, for the rows it tries."""
    spec = importlib.util.spec_from_file_location("test_native", ROOT / "tests" / "test_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@activations
@dtypes
def test_the_integers_are_those_of_the_reference(
    dtype: torch.dtype, activation: Activation, program: bytes, rows: Any
) -> None:
    k = 200
    dims, columns = torch.tensor([5, 77], dtype=torch.int32), torch.zeros(k, 2)
    weight = Int8Weight(127 * torch.eye(k, dtype=torch.int8), torch.full((k,), 127.0), dims, columns)
    x = rows.hard_rows(k, dtype)
    expected = reference.quantize_rows(x, dims, activation)
    found = run(program, Operands.prepare(weight), x.float(), activation == "zeropoint")
    shift = 0 if expected.zero_point is None else expected.zero_point
    assert torch.equal(found, 127 * (expected.values.float() - shift) * expected.scale)


def test_the_largest_sums_are_exact(program: bytes) -> None:
    values = torch.full((70, 520), 127, dtype=torch.int8)
    values[::2] = -127
    none = torch.empty(0, dtype=torch.int32), torch.empty(70, 0)
    operands = Operands(values, torch.ones(70), row_sums(values, None), *none, None, None, None, None)
    x = torch.full((5, 520), 127.0)
    x[:, -8:] *= -1
    assert torch.equal(run(program, operands, x, False).double(), x.double() @ values.double().t())


@activations
@dtypes
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(
    "layer", [(1, 1, 1, 1), (2, 40, 108, 10), (2, 1, 33, 33), (7, 70, 100, 17), (17, 20, 95, 16), (38, 20, 200, 5)]
)
def test_layers(
    layer: tuple[int, int, int, int],
    group: Group | None,
    dtype: torch.dtype,
    activation: Activation,
    program: bytes,
) -> None:
    m, n, k, outliers = layer
    random = torch.Generator().manual_seed(n + k)
    full = torch.randn(n, k, generator=random).to(dtype)
    dims = torch.randperm(k, generator=random)[:outliers].sort().values.int()
    bias = torch.randn(n, generator=random).to(dtype)
    rotation: Rotation | None = 64 if m % 2 else None
    stored = dims, full[:, dims.long()], bias
    weight = Int8Weight(*quantize_weight(full, rotation), *stored, group=group, rotation=rotation)
    x = (3 * torch.randn(m, k, generator=random) + 0.5).to(dtype)
    expected = reference.int8_linear(x.float(), weight, activation)
    found = run(program, Operands.prepare(weight), x, activation == "zeropoint").float()
    # The sums in float32 add up in another order, and one rounding to the dtype comes after them. Of several groups,
    # sums of a few dimensions are rounded; their terms are at most 254 steps of the row's scale.
    bound = expected.abs().max() * 4 * torch.finfo(torch.float32).eps * (outliers + 4)
    if group is not None and k > group:
        terms = 2 * x.float().abs().amax(1, keepdim=True) * full.float().abs().sum(1)
        bound = bound + terms * torch.finfo(torch.float32).eps * (4 + k / group)
    assert ((found - expected).abs() <= bound + torch.finfo(dtype).eps * expected.abs()).all()


@dtypes
def test_weights_are_those_of_the_reference(dtype: torch.dtype, tmp_path: Path, rows: Any) -> None:
    machine = Machine(build(tmp_path, "weight.c", "llmint8_quantize_weight"))
    weight = rows.hard_rows(200, dtype)
    # The threads, of which there is one here, are not passed.
    how = *weight.shape, native.DTYPES[dtype], native.KINDS["Arm dotprod"]
    rotations: tuple[Rotation | None, ...] = (None, 64)
    for rotation in rotations:
        values, absmax = quantize_weight(weight, rotation)
        found = machine.put(raw(values * 0)), machine.put(raw(absmax * 0))
        wide = 0 if rotation is None else machine.put(bytes(4 * weight.shape[1]))
        machine.call(machine.put(raw(weight)), *found, wide, *how)
        assert torch.equal(machine.get(found[0], values), values)
        assert torch.equal(machine.get(found[1], absmax), absmax)


@pytest.mark.parametrize("group", [0, 64, 256])
def test_sums_of_rows_are_exact(group: int, tmp_path: Path) -> None:
    machine = Machine(build(tmp_path, "weight.c", "llmint8_row_sums"))
    values = torch.randint(-127, 128, (5, 600), dtype=torch.int8, generator=torch.Generator().manual_seed(group))
    expected = torch.stack([part.sum(1) for part in values.split(group or 600, 1)], 1)
    expected = expected.to(torch.int16 if group else torch.int32)
    found = machine.put(raw(expected * 0))
    machine.call(machine.put(raw(values)), found, *values.shape, group, native.KINDS["Arm dotprod"], 1)
    assert torch.equal(machine.get(found, expected), expected)
