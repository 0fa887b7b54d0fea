"""What `llmint8 verify` finds: every damage done to a checkpoint, with the file and the tensor named.

Damage is done systematically: to every tensor, every byte of every header, every entry of index and manifest, and at
every structural offset. `docs/reliability.md` has the numbers.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmint8 import converter, formats, runtime
from llmint8.formats import Checkpoint, LLMInt8Error, TensorInfo, check_manifest, check_values, open_checkpoint
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# The other format is damaged in the soak.
LAYOUT = formats.LAYOUTS[int(os.environ.get("LLMINT8_TESTED_FORMAT", "1"))]
INDEX, MANIFEST = LAYOUT.index, "llmint8_manifest.json"


def convert(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder / "source")
    how: dict[str, Any] = {"format": LAYOUT.major, "rotate": LAYOUT == formats.NATIVE}
    converter.convert(folder / "source", folder / "int8", outliers="top-k=2", max_shard_size="3KB", **how)
    return folder / "int8"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("damage"), seed=0)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "int8")
    return tmp_path / "int8"


def problems(path: Path, quick: bool = False) -> list[str]:
    """What `llmint8 verify` would print."""
    try:
        checkpoint = open_checkpoint(path)
        return [str(problem) for problem in (check_manifest(checkpoint)[1] if quick else check_values(checkpoint))]
    except LLMInt8Error as error:
        return [str(error)]


def shards(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors"))
    assert len(found) > 2
    return found


def header_size(shard: Path) -> int:
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def each_damage(path: Path, damages: Iterator[tuple[Any, bytes]], file: Path) -> Iterator[tuple[Any, list[str]]]:
    """Write each damaged content in turn and yield what verify says; put the file back at the end."""
    whole = file.read_bytes()
    for what, content in damages:
        file.write_bytes(content)
        yield what, problems(path)
    file.write_bytes(whole)
    assert problems(path) == []


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_any_tensor(copy: Path) -> None:
    """The first, a middle and the last byte of every tensor; each is told, by file and name, and no other is."""
    tried = 0
    for shard in shards(copy):
        whole = shard.read_bytes()
        infos = [info for info in open_checkpoint(copy).tensors.values() if info.file == shard.name and info.nbytes]
        damages = (
            (info, flipped(whole, info.offset + place, (place + bit) % 8))
            for info in infos
            for place in sorted({0, info.nbytes // 2, info.nbytes - 1})
            for bit in (0, 7)
        )
        for info, said in each_damage(copy, damages, shard):
            tried += 1
            assert said, info
            assert any(f"{shard.name}: {info.name}: " in line for line in said), (info, said)
            layer = info.name.rpartition(".")[0]
            assert all(layer in line for line in said), (info, said)
    assert tried > 150


def test_a_flipped_bit_in_any_byte_of_a_header(copy: Path) -> None:
    for shard in shards(copy):
        whole = shard.read_bytes()
        damages = ((i, flipped(whole, i, i % 8)) for i in range(header_size(shard)))
        for position, said in each_damage(copy, damages, shard):
            assert said, position
            assert shard.name in "".join(said), (position, said)


def test_every_bit_of_a_header(copy: Path) -> None:
    shard = min(shards(copy), key=header_size)
    whole = shard.read_bytes()
    damages = ((i, flipped(whole, i // 8, i % 8)) for i in range(8 * header_size(shard)))
    assert all(said for _, said in each_damage(copy, damages, shard))


def test_a_shard_cut_short_at_every_structural_offset(copy: Path) -> None:
    for shard in shards(copy):
        whole, begin = shard.read_bytes(), header_size(shard)
        infos = [info for info in open_checkpoint(copy).tensors.values() if info.file == shard.name]
        offsets = {0, 1, 7, 8, 9, begin // 2, begin - 1, begin, begin + 1, len(whole) - 1}
        offsets |= {place for info in infos for place in (info.offset, info.offset + info.nbytes // 2)}
        damages = ((length, whole[:length]) for length in sorted(offsets - {len(whole)}))
        for length, (line,) in each_damage(copy, damages, shard):
            assert line.startswith(f"E06 {shard}: "), (length, line)
        for _, (line,) in each_damage(copy, iter([("longer", whole + b"\0")]), shard):
            assert line.startswith(f"E06 {shard}: "), line


def test_shards_swapped_or_missing_or_of_another_model(copy: Path, tmp_path: Path) -> None:
    other = convert(tmp_path / "other", seed=1)
    first, *rest = shards(copy)
    for second in rest:
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
        assert problems(copy)[0].startswith("E07"), problems(copy)
        first.write_bytes(one)
        second.write_bytes(two)
    for shard in shards(copy):
        whole = shard.read_bytes()
        shard.write_bytes((other / shard.name).read_bytes())
        said = problems(copy)
        assert said
        assert all(line.startswith("E18 ") and shard.name in line for line in said if not line.startswith("E1")), said
        shard.unlink()
        assert problems(copy) == [f"E05 {shard}: no such regular file; is the download complete?"]
        shard.write_bytes(whole)


def rewrite_header(shard: Path, change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> None:
    whole, size = shard.read_bytes(), header_size(shard)
    header = json.loads(whole[8:size])
    change(header)
    raw = json.dumps(header).encode()
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw + (whole[size:] if data is None else data))


def twins(checkpoint: Checkpoint) -> list[tuple[TensorInfo, TensorInfo]]:
    """Pairs of tensors of one file that nothing but their content tells apart."""
    infos = [info for info in checkpoint.tensors.values() if info.nbytes > 4]
    return [
        (a, b)
        for i, a in enumerate(infos)
        for b in infos[i + 1 :]
        if (a.file, a.dtype, a.shape) == (b.file, b.dtype, b.shape)
        and not torch.equal(checkpoint.read(a.name), checkpoint.read(b.name))
    ]


def test_two_tensors_swapped_in_a_header(copy: Path) -> None:
    pairs = twins(open_checkpoint(copy))
    assert len(pairs) > 5
    for one, two in pairs:
        shard = copy / one.file
        whole = shard.read_bytes()

        def swap(header: dict[str, Any], one: str = one.name, two: str = two.name) -> None:
            header[one], header[two] = header[two], header[one]

        rewrite_header(shard, swap)
        said = "\n".join(problems(copy))
        assert f"E18 {shard}: {one.name}: its SHA-256" in said
        assert f"E18 {shard}: {two.name}: its SHA-256" in said
        shard.write_bytes(whole)


def test_a_tensor_dropped_or_added(copy: Path) -> None:
    """From the file alone, from file and index, and from these and the quantization: something is left that tells."""
    checkpoint = open_checkpoint(copy)
    index = (copy / INDEX).read_text()
    for info in checkpoint.tensors.values():
        shard = copy / info.file
        whole = shard.read_bytes()
        # Every other tensor moves up, so that the container itself is valid.
        kept = sorted((t for t in checkpoint.tensors.values() if t.file == info.file and t != info), key=_by_offset)
        data = b"".join(whole[t.offset : t.offset + t.nbytes] for t in kept)
        rewrite_header(shard, lambda header, kept=kept: _lay_out(header, kept), data)
        (line, *_) = problems(copy)
        assert line == f"E07 {shard}: {info.name}: the index has it here, the file does not"
        value = json.loads(index)
        del value["weight_map"][info.name]
        (copy / INDEX).write_text(json.dumps(value))
        assert info.name in problems(copy)[0] or info.name.removesuffix(".weight") in problems(copy)[0]
        (copy / INDEX).write_text(index)
        shard.write_bytes(whole)
    shard = shards(copy)[0]
    size = shard.stat().st_size - header_size(shard)
    added = {"dtype": "U8", "shape": [1], "data_offsets": [size, size + 1]}
    rewrite_header(
        shard, lambda header: header.update({"added": added}), shard.read_bytes()[header_size(shard) :] + b"\1"
    )
    assert problems(copy) == [f"E07 {shard}: added: the index has it in None"]
    value = json.loads(index)
    value["weight_map"]["added"] = shard.name
    (copy / INDEX).write_text(json.dumps(value))
    assert problems(copy)[0] == f"E17 {copy / MANIFEST}: added: in {shard.name}, not in the manifest"


def _by_offset(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def _lay_out(header: dict[str, Any], kept: list[TensorInfo]) -> None:
    old, end = dict(header), 0
    header.clear()
    header["__metadata__"] = old["__metadata__"]
    for info in kept:
        header[info.name] = old[info.name] | {"data_offsets": [end, end + info.nbytes]}
        end += info.nbytes


def test_every_wrong_entry_of_the_index(copy: Path) -> None:
    names = [shard.name for shard in shards(copy)]
    index = json.loads((copy / INDEX).read_text())
    for tensor, file in index["weight_map"].items():
        wrong = next(name for name in names if name != file)
        for changed in ({tensor: wrong}, {tensor: "absent.safetensors"}, {f"{tensor}2": file}):
            (copy / INDEX).write_text(json.dumps({**index, "weight_map": index["weight_map"] | changed}))
            (line, *_) = problems(copy)
            assert line.startswith(("E05", "E07")), line
            assert tensor in line or "absent" in line, line
        without = {name: file for name, file in index["weight_map"].items() if name != tensor}
        (copy / INDEX).write_text(json.dumps({**index, "weight_map": without}))
        assert tensor in problems(copy)[0]


@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_a_flipped_bit_in_every_third_byte_of_a_small_file(copy: Path, name: str) -> None:
    """No position is special: a hash covers them all. What is tried is that none makes the reader fail."""
    whole = (copy / name).read_bytes()
    damages = ((i, flipped(whole, i, i % 8)) for i in range(0, len(whole), 3))
    for position, found in each_damage(copy, damages, copy / name):
        assert found, f"byte {position}"


def test_a_small_file_that_is_gone_or_a_link(copy: Path, tmp_path: Path) -> None:
    """A reader may fetch only what it needs, so a file may be missing; what is there must be in the checkpoint."""
    file = copy / "generation_config.json"
    file.rename(tmp_path / "elsewhere")
    assert problems(copy) == []
    file.symlink_to(tmp_path / "elsewhere")
    (found,) = problems(copy)
    assert found.startswith(f"E19 {file}: a link to ")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a//b", "a\\b", "", "."])
def test_a_manifest_that_names_files_elsewhere(copy: Path, name: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    manifest["files"][name] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (found,) = problems(copy)
    assert found.startswith("E16")
    assert "not the name of a file in the checkpoint" in found


def test_every_wrong_entry_of_the_manifest(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    for tensor, entry in manifest["tensors"].items():
        wrong: list[dict[str, Any] | None] = [None]
        wrong += [entry | {"sha256": entry["sha256"].translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))}]
        wrong += [entry | {"shape": [*entry["shape"], 1]}, entry | {"file": "x"}, entry | {"dtype": "U64"}]
        for changed in wrong:
            tensors = {name: e for name, e in manifest["tensors"].items() if name != tensor or changed is not None}
            tensors |= {tensor: changed} if changed is not None else {}
            (copy / MANIFEST).write_text(json.dumps({**manifest, "tensors": tensors}))
            (line,) = problems(copy)
            assert line.startswith(("E17", "E18")), line
            assert f": {tensor}: " in line
    other = {**manifest, "tensors": {**manifest["tensors"], "more": entry}}
    (copy / MANIFEST).write_text(json.dumps(other))
    assert problems(copy) == [f"E17 {copy / MANIFEST}: more: in the manifest, in no file"]


@pytest.fixture
def damaged(copy: Path) -> tuple[Path, TensorInfo]:
    """One bit of an embedding is wrong: nothing but its hash tells."""
    info = open_checkpoint(copy).tensors["model.embed_tokens.weight"]
    shard = copy / info.file
    shard.write_bytes(flipped(shard.read_bytes(), info.offset + 5, 3))
    return copy, info


def test_the_command_names_file_and_tensor_and_fails(damaged: tuple[Path, TensorInfo]) -> None:
    path, info = damaged
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 1
    line, last = result.stderr.splitlines()
    assert line == f"E18 {path / info.file}: {info.name}: its SHA-256 is not the manifest's; fetch {info.file} again"
    assert last == f"Error: 1 problem in {path}"


def test_quick_checks_the_structure_and_reads_no_tensor(
    damaged: tuple[Path, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, info = damaged
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, name: read(self, name) if name.endswith(".weight_format") else pytest.fail(f"{name} is read"),
    )
    result = CliRunner().invoke(main, ["verify", str(path), "--quick"])
    assert result.exit_code == 0, result.output
    assert "the values were not read" in result.stdout
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["tensors"][info.name]
    (path / MANIFEST).write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["verify", str(path), "--quick"])
    assert result.exit_code == 1
    assert f"E17 {path / MANIFEST}: {info.name}" in result.stderr
    (path / info.file).write_bytes((path / info.file).read_bytes()[:-1])
    result = CliRunner().invoke(main, ["verify", str(path), "--quick"])
    assert f"E06 {path / info.file}" in result.stderr
    result = CliRunner().invoke(main, ["verify", str(path), "--quick", "--source", str(path)])
    assert "give one of the two" in result.stderr


def test_load_with_verify_refuses_what_load_alone_takes(original: Path, damaged: tuple[Path, TensorInfo]) -> None:
    path, info = damaged
    assert runtime.load(path) is not None
    with pytest.raises(formats.CheckpointError, match=info.name) as caught:
        runtime.load(path, verify=True)
    assert caught.value.code == "E18"
    assert str(caught.value).startswith(f"E18 {path / info.file}: {info.name}: ")
    model = runtime.load(original, verify=True)
    assert torch.equal(model.lm_head.weight, open_checkpoint(original).read("lm_head.weight"))
