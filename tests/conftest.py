"""Fixtures that more than one test file uses."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Workers of pytest-xdist share the cores: torch's threads would wait for each other at every barrier.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

# Without it cuBLAS refuses to work where memory is poisoned: that is a part of torch's deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton's own functions become interpreted or compiled when it is imported, so this comes before any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; where there is one, `-m gpu` also runs the kernels' tests on it."""
    for item in items:
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: on the GPU, or on the CPU in the interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    request.getfixturevalue("interpreter")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter, as it is needed here."""
    pytest.importorskip("triton")
    import numpy as np
    from triton.runtime import interpreter

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data.astype(np.longdouble)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    # Before 3.9 the interpreter rounds between the product and the sum, which no GPU does.
    interpreter.InterpreterBuilder.create_fma = fma
    _patch_once_a_launch(interpreter)


def _patch_once_a_launch(interpreter: Any) -> None:
    """Spare the interpreter a third of its time: every call of a device function replaces what its launch replaced."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    def patch_lang(function: Any) -> Any:
        modules = (interpreter.tl, interpreter.tl.core)
        key = tuple(id(value) for value in function.__globals__.values() if any(value is module for module in modules))
        if key in done:
            return interpreter._LangPatchScope()
        done.add(key)
        return patch(function)

    def call(self: Any, *arguments: Any, **named: Any) -> None:
        try:
            launch(self, *arguments, **named)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


