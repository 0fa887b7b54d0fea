"""Reading 16-bit checkpoints of others: every layout, and what must be refused without harm."""

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers.modeling_utils import _get_resolved_checkpoint_files

from llmint8.formats import CorruptFileError, LLMInt8Error, SourceError, open_source
from llmint8.formats.disk.small_files import left_behind

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    return {
        "m.a.weight": base.half(),
        "m.b.weight": base.bfloat16().t(),
        "m.c.weight": base[1:4, ::2],
        "m.scalar": torch.tensor(3, dtype=torch.int64),
        "m.empty": torch.zeros(0, 3, dtype=torch.float16),
        "m.mask": torch.tensor([True, False]),
    }


def save_torch(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_legacy(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


Save = Callable[[dict[str, Tensor], Path], None]
LAYOUTS = {"safetensors": save_safetensors, "zip": save_torch, "legacy": save_legacy}


def make(path: Path, layout: str = "safetensors", shards: int = 1, config: Any = None) -> Path:
    """Write a checkpoint directory in one of the layouts of the Hub."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "test"} if config is None else config))
    stem, suffix = ("model", "safetensors") if layout == "safetensors" else ("pytorch_model", "bin")
    items = list(some_tensors().items())
    weight_map = {}
    for number in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = dict(items[number::shards])
        LAYOUTS[layout](part, path / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def change_index(path: Path, name: str, **entries: Any) -> None:
    index = json.loads((path / name).read_text())
    for tensor, file in entries.items():
        index["weight_map"][tensor] = file
    (path / name).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str, shards: int) -> None:
    source = open_source(make(tmp_path / "s", layout, shards))
    assert source.config == {"model_type": "test"}
    assert len(source.files) == shards
    assert source.tensors.keys() == some_tensors().keys()
    for name, expected in some_tensors().items():
        info, tensor = source.tensors[name], source.read(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor, expected)
        assert tensor.is_contiguous()
        assert (info.shape, info.nbytes) == (tuple(expected.shape), expected.numel() * expected.element_size())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_read_is_memory_of_its_own(tmp_path: Path, layout: str) -> None:
    source = open_source(make(tmp_path / "s", layout))
    before = {path.name: path.read_bytes() for path in source.path.iterdir()}
    tensor = source.read("m.a.weight").zero_()
    assert torch.equal(source.read("m.a.weight"), some_tensors()["m.a.weight"])
    assert torch.equal(source.read("m.c.weight"), some_tensors()["m.c.weight"])
    assert tensor.untyped_storage().nbytes() == tensor.numel() * 2
    assert {path.name: path.read_bytes() for path in source.path.iterdir()} == before


def test_parameters_and_tied_tensors_of_a_bin_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    (path / "model.safetensors").unlink()
    weight = torch.nn.Parameter(torch.randn(3, 2))
    torch.save({"emb.weight": weight, "lm_head.weight": weight}, path / "pytorch_model.bin")
    source = open_source(path)
    for name in ("emb.weight", "lm_head.weight"):
        assert torch.equal(source.read(name), weight)
        assert not source.read(name).requires_grad


def test_one_file_comes_before_shards_and_safetensors_before_bin_as_transformers_has_it(tmp_path: Path) -> None:
    """And what is not read is named."""
    taken = [("safetensors", 1, "model.safetensors"), ("safetensors", 2, INDEX)]
    taken += [("zip", 1, "pytorch_model.bin"), ("zip", 2, TORCH_INDEX)]
    for number in range(len(taken)):
        path = tmp_path / str(number)
        for layout, shards, _ in taken[number:]:
            make(path, layout, shards)
        source = open_source(path)
        assert len(source.files) == taken[number][1]
        assert source.files[0].path.suffix == (".safetensors" if number < 2 else ".bin")
        left = [name for *_, name in taken[number + 1 :]]
        expected = f"{', '.join(left)}: left aside, for transformers takes {taken[number][2]} where both are there"
        assert source.notices == ([expected] if left else [])
        theirs, _ = _get_resolved_checkpoint_files(path, None, None, None, None, False)
        assert sorted(Path(file).name for file in theirs) == [file.path.name for file in source.files]


def test_a_whole_file_beside_an_index_without_its_shards(tmp_path: Path) -> None:
    path = make(tmp_path / "s", shards=3)
    for shard in path.glob("*-of-*"):
        shard.unlink()
    make(path)
    source = open_source(path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in some_tensors().items())
    (notice,) = source.notices
    assert notice.startswith(f"{INDEX}: left aside")


def test_the_file_that_config_json_names_is_taken(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    (path / "model.safetensors").rename(path / "other.safetensors")
    make(path)
    (path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    source = open_source(path)
    assert [file.path.name for file in source.files] == ["other.safetensors"]
    assert source.notices[0].startswith("model.safetensors: left aside")
    for name in ("../other.safetensors", "a/b.safetensors", "other.bin", 7, "/other.safetensors"):
        (path / "config.json").write_text(json.dumps({"transformers_weights": name}))
        refused(path, "transformers_weights is", kind=SourceError)


def test_what_is_no_tensor_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path / "s")
    (path / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "epoch": 3}, path / "pytorch_model.bin")
    assert set(open_source(path).tensors) == {"a"}
    assert "epoch is a int and not a tensor" in caplog.text


def test_small_files_are_found_and_weights_are_not(tmp_path: Path) -> None:
    path = make(tmp_path / "s", shards=2)
    make(path, "zip", 2)
    wanted = [
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool_use.jinja",
    ]
    unwanted = [
        ".gitattributes",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.Q4.GGUF",
        "model.onnx",
        "training_args.bin",
        "optimizer.pt",
        "tf_model.h5.index.json",
        "onnx/config.json",
        "original/params.json",
    ]
    for name in [*wanted, *unwanted]:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("x")
    (path / "huge.txt").touch()
    os.truncate(path / "huge.txt", (64 << 20) + 1)
    found = open_source(path).small_files
    assert [file.relative_to(path).as_posix() for file in found] == sorted(wanted)


# What must be refused.


def refused(path: Path, *named: str, kind: type[LLMInt8Error] = LLMInt8Error) -> None:
    with pytest.raises(kind) as caught:
        open_source(path)
    message = str(caught.value)
    assert all(what in message for what in named), message
    assert message.isprintable()


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent: no such directory", kind=SourceError)
    refused(tmp_path, "config.json: missing", kind=SourceError)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no weights", "model.safetensors", kind=SourceError)
    refused(tmp_path / "config.json", "no such directory", kind=SourceError)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\0"])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "s")
    (path / "config.json").write_text(text)
    refused(path, str(path / "config.json"), kind=CorruptFileError)


@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_a_missing_shard(tmp_path: Path, layout: str) -> None:
    path = make(tmp_path / "s", layout, 3)
    shard = sorted(path.glob("*-00002-of-*"))[0]
    shard.unlink()
    refused(path, f"{shard}: missing", kind=SourceError)


@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path, layout: str) -> None:
    path = make(tmp_path / "s", layout, 2)
    index = next(path.glob("*.index.json"))
    shards = [file.path.name for file in open_source(path).files]
    change_index(path, index.name, **{"m.more": shards[1]})
    refused(path, f"{shards[1]}: m.more is missing", kind=SourceError)
    make(path, layout, 2)
    change_index(path, index.name, **{"m.a.weight": shards[1]})
    refused(path, f"{shards[1]}: m.a.weight is missing", kind=SourceError)


def test_of_a_tensor_in_two_shards_the_index_decides_and_other_values_are_said(tmp_path: Path) -> None:
    path = make(tmp_path / "s", shards=2)
    first, second = (file.path for file in open_source(path).files)
    of_first = set(open_source(path).files[0].tensors)
    save_safetensors(some_tensors(), second)
    source = open_source(path)
    assert source.notices == []
    assert {name for name, info in source.tensors.items() if info.file == first.name} == of_first
    save_safetensors({name: torch.full_like(tensor, 1) for name, tensor in some_tensors().items()}, second)
    source = open_source(path)
    name = sorted(of_first)[0]
    assert torch.equal(source.read(name), some_tensors()[name])
    (notice,) = source.notices
    assert f"in {first.name} and {second.name}, with other values; taken from {first.name}, as the index says" in notice
    change_index(path, INDEX, **dict.fromkeys(of_first, second.name))
    source = open_source(path)
    assert torch.equal(source.read(name), torch.full_like(some_tensors()[name], 1))


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "./model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "C:\\model.safetensors",
        "a\0.safetensors",
        "a\x1b[2J.safetensors",
        "model.bin",
        "model.safetensors/",
        "..",
        "",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_an_index_may_name_only_plain_files(tmp_path: Path, file: Any) -> None:
    path = make(tmp_path / "s", shards=2)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (path / "sub").mkdir()
    change_index(path, INDEX, **{"m.a.weight": file})
    refused(path, f"{INDEX}: 'm.a.weight' is in", kind=CorruptFileError)


def test_an_index_of_bin_files_may_not_name_others(tmp_path: Path) -> None:
    path = make(tmp_path / "s", "zip", 2)
    change_index(path, TORCH_INDEX, **{"m.a.weight": "model.pkl"})
    refused(path, f"{TORCH_INDEX}: 'm.a.weight' is in 'model.pkl'", kind=CorruptFileError)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": {}}}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "s", shards=2)
    (path / INDEX).write_text(text)
    refused(path, str(path / INDEX), kind=CorruptFileError)


def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    path = make(tmp_path / "s", shards=2)
    change_index(path, INDEX, **{"a\x1b[2J": "model-00001-of-00002.safetensors"})
    refused(path, INDEX, kind=CorruptFileError)
    path = make(tmp_path / "t", "zip")
    for name in ("a\x1b[2J", 3):
        torch.save({name: torch.ones(1)}, path / "pytorch_model.bin")
        refused(path, "pytorch_model.bin", kind=CorruptFileError)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x02}q\0.", b"version https://git-lfs", bytes(99)])
def test_a_broken_weight_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = make(tmp_path / "s", "safetensors" if name == "model.safetensors" else "zip")
    (path / name).write_bytes(content)
    refused(path, str(path / name), kind=CorruptFileError)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_file_cut_short(tmp_path: Path, layout: str) -> None:
    path = make(tmp_path / "s", layout)
    weights = next(file for file in path.iterdir() if file.name != "config.json")
    size = weights.stat().st_size
    for length in (size - 1, size * 3 // 4, size // 2, 30):
        os.truncate(weights, length)
        refused(path, str(weights), kind=CorruptFileError)


def test_a_bin_that_holds_something_else(tmp_path: Path) -> None:
    path = make(tmp_path / "s", "zip")
    torch.save([torch.ones(1)], path / "pytorch_model.bin")
    refused(path, "pytorch_model.bin: holds a list", kind=CorruptFileError)
    torch.save({"a": torch.ones(2, 2).to_sparse()}, path / "pytorch_model.bin")
    refused(path, "pytorch_model.bin: a: unknown dtype", "sparse", kind=CorruptFileError)


def test_a_bin_with_packed_storages_is_not_taken_for_plain_numbers(tmp_path: Path) -> None:
    """torch.save never packs them; a mapped file would give the packed bytes as numbers."""
    path = make(tmp_path / "s", "zip")
    torch.save({"a": torch.zeros(4096), "b": torch.arange(4096.0)}, path / "plain")
    packed = zipfile.ZipFile(path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path / "plain") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    refused(path, "pytorch_model.bin", kind=CorruptFileError)


class Malicious:
    """Runs code when it is unpickled, if it is allowed to."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, layout: str) -> None:
    path, marker = make(tmp_path / "s", "zip"), tmp_path / "ran"
    state: Any = {"m.a.weight": torch.ones(1), "x": Malicious(marker)}
    if layout == "pickle":
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        LAYOUTS[layout](state, path / "pytorch_model.bin")
    refused(path, str(path / "pytorch_model.bin"), kind=CorruptFileError)
    assert not marker.exists()
    if layout != "pickle":
        torch.load(path / "pytorch_model.bin", weights_only=False)
        assert marker.exists(), "the attack does not work, so the test shows nothing"


QUANTIZED = {  # method -> a tensor that only a quantized model has
    "gptq": ("m.a.qweight", torch.zeros(4, 4, dtype=torch.int32)),
    "bitsandbytes": ("m.a.SCB", torch.zeros(4)),
    "bitsandbytes, 4 bits": ("m.a.weight", torch.zeros(16, 1, dtype=torch.uint8)),
    "fp8": ("m.a.weight", torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "compressed-tensors": ("m.a.weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
    "mxfp4": ("m.experts.down_proj_blocks", torch.zeros(4, 4, dtype=torch.uint8)),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_model_is_refused(tmp_path: Path, method: str) -> None:
    path = make(tmp_path / "s", config={"quantization_config": {"quant_method": method}})
    name, tensor = QUANTIZED[method]
    save_safetensors({**some_tensors(), name: tensor}, path / "model.safetensors")
    refused(path, "config.json", f"already quantized ({method})", kind=SourceError)
    (path / "model.safetensors").rename(path / "gptq_model-4bit.safetensors")
    refused(path, "config.json", f"already quantized ({method})", kind=SourceError)


def test_a_model_quantized_as_in_2023_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    (path / "quantization_config.json").write_text('{"load_in_8bit": true}')
    save_safetensors({"m.a.SCB": torch.zeros(4)}, path / "model.safetensors")
    refused(path, "already quantized", kind=SourceError)


@pytest.mark.parametrize(
    "quantization",
    [{}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_4bit": False, "load_in_8bit": False}, "awq"],
)
def test_what_is_left_of_a_quantization_after_a_merge_is_left_out(tmp_path: Path, quantization: Any) -> None:
    path = make(tmp_path / "s", config={"a": 1, "quantization_config": quantization})
    (path / "quantization_config.json").write_text("{}")
    source = open_source(path)
    assert source.config == {"a": 1}
    assert source.small_files == []
    (notice,) = source.notices
    method = " (bitsandbytes)" if "quant_method" in quantization else ""
    assert notice == (
        f"quantization_config{method} in config.json is left out: no tensor is quantized, as after a merge"
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345678\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", INDEX, "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s", "zip" if name.endswith(".bin") else "safetensors", 2 if name == INDEX else 1)
    (path / name).write_text(POINTER)
    refused(path, f"{path / name}: a pointer of git-lfs in place of the file; `git lfs pull` in {path}")


@pytest.mark.parametrize(
    "name", ["vocab.bpe", "merges.txt", "modeling_own.py", "chat_template.jinja", "1/model.safetensors"]
)
def test_a_pointer_in_place_of_what_something_reads_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s")
    (path / "1").mkdir()
    (path / "modules.json").write_text('[{"path": "1"}]')
    (path / name).write_text(POINTER)
    refused(path, f"{path / name}: a pointer of git-lfs")


def test_other_pointers_stay_behind_with_a_notice(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    names = ["figure.png", "paper.pdf", "1/plot.svg"]
    (path / "1").mkdir()
    (path / "modules.json").write_text('[{"path": "1"}]')
    for name in names:
        (path / name).write_text(POINTER)
    (path / "real.png").write_bytes(b"\x89PNG")
    assert [file.name for file in open_source(path).small_files] == ["modules.json", "real.png"]
    said = [f"{name} stays behind: a pointer of git-lfs in place of the file" for name in sorted(names)]
    assert sorted(left_behind(path)) == said


def test_an_adapter_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "alice/base"}')
    save_safetensors({"a": torch.zeros(4)}, path / "adapter_model.safetensors")
    refused(
        path, "adapter_config.json: an adapter and no model; merge it into its base, 'alice/base'", kind=SourceError
    )
    (path / "config.json").write_text("{}")
    refused(path, "adapter_config.json: an adapter and no model", kind=SourceError)
    make(path)
    source = open_source(path)
    assert set(source.tensors) == set(some_tensors())
    assert source.small_files == []
    (notice,) = source.notices
    assert notice.startswith("adapter_config.json, adapter_model.safetensors: an adapter, which stays behind")


# Links and special files.


def out_of_the_tree(file: Path) -> None:
    file.rename(file.parent.parent / "away")
    file.symlink_to(file.parent.parent / "away")


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors", INDEX, "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s", shards=2)
    (path / "tokenizer.json").write_text("{}")
    out_of_the_tree(path / name)
    refused(path, f"{path / name}: a link to {tmp_path / 'away'}", kind=SourceError)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_folder_linked_from_outside_is_not_copied_from(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (path / "additional_chat_templates").symlink_to(tmp_path / "private")
    refused(path, "additional_chat_templates/key", kind=SourceError)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("blobs", ["blobs", "other"])
def test_links_of_the_hub_cache_are_followed_into_its_blobs_only(tmp_path: Path, blobs: str) -> None:
    path = make(tmp_path / "models--x" / "snapshots" / "0123", shards=2)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "t.jinja").write_text("x")
    folder = tmp_path / "models--x" / blobs
    folder.mkdir()
    for number, file in enumerate(sorted(path.rglob("*.*"))):
        target = file.rename(folder / str(number))
        file.symlink_to(os.path.relpath(target, file.parent))
    if blobs == "other":
        refused(path, "config.json: a link to", kind=SourceError)
        return
    source = open_source(path)
    assert len(source.small_files) == 1
    for name, tensor in some_tensors().items():
        assert torch.equal(source.read(name), tensor)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", INDEX])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "s", "zip" if name == "pytorch_model.bin" else "safetensors", 2 if name == INDEX else 1)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    refused(path, f"{path / name}: not a regular file", kind=CorruptFileError)
