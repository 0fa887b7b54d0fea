"""`docs/architectures.md` against the table it is written from; `soak/test_conformance.py` tries the families."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*", DOCUMENT, re.MULTILINE)]
ROWS = {cells[0]: cells for cells in CELLS}
pytestmark = pytest.mark.usefixtures("quiet_transformers")


def test_the_document_has_the_families_of_the_table(conformance: Any) -> None:
    families = conformance.families
    assert len(families.FAMILIES) >= 60
    assert families.FAMILIES.keys() | families.REFUSED.keys() <= conformance.architectures.TABLE.keys()
    assert list(ROWS)[2:] == list(families.FAMILIES)
    for name, special in families.FAMILIES.items():
        assert ROWS[name][1:3] == [special, f"`{conformance.architectures.TABLE[name][0]}`"]
    assert all(f"- {name}: {why}" in DOCUMENT for name, why in families.REFUSED.items())


def test_every_place_that_is_not_plain_has_its_note(conformance: Any) -> None:
    named = re.findall(r"\((\d+)\)", "".join(cell for row in list(ROWS.values())[2:] for cell in row[6:]))
    noted = re.findall(r"^(\d+)\. (\S+), (.*?): (.*)$", DOCUMENT, re.MULTILINE)
    lucky = [number for number, name, what, _ in noted if what == "bound" and name in conformance.families.LUCK]
    assert sorted([*named, *lucky], key=int) == [number for number, *_ in noted]
    assert not any(why.startswith("**") for *_, why in noted)  # what the int8 model alone does not do


def test_a_family_conforms(conformance: Any, tmp_path: Path) -> None:
    result = conformance.conform("gpt2", tmp_path)
    assert result.failed == ()
    assert result.checks == dict.fromkeys(conformance.CHECKS, "yes")
