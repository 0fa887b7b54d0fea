"""`--calibration DIR`: images and sounds go through the source's processor and are shown to the model."""

import importlib.util
import json
import math
import sys
import wave
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from llmint8 import converter, formats
from llmint8.converter.calibration import processor
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.model.inputs import Given, runs
from llmint8.converter.planning import samples

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def vit(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(config).half().save_pretrained(path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def whisper(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,  # one second
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    transformers.WhisperForConditionalGeneration(config).half().save_pretrained(path)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(path)
    return path


def wav2vec2(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **TINY, vocab_size=32, conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2
    )
    transformers.Wav2Vec2ForCTC(config).half().save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(path)
    return path


def clip(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TINY, "vocab_size": 96, "max_position_embeddings": 32},
        vision_config={**TINY, "image_size": 16, "patch_size": 8},
        projection_dim=32,
    )
    transformers.CLIPModel(config).half().save_pretrained(path)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(path)
    return path


def llama(path: Path) -> Path:
    config = transformers.LlamaConfig(**TINY, vocab_size=96)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    return path


def images(path: Path, count: int = 3) -> Path:
    path.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02}.png")
    return path


def wav(path: Path, values: Any, rate: int = 16_000, width: int = 2, channels: int = 1) -> None:
    """Write integers, a row for each point in time, as they are; one byte has no sign."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        low = 128 if width == 1 else 0
        file.writeframes(b"".join(int(v + low).to_bytes(width, "little", signed=width > 1) for v in np.ravel(values)))


def sounds(path: Path, seconds: tuple[float, ...] = (0.5, 1.0)) -> Path:
    path.mkdir()
    for i, length in enumerate(seconds):
        noise = np.random.default_rng(i).normal(size=int(16_000 * length)) * 3000
        wav(path / f"{i}.wav", noise.clip(-32768, 32767).astype(int))
    return path


def calibration_of(out: Path) -> dict[str, Any]:
    found: Any = formats.open_checkpoint(out).quantization.calibration
    return dict(found)


def test_images_go_through_the_processor_and_are_what_the_layers_see(tmp_path: Path) -> None:
    source, photos = vit(tmp_path / "source"), images(tmp_path / "photos")
    arguments = [str(source), str(tmp_path / "out"), "--calibration", str(photos)]
    result = CliRunner().invoke(convert_command, arguments)
    assert result.exit_code == 0, result.output
    assert "made-up" not in result.stderr
    assert "not used" not in result.stderr
    calibration = calibration_of(tmp_path / "out")
    digest = samples.Samples(photos, {"image": sorted(photos.iterdir())}, 0, []).sha256
    assert calibration == {
        "text": "3 images of photos",
        "text_sha256": None,
        "tokens": 0,
        "inputs": ["3 images of photos"],
        "files": 3,
        "files_sha256": digest,
        "layers": 12,
    }
    assert "| Calibration | 3 images of photos |" in (tmp_path / "out" / "README.md").read_text()

    model = transformers.ViTForImageClassification.from_pretrained(source, dtype=torch.float32).eval()
    pictures = [Image.open(file).convert("RGB") for file in sorted(photos.iterdir())]
    pixels = transformers.ViTImageProcessorPil.from_pretrained(source)(images=pictures, return_tensors="pt")
    seen: list[torch.Tensor] = []
    layer = next(module for name, module in model.named_modules() if name.endswith("0.mlp.fc1"))
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**pixels)
    measured = formats.read_manifest(tmp_path / "out").modules["vit.encoder.layer.0.intermediate.dense"]
    rows = seen[0].flatten(0, 1)
    assert measured["tokens"] == len(rows)
    largest = rows.abs().amax(0).sort(descending=True).values[: len(measured["absmax"])]
    # Stored with four digits; the sums of float32 come in another order.
    assert measured["absmax"] == pytest.approx(largest.tolist(), rel=1e-3)


def test_sounds_are_shown_to_an_encoder_and_text_to_its_decoder(tmp_path: Path) -> None:
    source, calls = whisper(tmp_path / "source"), sounds(tmp_path / "calls")
    report = converter.convert(source, tmp_path / "out", calibration=calls)
    assert not report.uncalibrated
    assert not any("made-up" in notice for notice in report.notices)
    calibration = calibration_of(tmp_path / "out")
    assert (calibration["text"], calibration["inputs"]) == ("random ids", ["2 sounds of calls"])
    assert (calibration["files"], calibration["layers"]) == (2, report.layers)
    modules = formats.read_manifest(tmp_path / "out").modules
    assert modules["model.encoder.layers.0.fc1"]["tokens"] == 2 * 50
    assert calibration["tokens"] == modules["model.decoder.layers.0.fc1"]["tokens"] == 2 * 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Calibration | 128 tokens: `random ids`, and 2 sounds of calls |" in card


def test_sounds_of_several_lengths_are_padded_to_one(tmp_path: Path) -> None:
    source, calls = wav2vec2(tmp_path / "source"), sounds(tmp_path / "calls", (0.5, 0.25))
    report = converter.convert(source, tmp_path / "out", calibration=calls)
    assert not report.uncalibrated
    assert calibration_of(tmp_path / "out")["text"] == "2 sounds of calls"
    rows = formats.read_manifest(tmp_path / "out").modules["wav2vec2.feature_projection.projection"]["tokens"]
    assert rows == 2 * 24  # of half a second, at 20 ms each and 25 ms wide


def test_of_two_towers_one_sees_the_images_and_the_other_the_text(tmp_path: Path) -> None:
    source, photos = clip(tmp_path / "source"), images(tmp_path / "photos")
    report = converter.convert(source, tmp_path / "out", calibration=photos)
    assert not report.uncalibrated
    assert not any("made-up" in notice or "ended early" in notice for notice in report.notices)
    calibration = calibration_of(tmp_path / "out")
    assert set(calibration["inputs"]) == {"text", "3 images of photos"}
    assert calibration["files"] == 3
    modules = formats.read_manifest(tmp_path / "out").modules
    assert modules["vision_model.encoder.layers.0.mlp.fc1"]["tokens"] == 3 * 5
    assert modules["text_model.encoder.layers.0.mlp.fc1"]["tokens"] == 512


def test_what_reaches_no_layer_is_said(tmp_path: Path) -> None:
    """A processor of other pictures than the model takes."""
    source, photos = vit(tmp_path / "source"), images(tmp_path / "photos")
    transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(source)
    report = converter.convert(source, tmp_path / "out", calibration=photos)
    assert "nothing could be measured: without calibration no outlier columns are stored" in report.notices
    assert any("ended early (3 images of photos: ValueError" in notice for notice in report.notices)


def test_as_many_rows_of_text_as_there_are_sounds(tmp_path: Path) -> None:
    whisper(tmp_path)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    for tokens, rows in (((1, 10), (4, 2)), ((1, 3), (4, 1)), ((6, 5), (4, 5))):
        given = {"input_features": Given("4 sounds", 4, {"input_features": torch.zeros(4, 8, 100)})}
        shown = next(runs(model, torch.zeros(tokens, dtype=torch.int64), given))
        assert shown.what == "4 sounds"
        assert shown.arguments["decoder_input_ids"].shape == rows


def empty(path: Path) -> None:
    path.mkdir()
    (path / ".DS_Store").touch()


def a_note(path: Path) -> None:
    images(path)
    (path / "labels.csv").touch()


def a_folder(path: Path) -> None:
    images(path)
    (path / "more.png").mkdir()


def no_picture(path: Path) -> None:
    path.mkdir()
    (path / "a.png").write_text("no picture")


def no_sound(path: Path) -> None:
    path.mkdir()
    (path / "a.wav").write_bytes(b"RIFF")


def a_link_to_nothing(path: Path) -> None:
    path.mkdir()
    (path / "a.png").symlink_to("nowhere.png")


def sixteen_bits(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(path / "a.png")


def postscript(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(path / "a.png", format="EPS")


def an_mp3(path: Path) -> None:
    path.mkdir()
    (path / "a.mp3").touch()


def nothing_to_hear(path: Path) -> None:
    path.mkdir()
    wav(path / "a.wav", [])


def a_text(path: Path) -> None:
    path.write_text("a text")


@pytest.mark.parametrize(
    ("model", "make", "words"),
    [
        (vit, empty, "given: is empty; name a directory of images or sounds with --calibration"),
        (vit, a_note, "given/labels.csv: is neither an image (.bmp, "),
        (vit, a_folder, "given/more.png: is not a file"),
        (vit, a_link_to_nothing, "given/a.png: is not a file"),
        (vit, sixteen_bits, "given/a.png: has more than 8 bits for a color; save it with 8"),
        (vit, postscript, "given/a.png: is no image that Pillow can read: UnidentifiedImageError"),
        (vit, no_picture, "given/a.png: is no image that Pillow can read: UnidentifiedImageError"),
        (vit, sounds, "given/0.wav: a vit model does not take sounds; name a directory of images"),
        (whisper, images, "given/00.png: a whisper model does not take images; name a directory of sounds"),
        (llama, images, "given/00.png: a llama model does not take images; name a text"),
        (vit, a_text, "given: a vit model does not take text; name a directory of images with --calibration"),
        (whisper, no_sound, "given/a.wav: reading it needs the package soundfile (not a .wav file of PCM: EOFError): "),
        (whisper, an_mp3, "given/a.mp3: reading it needs the package soundfile (not a .wav file of PCM): pip install"),
        (whisper, nothing_to_hear, "given/a.wav: holds no sound"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, make: Any, words: str
) -> None:
    hide(monkeypatch, "soundfile")
    source = model(tmp_path / "source")
    make(tmp_path / "given")
    refused(source, tmp_path, words)


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str) -> object | None:
        return None if name == package else real(name)

    monkeypatch.setattr(processor.importlib.util, "find_spec", find_spec)


def refused(source: Path, tmp_path: Path, words: str, *options: str) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--calibration", str(tmp_path / "given"), *options]
    result = CliRunner().invoke(convert_command, arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 20_000, "width": 20_000}}, "preprocessor_config.json: size is 20000, at most 4096 are"),
        ({"crop_size": 5000}, "preprocessor_config.json: crop_size is 5000"),
        ({"image_processor": {"size": {"shortest_edge": 9999}}}, "preprocessor_config.json: size is 9999"),
        (
            {"auto_map": {"AutoImageProcessor": "evil/repo--code.Own"}},
            "auto_map['AutoImageProcessor'] is 'evil/repo--c",
        ),
        ([1], "preprocessor_config.json: holds a list, expected a JSON object"),
    ],
    ids=["size", "crop_size", "nested", "code elsewhere", "no object"],
)
def test_a_hostile_processor_is_refused_before_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    source = vit(tmp_path / "source")
    file = source / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change if isinstance(change, dict) else change))
    images(tmp_path / "given")
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", None)
    refused(source, tmp_path, words, "--trust-remote-code")


def test_a_bound_of_pixels_is_no_size() -> None:
    config = {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}
    processor._check_processor(Path("preprocessor_config.json"), config, False)


def test_a_photo_is_decoded_no_larger_than_processors_want_it(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 3000, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert processor._image(tmp_path / "a.png", "RGB").size == (1024, 10)


def test_a_directory_whose_name_is_no_utf8_is_recorded(tmp_path: Path) -> None:
    source, given = vit(tmp_path / "source"), tmp_path / "ph\udcffotos"
    try:
        images(given)
    except OSError:
        pytest.skip("this file system takes no such name")
    converter.convert(source, tmp_path / "out", calibration=given)
    calibration = formats.open_checkpoint(tmp_path / "out").quantization.calibration
    assert calibration is not None
    assert "ph?otos" in str(calibration)


def test_a_source_without_a_processor_is_refused(tmp_path: Path) -> None:
    source = vit(tmp_path / "source")
    images(tmp_path / "given")
    (source / "preprocessor_config.json").unlink()
    refused(source, tmp_path, "no processor of images (preprocessor_config.json or processor_config.json) beside the")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Sam2ImageProcessor", "it needs a library that is missing: pip install torchvision"),
        ("NobodysImageProcessor", "source: its processor of images cannot be loaded ("),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_told_with_the_reason(tmp_path: Path, kind: str, words: str) -> None:
    source = vit(tmp_path / "source")
    images(tmp_path / "given")
    config = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(config | {"image_processor_type": kind}))
    if importlib_has("torchvision"):
        pytest.skip("torchvision is here")
    refused(source, tmp_path, words)


def importlib_has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def test_without_pillow_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "PIL")
    source = vit(tmp_path / "source")
    images(tmp_path / "given")
    refused(source, tmp_path, "reading images needs the package Pillow: pip install pillow")


def test_a_plan_refuses_what_cannot_be_shown(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    images(tmp_path / "given")
    arguments = [str(source), str(tmp_path / "out"), "--calibration", str(tmp_path / "given"), "--dry-run"]
    result = CliRunner().invoke(convert_command, arguments)
    assert result.exit_code != 0
    assert "a llama model does not take images; name a text" in result.stderr


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_any_width_are_read_to_the_bit(tmp_path: Path, width: int) -> None:
    half = 2 ** (8 * width - 1)
    values = np.array([[0, 1], [-1, half - 1], [-half, half // 2]])
    wav(tmp_path / "a.wav", values, width=width, channels=2)
    found, rate = processor._samples(tmp_path / "a.wav", 30)
    assert rate == 16_000
    assert torch.equal(found, torch.tensor(values / half, dtype=torch.float64))


def test_of_a_long_sound_the_beginning_is_taken_and_of_one_cut_off_what_is_there(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", list(range(3 * 8_000)), rate=8_000)
    assert len(processor._samples(tmp_path / "a.wav", 2)[0]) == 2 * 8_000
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: -8_000 * 2 - 1])
    assert len(processor._samples(tmp_path / "a.wav", 30)[0]) == 2 * 8_000 - 1


@pytest.mark.parametrize(("own", "wanted"), [(8_000, 16_000), (44_100, 16_000), (22_050, 48_000)])
def test_another_sampling_rate_is_brought_to_that_of_the_processor(tmp_path: Path, own: int, wanted: int) -> None:
    """A tone of 100 Hz, in both channels, stays one; what the lower rate cannot hold is gone."""
    time = np.arange(own) / own
    tone = np.sin(2 * math.pi * 100 * time)
    too_high = np.sin(2 * math.pi * (own / 2 - 500) * time) if own > 2 * wanted else 0 * time
    wav(tmp_path / "a.wav", np.stack([16_000 * (tone + too_high)] * 2, 1).astype(int), rate=own, channels=2)
    sound = processor._sound(tmp_path / "a.wav", wanted, 30)
    assert sound.dtype == torch.float32
    expected = torch.sin(2 * math.pi * 100 * torch.arange(wanted) / wanted) * 16_000 / 32_768
    assert len(sound) == wanted
    assert float((sound - expected).abs().max()) < 1e-4  # integers of 16 bits: half a step is 1.5e-5, cut off is one


def test_what_is_not_pcm_is_read_by_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SoundFile:
        samplerate = 8_000

        def __init__(self, file: Path) -> None:
            self.name = file.name

        def __enter__(self) -> "SoundFile":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self, frames: int, dtype: str, always_2d: bool) -> Any:
            if self.name == "bad.flac":
                raise RuntimeError("Format not recognised.")
            assert (frames, dtype, always_2d) == (2 * 8_000, "float64", True)
            return np.full((8_000, 2), 0.5)

    module = ModuleType("soundfile")
    module.SoundFile = SoundFile  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "soundfile", module)
    sound = processor._sound(tmp_path / "a.flac", 16_000, 2)
    assert torch.allclose(sound, torch.full((16_000,), 0.5))
    with pytest.raises(formats.SourceError, match=r"bad.flac: is no sound that soundfile can read: .*recognised"):
        processor._sound(tmp_path / "bad.flac", 16_000, 2)


def test_of_more_files_than_fit_some_of_all_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, photos = vit(tmp_path / "source"), images(tmp_path / "photos", 7)
    rows = samples.rows_of_one(transformers.AutoConfig.from_pretrained(source))
    assert rows == 5  # a patch of 8 of 16 pixels four times, and the class token
    monkeypatch.setattr(samples, "_MOST_ROWS", 3 * rows)
    plan = converter.make_plan(converter.Resolved(source), tmp_path / "out", converter.Options(calibration=str(photos)))
    assert plan.samples is not None
    assert [file.name for file in plan.samples.all_files] == ["00.png", "02.png", "04.png"]
    assert plan.samples.rows == 3 * rows
    assert any(f"3 of the 7 images in {photos} are shown" in notice for notice in plan.selection.notices)


def test_a_conversion_goes_on_with_the_same_files_only(tmp_path: Path) -> None:
    source, photos = vit(tmp_path / "source"), images(tmp_path / "photos")
    converter.convert(source, tmp_path / "whole", calibration=photos)

    class StoppedError(Exception):
        pass

    def stop(name: str, nbytes: int) -> None:
        if "layer" in name:
            raise StoppedError

    with pytest.raises(StoppedError):
        converter.convert(source, tmp_path / "out", calibration=photos, progress=stop)
    with pytest.raises(formats.OutputError, match=r"the calibration was \w+ and is the packaged text"):
        converter.convert(source, tmp_path / "out")
    (photos / "01.png").rename(tmp_path / "01.png")
    with pytest.raises(formats.OutputError, match=r"the calibration was \w+ and is \w+"):
        converter.convert(source, tmp_path / "out", calibration=photos)
    (tmp_path / "01.png").rename(photos / "01.png")
    converter.convert(source, tmp_path / "out", calibration=photos)
    assert converter.convert(source, tmp_path / "out", calibration=photos).already
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    with pytest.raises(formats.OutputError, match=r"--calibration was \w+ and is the packaged text"):
        converter.convert(source, tmp_path / "out")


def test_files_that_are_not_used_are_said(tmp_path: Path) -> None:
    source, photos = vit(tmp_path / "source"), images(tmp_path / "photos")
    report = converter.convert(source, tmp_path / "out", calibration=photos, outliers="none")
    assert "nothing was shown to the model: photos was not used" in report.notices
