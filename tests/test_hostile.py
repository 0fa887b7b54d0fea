"""Attacks on the converter and on the readers of int8 checkpoints, each through the command a user would run.

Every one is refused with one line and exit code 1; nothing is executed, nothing left behind or written elsewhere.
`docs/reliability.md` has the table. What needs a limit on memory runs in one process of its own.
"""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from llmint8 import converter, formats, runtime
from llmint8.converter.commands.convert import convert_command
from llmint8.runtime.commands.main import main

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.skipif(sys.platform == "win32", reason="uses links and FIFOs"),
]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = "x.safetensors"
TORCH, MANIFEST = "pytorch_model.bin", "llmint8_manifest.json"
ESCAPE = "\x1b]0;owned\x07\u202e\u200b"
Attack = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def int8(source: Path) -> Path:
    path = source.parent / "int8"
    converter.convert(source, path, outliers="top-k=2", max_shard_size="20KB")
    return path


# What attacks are made of.


def edit_json(name: str, **changes: Any) -> Attack:
    def attack(path: Path) -> None:
        value = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(value | changes))

    return attack


def write(name: str, content: bytes | str) -> Attack:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(name: str, target: str) -> Attack:
    def attack(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return attack


def instead(name: str, make: Attack) -> Attack:
    def attack(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return attack


def torch_file(make: Callable[[], bytes]) -> Attack:
    """Put a PyTorch file in the place of the safetensors."""

    def attack(path: Path) -> None:
        (path / WEIGHTS).unlink()
        (path / TORCH).write_bytes(make())

    return attack


def header(entries: Any, data: bytes = b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def archive(data: bytes, storages: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch.save makes it, of any pickle and any storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as made:
        made.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            made.writestr(f"archive/data/{key}", content)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/version", "3\n")
    return buffer.getvalue()


def tensor(count: int, shape: tuple[int, ...], stride: tuple[int, ...], first: int = 0) -> bytes:
    """The operations that make a float16 tensor on storage `0`, which is said to have `count` elements."""
    pid = b"(X\x07\0\0\0storagectorch\nHalfStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    rebuilt = pid + number(first) + b"".join(sizes) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + rebuilt + b"tR"


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def state(value: bytes, name: str = "a.weight") -> bytes:
    """A pickle of one dict with one entry."""
    raw = name.encode()
    return b"\x80\x02}X" + struct.pack("<I", len(raw)) + raw + value + b"s."


class Runs:
    """Makes a folder `ran` where it is unpickled, if it is allowed to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def gguf(attack: Attack) -> Attack:
    """Attack with a GGUF file in the place of the weights."""

    def attacked(path: Path) -> None:
        (path / WEIGHTS).unlink()
        attack(path)

    return attacked


def sharded(attack: Attack) -> Attack:
    """Attack a checkpoint of which the weights are a shard: an index beside a whole file is not read."""

    def attacked(path: Path) -> None:
        if (path / WEIGHTS).exists():
            (path / WEIGHTS).rename(path / SHARD)
        attack(path)

    return attacked


# Attack -> what has to be in the one line that refuses it.

FILES: dict[str, tuple[Attack, str]] = {
    "config: a link out": (link(CONFIG, "../secret.json"), "outside of the checkpoint"),
    "config: a link to itself": (link(CONFIG, CONFIG), "config.json: missing"),
    "config: a FIFO": (instead(CONFIG, os.mkfifo), "not a regular file"),
    "config: a device": (link(CONFIG, "/dev/zero"), "outside of the checkpoint"),
    "config: a directory": (instead(CONFIG, Path.mkdir), "not a regular file"),
    "config: empty": (write(CONFIG, ""), "not valid JSON"),
    "config: 300 MB": (lambda path: os.truncate(path / CONFIG, 300 << 20), "at most"),
    "config: nested 200,000 deep": (write(CONFIG, '{"a":' + "[" * 200_000), "not valid JSON"),
    "config: a number of 5,000 digits": (write(CONFIG, '{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "config: a key twice": (write(CONFIG, '{"model_type": "llama", "model_type": "gpt2"}'), "stands twice"),
    "config: half a surrogate": (write(CONFIG, '{"model_type": "llama", "x": "\\ud800"}'), "surrogate"),
    "config: 30 million values": (write(CONFIG, '{"a":[' + "[],{}," * 15_000_000 + "0]}"), "values"),
    "weights: a link out": (link(WEIGHTS, "../secret.safetensors"), "outside of the checkpoint"),
    "weights: a link to itself": (link(WEIGHTS, WEIGHTS), "no weights"),
    "weights: a FIFO": (instead(WEIGHTS, os.mkfifo), "not a regular file"),
    "weights: a directory": (instead(WEIGHTS, Path.mkdir), "not a regular file"),
    "GGUF: a link out": (gguf(link("x.gguf", "../secret.json")), "outside of the checkpoint"),
    "GGUF: a FIFO": (gguf(lambda path: os.mkfifo(path / "x.gguf")), "not a regular file"),
    "GGUF: more facts than bytes": (gguf(write("x.gguf", b"GGUF\3\0\0\0" + number(0) + number(2**60))), "facts"),
    "GGUF: a list beyond the end": (
        gguf(write("x.gguf", struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, 9, 0, 2**40))),
        "numbers",
    ),
    "index: a FIFO": (instead(INDEX, os.mkfifo), "not a regular file"),
    "index: a directory": (instead(INDEX, Path.mkdir), "not a regular file"),
    "index: a link out": (link(INDEX, "../secret.json"), "outside of the checkpoint"),
    "index: no object": (write(INDEX, "[]"), "expected a JSON object"),
    "index: a name twice": (write(INDEX, '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'), "stands twice"),
    "index: 30 million values": (write(INDEX, '{"weight_map":{},"a":[' + "{}," * 30_000_000 + "0]}"), "values"),
    **{
        f"index: {what}": (write(INDEX, json.dumps({"weight_map": {"a": name}})), "in this directory")
        for what, name in {
            "a parent": "../x.safetensors",
            "an absolute path": "/etc/x.safetensors",
            "a Windows path": "C:\\x.safetensors",
            "a backslash": "..\\x.safetensors",
            "another kind of file": "x.pkl",
            "NUL": "a\0.safetensors",
            "an escape sequence": f"{ESCAPE}.safetensors",
            "a zero-width character": "a\u200b.safetensors",
            "no string": 7,
            "a device": "/dev/zero",
        }.items()
    },
    "index: a tensor that the shard lacks": (write(INDEX, json.dumps({"weight_map": {"a": SHARD}})), "a is missing"),
    "index: a tensor's name drives the terminal": (
        write(INDEX, json.dumps({"weight_map": {ESCAPE: SHARD}})),
        "printable tensor name",
    ),
    "header: 2**64 - 1 bytes": (write(WEIGHTS, b"\xff" * 8 + b"{}"), "cut short"),
    "header: 1 GB": (
        lambda path: [
            write(WEIGHTS, (10**9).to_bytes(8, "little") + b"{}")(path),
            os.truncate(path / WEIGHTS, 2 << 30),
        ],
        "at most 100000000",
    ),
    "header: 60 million values": (write(WEIGHTS, header(b'{"a":[' + b"[]," * 30_000_000 + b"0]}")), "values"),
    "header: 2**62 elements": (write(WEIGHTS, header({"a": entry("F16", [2**62], 0, 2**63)})), "a"),
    "header: overflow": (write(WEIGHTS, header({"a": entry("U8", [2**33, 2**31], 0, 0)})), "too large"),
    "header: a negative size": (write(WEIGHTS, header({"a": entry("U8", [-1], 0, 0)})), "sizes"),
    "header: a terabyte in a small file": (
        write(WEIGHTS, header({"a": entry("U8", [1 << 40], 0, 1 << 40)})),
        "cut short",
    ),
    "header: overlap": (
        write(WEIGHTS, header({"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 1, 4)}, b"1234")),
        "starts at byte",
    ),
    "header: hole": (
        write(WEIGHTS, header({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 3, 4)}, b"1234")),
        "starts at byte",
    ),
    "header: a name that drives the terminal": (
        write(WEIGHTS, header({f"a{ESCAPE}": entry("U8", [4], 0, 4)}, b"1234")),
        "not printable",
    ),
}
FILES |= {name: (sharded(attack), words) for name, (attack, words) in FILES.items() if name.startswith("index: ")}

PICKLES: dict[str, tuple[Attack, str]] = {
    "code": (torch_file(lambda: saved({"a": torch.ones(1), "x": Runs()})), "could run code"),
    "code, legacy layout": (
        torch_file(lambda: saved({"a": torch.ones(1), "x": Runs()}, _use_new_zipfile_serialization=False)),
        "could run code",
    ),
    "code, a bare pickle": (torch_file(lambda: pickle.dumps(Runs(), protocol=2)), "could run code"),
    "code, protocol 4": (torch_file(lambda: archive(pickle.dumps(Runs(), protocol=4), {})), "operation FRAME"),
    "code, through INST": (torch_file(lambda: archive(b"(S'ran'\nios\nmkdir\n.", {})), "operation"),
    "code, through an extension": (torch_file(lambda: archive(b"\x82\x01.", {})), "operation"),
    "code, a global of torch that builds": (
        torch_file(lambda: archive(state(b"ctorch.hub\nload\n(X\x01\0\0\0xtR"), {})),
        "could run code",
    ),
    "an empty file": (torch_file(lambda: b""), "cannot be read"),
    "no pickle": (torch_file(lambda: archive(b"", {})), "cannot be read"),
    "no STOP": (torch_file(lambda: archive(b"\x80\x02}", {})), "cannot be read"),
    "a call that never was": (torch_file(lambda: archive(b"\x80\x02NNR.", {})), "calls what is no function"),
    "keys nested a million deep": (
        torch_file(lambda: archive(b"})" + b"\x85" * 10**6 + b"Ns.", {})),
        "a tuple",
    ),
    "a value nested 100,000 deep": (
        torch_file(lambda: archive(state(b")" + b"\x85" * 100_000), {})),
        "in no file",
    ),
    "itself as its own value": (
        torch_file(lambda: archive(b"}q\0X\x01\0\0\0ah\0s.", {})),
        "in no file",
    ),
    "a bytearray of 16 GB": (
        torch_file(lambda: archive(state(b"c__builtin__\nbytearray\n(" + number(1 << 34) + b"tR"), {})),
        "in no file",
    ),
    "a tensor class that allocates": (
        torch_file(lambda: archive(state(b"ctorch\nHalfTensor\n(" + number(1 << 34) + b"tR"), {})),
        "could run code",
    ),
    "a memo of 2**32 places": (
        torch_file(lambda: archive(b"}r\xff\xff\xff\xff.", {})),
        "in no file",
    ),
    "20 million empty dicts": (torch_file(lambda: archive(b"(" + b"}" * 20_000_000 + b"t.", {})), "at most"),
    "5 million operations": (torch_file(lambda: archive(b"(" + b"}" * 5_000_000 + b"t.", {})), "operations"),
    "a storage of 2 TB": (
        torch_file(lambda: archive(state(tensor(1 << 40, (1 << 40,), (1,))), {"0": b"12"})),
        "its storage has 2199023255552 bytes, the file has 2",
    ),
    "a storage that is not there": (torch_file(lambda: archive(state(tensor(2, (2,), (1,))), {})), "the file has 0"),
    "a storage of -1": (torch_file(lambda: archive(state(tensor(-1, (2,), (1,))), {"0": b"1234"})), "not a number"),
    "a tensor expanded to 2 TB": (
        torch_file(lambda: archive(state(tensor(1, (1 << 40,), (0,))), {"0": b"12"})),
        "share the place of 1",
    ),
    "a stride out of the storage": (
        torch_file(lambda: archive(state(tensor(2, (2,), (1 << 40,))), {"0": b"1234"})),
        "of a storage of 4 bytes",
    ),
    "a negative stride": (torch_file(lambda: archive(state(tensor(2, (2,), (-1,))), {"0": b"1234"})), "not sizes"),
    "a place before the storage": (
        torch_file(lambda: archive(state(tensor(2, (1,), (1,), -9)), {"0": b"1234"})),
        "not a number",
    ),
    "a place behind the storage": (
        torch_file(lambda: archive(state(tensor(2, (1,), (1,), 2)), {"0": b"1234"})),
        "of a storage of 4 bytes",
    ),
    "a shape that overflows": (
        torch_file(lambda: archive(state(tensor(2, (1 << 62, 1 << 62), (0, 0))), {"0": b"1234"})),
        "too large",
    ),
    "packed storages": (
        torch_file(
            lambda: archive(state(tensor(1 << 20, (1 << 20,), (1,))), {"0": bytes(2 << 20)}, zipfile.ZIP_DEFLATED)
        ),
        "is packed",
    ),
    "a packed pickle of 1 GB": (
        torch_file(lambda: archive(b"(" + b"}" * (1 << 28), {}, zipfile.ZIP_DEFLATED)),
        "is packed",
    ),
    "two entries of one name": (torch_file(lambda: duplicated()), "one name"),
    "a directory of 4 GB": (torch_file(lambda: eocd(0xFFFFFFF0)), "cannot be read"),
    "a storage in a file cut short": (torch_file(lambda: saved({"a": torch.ones(999)})[:-100]), "cannot be read"),
    "a legacy storage that is not there": (
        torch_file(lambda: saved({"a": torch.ones(999)}, _use_new_zipfile_serialization=False)[:-100]),
        "cut short",
    ),
    "a conjugated tensor": (
        torch_file(lambda: saved({"a": torch.ones(2, dtype=torch.complex64).conj()})),
        "conjugated",
    ),
    "a sparse tensor": (torch_file(lambda: saved({"a": torch.eye(2).to_sparse()})), "unknown dtype or layout"),
    "a quantized tensor": (
        torch_file(lambda: archive(state(b"ctorch._utils\n_rebuild_qtensor\n)R"), {})),
        "unknown dtype or layout",
    ),
    "a name that drives the terminal": (torch_file(lambda: saved({f"a{ESCAPE}": torch.ones(1)})), "not a name"),
    "a name that is a number": (torch_file(lambda: saved({3: torch.ones(1)})), "not a name"),
}


def duplicated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("archive/data.pkl", state(tensor(2, (2,), (1,))))
        made.writestr("archive/data/0", b"1234")
        made.writestr("archive/data/1", b"5678")
    return buffer.getvalue().replace(b"archive/data/1", b"archive/data/0")


def eocd(size: int) -> bytes:
    """An archive whose end says that its directory has so many bytes."""
    return b"PK\x03\x04" + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, size, 0, 0)


def without_weights_of(**changes: Any) -> Attack:
    return edit_json(CONFIG, **changes)


MODELS: dict[str, tuple[Attack, str]] = {
    "a billion layers": (edit_json(CONFIG, num_hidden_layers=10**9), "config.json: num_hidden_layers is 1000000000"),
    "layers under another name": (
        edit_json(CONFIG, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=10**9, n_embd=32, n_head=4),
        "config.json: n_layer is 1000000000",
    ),
    "99,999 layers": (edit_json(CONFIG, num_hidden_layers=99_999), "asks for more than"),
    "a width of 10**12": (edit_json(CONFIG, hidden_size=10**12), "the config asks for"),
    "a width of 2**40": (edit_json(CONFIG, hidden_size=2**40, head_dim=8), "the config asks for"),
    "a vocabulary of 10**30": (edit_json(CONFIG, vocab_size=10**30), "config.json"),
    "a vocabulary of 2**33": (edit_json(CONFIG, vocab_size=2**33), "the config asks for"),
    "-1 layers": (edit_json(CONFIG, num_hidden_layers=-1), ""),
    "0 heads": (edit_json(CONFIG, num_attention_heads=0), "config.json"),
    "layers that are a string": (edit_json(CONFIG, num_hidden_layers="2"), "config.json"),
    "layers that are a list": (edit_json(CONFIG, num_hidden_layers=[2]), "config.json"),
    "layers that are null": (edit_json(CONFIG, num_hidden_layers=None), "config.json"),
    "a width that is NaN": (edit_json(CONFIG, hidden_size=float("nan")), "config.json"),
    "a method replaced": (edit_json(CONFIG, get_text_config=3), "get_text_config"),
    "the class replaced": (edit_json(CONFIG, __class__="x"), "__class__"),
    "a kernel from the Hub": (edit_json(CONFIG, attn_implementation="evil/kernel"), "attn_implementation"),
    "a kernel from the Hub, inside": (
        edit_json(CONFIG, text_config={"_attn_implementation": "evil/kernel"}),
        "_attn_implementation",
    ),
    "architectures that are a number": (edit_json(CONFIG, architectures=7), "architectures"),
    "architectures of numbers": (edit_json(CONFIG, architectures=[7]), "architectures"),
    "rope parameters that are a number": (edit_json(CONFIG, rope_parameters=3), "config.json"),
    "a mask of 10**12 bytes": (
        lambda path: [gpt2(path), edit_json(CONFIG, n_positions=10**6)(path)],
        "the config asks for",
    ),
}


def gpt2(path: Path) -> None:
    shutil.rmtree(path)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    transformers.GPT2LMHeadModel(config).half().save_pretrained(path)


def metaseq(metadata: Any = None, **state: Any) -> Attack:
    """Put a file of metaseq, with one flat parameter, in the place of the safetensors."""

    def attack(path: Path) -> None:
        (path / WEIGHTS).unlink()
        content = {"model": {"flat_param_0": torch.ones(8)}, "shard_metadata": metadata, **state}
        torch.save(content, path / "reshard.pt")

    return attack


def flat(**described: Any) -> dict[str, Any]:
    whole = {"names": ["decoder.a"], "shapes": [(8,)], "padding": 0, **described}
    return {"param_metadata": [{"fsdp_path": "", "params": {"flat_param_0": whole}}]}


METASEQ: dict[str, tuple[Attack, str]] = {
    "code in place of the model": (metaseq(model=Runs()), "no `model`"),
    "code in place of the metadata": (metaseq(Runs()), "not fairscale's"),
    "code in place of a tensor": (metaseq(model={"decoder.a": Runs()}), "missing"),
    "code in place of a shape": (metaseq(flat(shapes=[Runs()])), "no shape"),
    "a flat parameter of 2**60 elements": (metaseq(flat(shapes=[(2**30, 2**30)])), "8 of 1152921504606846976"),
    "a shape of 2**80": (metaseq(flat(shapes=[(2**80,)])), "no shape"),
    "a negative size": (metaseq(flat(shapes=[(-8, -1)])), "no shape"),
    "a padding of -8": (metaseq(flat(padding=-8)), "padded by -8 of 8"),
    "a padding of 2**70": (metaseq(flat(padding=2**70)), "padded by"),
    "a million parameters of no elements": (
        metaseq(flat(names=["decoder.a"] * 10**6, shapes=[(0,)] * 10**6)),
        "8 of 0 elements",
    ),
    "a name that drives the terminal": (metaseq(flat(names=[f"a{ESCAPE}"])), "do not go together"),
    "a file linked from outside": (
        lambda path: [(path / WEIGHTS).unlink(), link("reshard.pt", "../secret.json")(path)],
        "outside of the checkpoint",
    ),
}


def name_file(name: str) -> Attack:
    return lambda path: (path / name).write_text("x")


SMALL_FILES: dict[str, tuple[Attack, str]] = {
    "a link out": (link("tokenizer.json", "../secret.json"), "outside of the checkpoint"),
    "a folder linked from outside": (
        link("additional_chat_templates", "../secrets"),
        "outside of the checkpoint",
    ),
    "a name that drives the terminal": (name_file(f"a{ESCAPE}.txt"), "name"),
    "a name with a line break": (name_file("a\nb.txt"), "name"),
    "a name that is no UTF-8": (lambda path: os.close(os.open(os.fsencode(path) + b"/\xff.txt", os.O_CREAT)), "name"),
    "too much of them": (
        lambda path: [os.truncate(make_file(path / f"{i}.txt"), 60 << 20) for i in range(10)],
        "at most",
    ),
}


def make_file(path: Path) -> Path:
    path.touch()
    return path


def tree(path: Path) -> set[Path]:
    return set(path.rglob("*"))


@pytest.fixture
def victim(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the source, to attack; and beside it what an attack would like to have."""
    monkeypatch.chdir(tmp_path)
    return copy_with_secrets(source, tmp_path)


def copy_with_secrets(checkpoint: Path, folder: Path) -> Path:
    path = folder / checkpoint.name
    shutil.copytree(checkpoint, path)
    (folder / "secret.json").write_text('{"model_type": "llama", "secret": 1}')
    shutil.copy(min(path.glob("*.safetensors")), folder / "secret.safetensors")
    (folder / "secrets").mkdir()
    (folder / "secrets" / "key.txt").write_text("secret")
    return path


def assert_refused(result: Result, words: str) -> None:
    """One line, in which nothing is left that a terminal obeys; no traceback and no defect of ours."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: "), result.stderr
    assert len([line for line in lines if not line.startswith("Note: ")]) == 1, result.stderr
    assert all(line.isprintable() for line in lines), result.stderr
    assert "unexpected" not in lines[-1], lines[-1]
    assert words in lines[-1], lines[-1]
    assert len(lines[-1]) < 1000


TABLES = {"file": FILES, "pickle": PICKLES, "metaseq": METASEQ, "model": MODELS, "small file": SMALL_FILES}
ALL = {f"{kind}: {name}": attack for kind, table in TABLES.items() for name, attack in table.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_hostile_source_is_refused(name: str, victim: Path, tmp_path: Path) -> None:
    attack, words = ALL[name]
    attack(victim)
    before = tree(tmp_path)
    arguments = [str(victim), str(tmp_path / "out")]
    result = CliRunner().invoke(convert_command, arguments)
    assert_refused(result, words)
    assert tree(tmp_path) == before


IN_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from click.testing import CliRunner
from llmint8.converter.commands.convert import convert_command

def convert(source):
    return CliRunner().invoke(convert_command, [str(source), str(source.parent / "out")])

good, *attacked = map(Path, sys.argv[2:])
assert convert(good).exit_code == 0  # whatever is imported late
size = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
for path in attacked:
    result = convert(path)
    print(json.dumps([result.exit_code, result.stderr]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads /proc")
def test_every_attack_is_refused_in_half_a_gigabyte(source: Path, tmp_path: Path) -> None:
    """Memory is bounded before it is allocated: nothing a source declares is more than what its files hold."""
    shutil.copytree(source, tmp_path / "good" / "source")
    victims = []
    for number, (attack, _) in enumerate(ALL.values()):
        (tmp_path / str(number)).mkdir()
        victims.append(copy_with_secrets(source, tmp_path / str(number)))
        attack(victims[-1])
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(512 << 20), str(tmp_path / "good" / "source")]
    done = subprocess.run([*command, *map(str, victims)], capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(ALL)
    for name, (code, said) in zip(ALL, results, strict=True):
        assert code == 1, (name, said)
        assert "unexpected" not in said, (name, said)


def test_what_is_hostile_to_the_terminal_is_defused(victim: Path, tmp_path: Path) -> None:
    """These sources convert; what they say reaches the terminal through notices and through transformers' log."""
    edit_json(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e4, f"x{ESCAPE}": 1})(victim)
    code = "import sys; from llmint8.converter.commands.convert import convert_command; convert_command(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(victim), str(tmp_path / "out"), "--outliers", "none", "--verbose"]
    done = subprocess.run(command, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert "rope" in said, "transformers says nothing, so the test shows nothing"
    assert all(line.isprintable() for line in said.splitlines()), said
    edit_json(CONFIG, model_type=f"x{ESCAPE}")(victim)
    result = CliRunner().invoke(convert_command, [str(victim), str(tmp_path / "out2"), "--verbose"])
    assert all(line.isprintable() for line in result.output.splitlines()), result.output


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"added_tokens": [{"id": 4294967295, "content": "a"}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}, "added_tokens": []}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 9999999}, "unk_token": "a"}, "added_tokens": []}',
        '{"model": {"type": "Unigram", "vocab": [], "unk_id": 99}}',
        '{"model": ' + "[" * 100_000,
    ],
    ids=["list", "broken", "id 2**32 - 1", "vocabulary 2**32 - 1", "id too large", "no vocabulary", "nested"],
)
def test_a_hostile_tokenizer_ends_the_conversion_or_is_done_without(victim: Path, tmp_path: Path, content: str) -> None:
    """The tokenizers library reads it; what it cannot read is as if it were not there, and the user is told."""
    write("tokenizer.json", content)(victim)
    result = CliRunner().invoke(convert_command, [str(victim), str(tmp_path / "out")])
    if result.exit_code == 0:
        assert "calibrated with random token ids" in result.stderr
    else:
        assert_refused(result, "")
        assert not (tmp_path / "out").exists()


