"""The whole table of architectures: calibrated layers, and the error beside that of bitsandbytes on the same model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmint8 import converter, runtime

_TABLE = Path(__file__).parents[1] / "tests" / "architectures.py"
_spec = importlib.util.spec_from_file_location("architectures", _TABLE)
assert _spec is not None
assert _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

# Layers that no text, image or sound reaches by itself: for entities, other languages, or a method of its own.
UNREACHED = {"xmod": 4, "luke": 6, "esm": 1, "flava": 15}
# None of whose layers are plain linear ones.
WITHOUT_LAYERS = {"falcon", "ibert"}
# Where tokens choose experts, or few numbers come out, the error of one model is a matter of luck by a half.
BY_LUCK = {"nemotron-h", "flex-olmo"} | {n for n, row in architectures.TABLE.items() if "Classification" in row[0]}


def error(model: Any, expected: torch.Tensor) -> float:
    return float((architectures.outputs(model) - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", sorted(architectures.TABLE.keys() - WITHOUT_LAYERS))
def test_an_architecture_is_calibrated_whole_and_no_worse_than_with_bitsandbytes(name: str, tmp_path: Path) -> None:
    model = architectures.tiny_model(name)
    architectures.save(model, tmp_path / "source")
    cls = type(model)
    expected = architectures.outputs(cls.from_pretrained(tmp_path / "source", dtype=torch.float32).eval())
    report = converter.convert(tmp_path / "source", tmp_path / "out", jobs=1)
    assert len(report.uncalibrated) == UNREACHED.get(name, 0), report.uncalibrated
    ours = error(runtime.load(tmp_path / "out", dtype=torch.float32), expected)
    theirs = _bitsandbytes(cls, tmp_path, expected)
    used = sum("own code" in reason for reason in report.kept.values())
    print(
        f"{name}: {report.layers - len(report.uncalibrated)} of {report.layers} layers calibrated, {used} kept for the "
        f"model's code, error {ours:.4f}" + ("" if theirs is None else f", bitsandbytes {theirs:.4f}")
    )
    assert ours < 0.15
    assert theirs is None or ours <= (1.6 if name in BY_LUCK else 1.1) * theirs


def _bitsandbytes(cls: Any, path: Path, expected: torch.Tensor) -> float | None:
    """Return the error of LLM.int8() with the same layers, or None where bitsandbytes does not run the model."""
    pytest.importorskip("bitsandbytes")
    kept = transformers.AutoConfig.from_pretrained(path / "out").quantization_config["llm_int8_skip_modules"]
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=kept)
    try:
        model = cls.from_pretrained(path / "source", dtype=torch.float32, quantization_config=settings)
        return error(model.eval(), expected)
    except Exception as reason:  # whatever the model's code and bitsandbytes raise together
        print(f"{path.name}: bitsandbytes: {type(reason).__name__}")
        return None