@pytest.fixture(params=["AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2", "Arm dotprod"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each set of instructions that the compiled layer has, where this processor has it."""
    from llmint8.kernels.cpu import native

    if request.param not in native.kinds():
        pytest.skip(f"no {request.param} here")
    wanted: str = request.param
    return wanted


@pytest.fixture(scope="session")
def assert_right() -> Callable[[Any, Any, Any, torch.Tensor], None]:
    """Compares what a layer returned with exact arithmetic: (x, `Int8Weight`, activation, what was returned)."""
    from llmint8.kernels import reference

    # The step between neighbouring numbers, relative. Triton's interpreter truncates to bfloat16, so a whole one.
    step = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}

    def compare(x: Any, weight: Any, activation: Any, found: torch.Tensor) -> None:
        dims, columns = weight.outlier_dims.long(), weight.outlier_weight.double()
        if weight.threshold is not None:
            dims = reference.dynamic_outlier_dims(x, weight.threshold)
            columns = weight.values[:, dims].double() * weight.absmax.double()[:, None] / 127
        rows = reference.quantize_rows(x, dims, activation, weight.group, weight.rotation)
        groups, absmax = rows.scale.shape[1], weight.absmax.double() / 127
        outliers = x[:, dims].double(), columns.t()
        bias = torch.zeros(len(weight.values)) if weight.bias is None else weight.bias
        expected = outliers[0] @ outliers[1] + bias.double()
        parts = outliers[0].abs() @ outliers[1].abs() + bias.double().abs()
        for group in range(groups):
            part = slice(group * rows.group, (group + 1) * rows.group)
            values, scale = weight.values[:, part].double(), rows.scale[:, group, None].double() * absmax
            product = rows.values[:, part].double() @ values.t()
            zeros = torch.zeros(len(x), 1) if rows.zero_point is None else rows.zero_point[:, group, None]
            shift = zeros.double() * values.sum(1)
            expected += (product - shift) * scale
            parts += (product.abs() + 4 * shift.abs()) * scale
            if groups > 1:  # sums of a few dimensions are rounded on their own, and those of x + 128
                parts += 255 * values.abs().sum(1) * scale
        # Each sum of k + 4 terms, and one for each further group, is wrong by as many roundings at most; tensor cores
        # may cut off where others round.
        room = 2 * (len(dims) + 5 + groups) * 2.0**-24 * parts + step[x.dtype] * expected.abs()
        assert (found.shape, found.dtype) == (expected.shape, x.dtype)
        difference = (found.double() - expected).abs()
        assert bool((difference <= room).all()), difference.max()

    return compare


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN or the largest integer, so that a place nobody wrote to shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """transformers shows a progress bar when the tests save a model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], ModuleType]:
    """Imports a script of `benchmarks/` by its name, with its folder on sys.path, as it is when Python starts it."""

    def script(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
            return importlib.import_module(name)

    return script


def _beside(name: str, folder: str = "tests") -> ModuleType:
    """Import a module of the tests or the soak. They are no packages and their folders are not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def facts() -> Callable[..., dict[str, Any]]:
    """Runs `llmint8 plan` with some arguments and returns what `--json` prints."""

    def run(*arguments: object) -> dict[str, Any]:
        from click.testing import CliRunner

        from llmint8.runtime.commands.main import main

        result = CliRunner().invoke(main, ["plan", *map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return run


@pytest.fixture(scope="session")
def fake_hub() -> ModuleType:
    """The module `fake_hub.py`."""
    return _beside("fake_hub")


@pytest.fixture(scope="session")
def spec_reader() -> ModuleType:
    """The module `spec_reader.py`, which knows spec.md and nothing of ours."""
    return _beside("spec_reader")


@pytest.fixture(scope="session")
def architectures() -> ModuleType:
    """The module `architectures.py`: tiny random models of many kinds."""
    return _beside("architectures")


@pytest.fixture(scope="session")
def conformance() -> ModuleType:
    """The module `soak/conformance.py`, which tries families of models."""
    return _beside("conformance", "soak")


@pytest.fixture(scope="session")
def model_of_words() -> Callable[[Path, int], None]:
    """Writes a tiny random Llama in float16 with a tokenizer of words: (path, intermediate size)."""

    def write(path: Path, intermediate_size: int) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        torch.manual_seed(0)
        words = ["<unk>", "</s>", "The", "capital", "of", "France", "is", "Paris"]
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).half().save_pretrained(path)
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(path)

    return write


@pytest.fixture(scope="session", autouse=True)
def second_reader(spec_reader: ModuleType, assert_right: Callable[..., None]) -> Iterator[None]:
    """Whatever the suite writes is opened, checked and computed by the reader that knows spec.md alone."""
    from llmint8.formats import CheckpointWriter

    commit = CheckpointWriter.commit

    def read_after(self: CheckpointWriter, *arguments: Any, **named: Any) -> Any:
        manifest = commit(self, *arguments, **named)
        _read_by_the_spec(spec_reader, assert_right, self.journal.path.parent)
        return manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "commit", read_after)
        yield


def _read_by_the_spec(spec_reader: Any, assert_right: Callable[..., None], out: Path) -> None:
    """Check a checkpoint and compute the layer with the most outliers, of an input that all quantize alike."""
    from llmint8.formats import open_checkpoint
    from llmint8.kernels.reference import Int8Weight

    theirs, ours = spec_reader.open_checkpoint(out), open_checkpoint(out)
    assert [str(problem) for problem in spec_reader.problems(theirs)] == []
    assert theirs.layers == {
        name: (record.out_features, record.in_features, record.outlier_count) for name, record in ours.records.items()
    }
    layers = {name: of for name, of in theirs.layers.items() if ours.records[name].scheme.lookup != "only"}
    if not layers:
        return
    name, (_, in_features, _) = max(layers.items(), key=lambda item: item[1][2])
    if ours.records[name].scheme.kbit is not None:
        _computed_alike(spec_reader, theirs, ours, name)
        return
    parts = ("weight", ours.layout.absmax, "outlier_dims", "outlier_weight", "bias")
    tensors = [ours.read(f"{name}.{part}") for part in parts if f"{name}.{part}" in ours.tensors]
    scheme = ours.records[name].scheme
    group, rotation = scheme.activation_group, scheme.rotation
    kept = [dim for dim in range(in_features) if dim not in tensors[2].tolist()]
    # From -54 to 200 the zeropoint scale is 1, and no quotient of so small whole numbers is near a tie but not on it.
    x = torch.randint(-54, 201, (3, in_features), generator=torch.Generator().manual_seed(0)).float()
    width, both = group or max(1, in_features), True
    for first in range(0, in_features, width):
        ends = [dim for dim in kept if first <= dim < first + width][:2]
        x[:, ends] = torch.tensor([-54.0, 200.0])[: len(ends)]
        both = both and len(ends) == 2
    if rotation is not None:  # what is then multiplied are no such numbers
        x[:] = 0
        x[:, ::rotation] = torch.tensor([8.0, 64.0, -127.0])[:, None]
    for activation in ("absmax", "zeropoint")[: 1 + both]:
        y = torch.from_numpy(spec_reader.compute(theirs, name, x.numpy(), activation)).float()
        assert_right(x, Int8Weight(*tensors, group=group, rotation=rotation), activation, y)


@pytest.fixture(scope="session")
def kbit_checkpoint() -> Callable[[Path], Path]:
    """Return a function that writes a checkpoint with a table and two layers of k bits, one of an odd width."""

    def write(out: Path) -> Path:
        from llmint8.formats import DTYPE_NAMES, NATIVE, CheckpointWriter, KBit, Quantization, Scheme, TensorSpec
        from llmint8.kernels.kbit.packing import pack
        from llmint8.kernels.kbit.reference import quantize_weight

        schemes = {
            "table": Scheme(lookup="only", kbit=KBit(4, "nf4", 64)),
            "up": Scheme(kbit=KBit(3, "quantile", 32)),
            "down": Scheme(kbit=KBit(6, "float", None)),
        }
        widths, counts = {"table": 64, "up": 64, "down": 70}, {"table": 0, "up": 2, "down": 1}
        draw = torch.Generator().manual_seed(0)
        tensors: dict[str, torch.Tensor] = {"norm.weight": torch.randn(4, generator=draw).half()}
        for name, scheme in schemes.items():
            kbit = scheme.kbit
            assert kbit is not None
            weight = torch.randn(5, widths[name], generator=draw).half()
            codes, absmax, levels = quantize_weight(weight, kbit.bits, kbit.data_type, kbit.block)
            dims = torch.arange(counts[name], dtype=torch.int32) * 3
            tensors |= {f"{name}.weight": pack(codes, kbit.bits), f"{name}.absmax": absmax}
            tensors |= {f"{name}.outlier_dims": dims, f"{name}.outlier_weight": weight[:, dims.long()]}
            tensors |= {f"{name}.codebook": levels.half()} if kbit.has_codebook else {}
        source = {"name": "made up", "repo": None, "commit": None}
        quantization = Quantization(
            ["head"],
            counts,
            criterion="by hand",
            schemes={scheme.name: scheme for scheme in schemes.values()},
            layers={name: scheme.name for name, scheme in schemes.items()},
            in_features={"down": 70},
            layout=NATIVE,
            producer="test 1",
            source=source,
        )
        with CheckpointWriter(out, 1 << 30) as writer:
            specs = {name: TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
            writer.plan([[spec] for spec in specs.values()])
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.commit(
                {"model_type": "made-up"}, quantization, {**source, "config_sha256": "0" * 64, "files": {}}, {}, {}
            )
        return out

    return write


def _computed_alike(spec_reader: Any, theirs: Any, ours: Any, name: str) -> None:
    """Compare what both make of a layer of k bits, which compiled has x and levels in steps of 2^-14 of the largest."""
    from llmint8.kernels.kbit.levels import levels_of
    from llmint8.kernels.kbit.linear import kbit_linear, prepare
    from llmint8.kernels.kbit.reference import KBitWeight

    record, book = ours.records[name], f"{name}.codebook"
    scheme = record.scheme.kbit
    levels = ours.read(book).float() if scheme.has_codebook else levels_of(scheme.data_type, scheme.bits)
    dims, columns = ours.read(f"{name}.outlier_dims"), ours.read(f"{name}.outlier_weight")
    bias = ours.read(f"{name}.bias") if record.has_bias else None
    coded = ours.read(f"{name}.weight"), ours.read(f"{name}.absmax"), levels, record.in_features, scheme.block
    x = torch.randn(3, record.in_features, generator=torch.Generator().manual_seed(0))
    y = kbit_linear(x, prepare(KBitWeight(*coded, dims, columns, bias))).double().numpy()
    exact = spec_reader.compute(theirs, name, x.numpy())
    weight = abs(spec_reader.dequantize_kbit(spec_reader.stored(theirs, name), theirs.kbit(name), record.in_features))
    sizes = abs(x.numpy().astype(float))
    lost = sizes.max() * weight.sum(1) + sizes.sum(1)[:, None] * weight.max() + abs(exact)
    assert (abs(y - exact) <= lost * 2.0**-14 + 1e-6).all()


@pytest.fixture
def hub(fake_hub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local Hub that huggingface_hub talks to in this process, with an empty cache and alice's token that may write.

    huggingface_hub reads its settings when it is imported, so they are replaced where it keeps them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = fake_hub.FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", fake_hub.WRITE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    close_session()
    server.stop()