def test_names_that_lead_elsewhere_stay_inside(victim: Path, tmp_path: Path) -> None:
    """A tensor may be called `../../x`; it is never a path. And what the converter writes itself is not copied."""
    tensors = load_file(victim / WEIGHTS)
    save_file(tensors | {"../../x": torch.ones(1)}, victim / WEIGHTS, metadata={"format": "pt"})
    for name in (MANIFEST, "llmint8_eval.json", "adapter_config.json", "x.partial", "model.bin"):
        (victim / name).write_text('{"kl": -1, "base_model_name_or_path": "../secrets"}')
    (victim / "setuid.txt").write_text("x")
    (victim / "setuid.txt").chmod(0o4777)
    before = tree(tmp_path)
    assert CliRunner().invoke(convert_command, [str(victim), str(tmp_path / "out"), "--outliers=none"]).exit_code == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tree(tmp_path) - before}
    expected = {CONFIG, WEIGHTS, MANIFEST, "README.md", "generation_config.json", "setuid.txt"}
    assert written == {"out", *(f"out/{name}" for name in expected)}
    assert all((tmp_path / name).stat().st_mode & 0o7022 == 0 for name in written)
    assert formats.check_values(formats.open_checkpoint(tmp_path / "out")) == []


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_files_cut_short_after_they_were_opened(victim: Path, tmp_path: Path, layout: str) -> None:
    if layout == "bin":
        tensors = load_file(victim / WEIGHTS)
        torch_file(lambda: saved(tensors))(victim)
    opened = formats.open_source(victim)
    weights = opened.files[0].path
    last = max(opened.tensors.values(), key=lambda info: info.offset)
    os.truncate(weights, last.offset + last.nbytes - 1)
    with pytest.raises(formats.CorruptFileError, match=f"{last.name}: the file ends 1 bytes too early"):
        opened.read(last.name)


