"""Every family of `docs/architectures.md`, converted, loaded and tried; see `conformance.py`."""

import importlib.util
from pathlib import Path

import pytest

from llmint8 import converter
from llmint8.formats import SourceError

_spec = importlib.util.spec_from_file_location("conformance", Path(__file__).with_name("conformance.py"))
assert _spec is not None
assert _spec.loader is not None
conformance = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conformance)


@pytest.mark.parametrize("name", conformance.families.FAMILIES)
def test_a_family_conforms(name: str, tmp_path: Path) -> None:
    result = conformance.conform(name, tmp_path)
    print(result)
    assert not result.failed


@pytest.mark.parametrize("name", conformance.families.REFUSED)
def test_what_has_no_layers_is_refused(name: str, tmp_path: Path) -> None:
    conformance.architectures.save(conformance.architectures.tiny_model(name), tmp_path / "source")
    with pytest.raises(SourceError, match="no linear layer is left to quantize"):
        converter.convert(tmp_path / "source", tmp_path / "out")
