"""The compiled layer for Arm processors in an emulator, cross-compiled with clang: its integers are the reference's.

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
from llmint8.kernels.reference import Activation, Group, Int8Weight, groups, quantize_weight, row_sums

pytest.importorskip("ziglang")
unicorn = pytest.importorskip("unicorn")
arm = pytest.importorskip("unicorn.arm64_const")

ROOT = Path(__file__).parent.parent
HEAP, DATA, STACK, END = 0x40000000, 0x60000000, 0x70000000, 0x7F000000
SIZE = 64 << 20
activations = pytest.mark.parametrize("activation", ["absmax", "zeropoint"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The layer as an ELF file for a machine without an operating system; it begins with `llmint8_linear`."""
    folder = tmp_path_factory.mktemp("arm")
    compiler = [sys.executable, "-m", "ziglang", "cc"]
    flags = ["-O3", "-ffp-contract=off", "-fwrapv", "-fno-stack-protector"]
    sources = {ROOT / "kernels/cpu/csrc/layer.c": [], ROOT / "soak/arm/library.c": ["-ffreestanding", "-fno-builtin"]}
    for source, more in sources.items():
        target = ["-target", "aarch64-linux-gnu", "-fno-sanitize=all", *flags, *more]
        subprocess.run([*compiler, *target, "-c", str(source), "-o", str(folder / f"{source.stem}.o")], check=True)
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    link = ["-target", "aarch64-freestanding", "-nostdlib", "-static", "-Wl,--entry=llmint8_linear"]
    subprocess.run([*compiler, *link, *objects, "-o", str(folder / "layer.elf")], check=True)
    return (folder / "layer.elf").read_bytes()


def run(program: bytes, operands: Operands, x: Tensor, zeropoint: bool) -> Tensor:
    """Run the layer on a fresh machine."""
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector registers may be used
    entry, headers = struct.unpack_from("<QQ", program, 24)
    machine.mem_map(0x1000000, 1 << 20)
    for number in range(struct.unpack_from("<H", program, 56)[0]):
        kind, _, offset, address, _, size, _, _ = struct.unpack_from("<IIQQQQQQ", program, headers + 56 * number)
        if kind == 1:
            machine.mem_write(address, program[offset : offset + size])
    for start in (HEAP, DATA):
        machine.mem_map(start, SIZE)
    machine.mem_map(STACK, 1 << 20)
    used = DATA

    def put(data: bytes) -> int:
        nonlocal used
        address, used = used, used + len(data) + 64 & ~63
        machine.mem_write(address, data)
        return address

    values, scale, row_sum, dims, columns, bias, _, group = operands
    parts = [put(raw(part)) for part in (values, scale, row_sum, dims, columns)]
    count, width = groups(values.shape[1], group)
    sizes = (*values.shape, len(dims), columns.shape[1], width, count)
    types = (native.DTYPES[columns.dtype], 0 if bias is None else native.DTYPES[bias.dtype])
    weight = put(struct.pack("<6q6Q2i", *sizes, *parts, 0 if bias is None else put(raw(bias)), *types))
    out = torch.empty(len(x), len(values), dtype=x.dtype)
    found = put(raw(out))
    kind = native.KINDS["Arm dotprod"]
    arguments = (weight, put(raw(x)), found, len(x), native.DTYPES[x.dtype], int(zeropoint), kind, 1)
    for number, value in enumerate(arguments):
        machine.reg_write(arm.UC_ARM64_REG_X0 + number, value)
    machine.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 19))
    machine.reg_write(arm.UC_ARM64_REG_LR, END)
    machine.emu_start(entry, END)
    assert machine.reg_read(arm.UC_ARM64_REG_W0) == 0
    result = bytearray(machine.mem_read(found, out.numel() * out.element_size()))
    return torch.frombuffer(result, dtype=x.dtype).reshape(out.shape)


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
    operands = Operands(values, torch.ones(70), row_sums(values, None), *none, None, None, None)
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
    weight = Int8Weight(*quantize_weight(full), dims, full[:, dims.long()], bias, group=group)
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