# int8 checkpoints: what `verify`, `inspect` and `runtime.load` refuse.

ONE_SHARD = "model-00001-of-00003.safetensors"


def edit_quantization(**changes: Any) -> Attack:
    def attack(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        config["quantization_config"]["llmint8"] |= changes
        (path / CONFIG).write_text(json.dumps(config))

    return attack


def first_shard(attack: Callable[[str], Attack]) -> Attack:
    def on_shard(path: Path) -> None:
        attack(min(json.loads((path / INDEX).read_text())["weight_map"].values()))(path)

    return on_shard


INT8 = {name: attack for name, (attack, _) in FILES.items() if name.startswith(("config: ", "index: "))}
INT8 |= {
    "shard: a link out": first_shard(lambda name: link(name, "../secret.safetensors")),
    "shard: a link to itself": first_shard(lambda name: link(name, name)),
    "shard: a FIFO": first_shard(lambda name: instead(name, os.mkfifo)),
    "shard: a device": first_shard(lambda name: link(name, "/dev/zero")),
    "shard: a directory": first_shard(lambda name: instead(name, Path.mkdir)),
    "shard: a pickle": first_shard(lambda name: write(name, saved({"x": Runs()}))),
    "shard: huge header": first_shard(lambda name: write(name, b"\xff" * 8)),
    "shard: a terabyte": first_shard(lambda name: write(name, header({"a": entry("U8", [1 << 40], 0, 1 << 40)}))),
    "shard: a name drives the terminal": first_shard(
        lambda name: write(name, header({ESCAPE: entry("U8", [1], 0, 1)}, b"1"))
    ),
    "threshold of 400 digits": lambda path: [
        write(CONFIG, (path / CONFIG).read_text().replace('threshold": 6.0', 'threshold": 1' + "0" * 400))(path)
    ],
    "threshold NaN": lambda path: [
        write(CONFIG, (path / CONFIG).read_text().replace('threshold": 6.0', 'threshold": NaN'))(path)
    ],
    "version drives the terminal": edit_quantization(format_version=ESCAPE),
    "producer is no string": edit_quantization(producer=[1]),
    "source has no strings": edit_quantization(source={"name": 1, "commit": [2]}),
    "source's name is a list": edit_quantization(source={"name": ["x"]}),
    "counts of 10**30": edit_quantization(outliers={"criterion": "x", "counts": {"a": 10**30}}),
    "criterion is null": edit_quantization(outliers={"criterion": None, "counts": {}}),
}


@pytest.fixture
def int8_victim(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_with_secrets(int8, tmp_path)


@pytest.mark.parametrize("name", INT8)
def test_a_hostile_checkpoint_is_refused(
    name: str, int8_victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    INT8[name](int8_victim)
    before = tree(tmp_path)
    for command in (["verify"], ["verify", "--quick"], ["inspect"], ["inspect", "--json"]):
        result = CliRunner().invoke(main, [command[0], str(int8_victim), *command[1:]])
        assert_refused(result, "")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("reached"))
    with pytest.raises(formats.LLMInt8Error) as caught:
        runtime.load(int8_victim)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("architectures", [5, [5], {"a": 1}, [], f"x{ESCAPE}"], ids=repr)
def test_what_the_format_says_nothing_about_is_shown_harmlessly(int8_victim: Path, architectures: Any) -> None:
    edit_json(CONFIG, architectures=architectures)(int8_victim)
    for option in ([], ["--json"]):
        result = CliRunner().invoke(main, ["inspect", str(int8_victim), *option])
        assert result.exit_code == 0, result.output
        assert all(line.isprintable() for line in result.output.splitlines())


LOADS: dict[str, Attack] = {
    name: attack for name, (attack, _) in MODELS.items() if name not in ("-1 layers", "a mask of 10**12 bytes")
}
LOADS |= {
    "a generation config linked from outside": link("generation_config.json", "../secret.json"),
    "a tokenizer linked from outside": link("tokenizer.json", "../secret.json"),
    "an adapter from elsewhere": write("adapter_config.json", '{"base_model_name_or_path": "../secrets"}'),
    "a generation config that is a list": write("generation_config.json", "[1]"),
    "a generation config that is nested": write("generation_config.json", '{"a":' + "[" * 100_000),
    "a dtype that is a function": edit_json(CONFIG, dtype="load"),
    "a manifest linked from outside": link(MANIFEST, "../secret.json"),
    "a manifest that is a FIFO": instead(MANIFEST, os.mkfifo),
    "a manifest of no modules": edit_json(MANIFEST, modules=[ESCAPE]),
    "statistics that drive the terminal": edit_json(
        MANIFEST, modules={"model.layers.0.mlp.up_proj": {"kept_absmax": ESCAPE}}
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_hostile_model_is_not_loaded(name: str, int8_victim: Path, tmp_path: Path) -> None:
    LOADS[name](int8_victim)
    before = tree(tmp_path)
    with pytest.raises(formats.LLMInt8Error) as caught:
        runtime.load(int8_victim)
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == before
