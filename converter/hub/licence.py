"""Which licences keep an int8 copy from being published, as far as a model card and a licence file say so.

The list is short and explicit: what is not on it is not judged. A copy in int8 is an adaptation and its upload is a
distribution, so a licence that forbids either is on it, and one that ties them to files which are not there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .front_matter import strings


def _in_any_case(*words: str) -> tuple[str, ...]:
    """Return patterns of file names that begin with a word, however it is written."""
    letters = [[f"[{char.upper()}{char}]" if char.isalpha() else char for char in word] for word in words]
    return tuple("".join(word) + "*" for word in letters)


# What is fetched of a repo is what is looked at.
LICENCE_FILES = _in_any_case("license", "licence", "copying")
NOTICE_FILES = _in_any_case("notice")
POLICY_FILES = _in_any_case("use_policy")
_FORBIDDING = {
    r"cc-by(-nc)?-nd(-[\d.]+)?": "it allows no adaptations (ND), and a copy in int8 is one",
    r"llama-?1|llama-non-?commercial|llama-license-agreement": "the first LLaMA's licence allows no redistribution",
    r".*\bno-(re)?distribution\b.*": "it allows no redistribution",
    r".*\bno-derivatives?\b.*": "it allows no adaptations, and a copy in int8 is one",
    r"proprietary|all-rights-reserved": "it grants no right to redistribute",
}
_OPT = re.compile(r"opt[- ]?175b|facebook/opt", re.IGNORECASE)
_MAX_LICENCE_BYTES = 1 << 20


def objection(card: Mapping[str, Any], directory: Path) -> str | None:
    """Say why a checkpoint must not be published, None where nothing is known against it.

    Args:
        card: the front matter of its model card, or of its source's.
        directory: where its licence files are.

    """
    names = [_slug(value) for key in ("license", "license_name") for value in strings(card.get(key))]
    for name in names:
        for pattern, reason in _FORBIDDING.items():
            if re.fullmatch(pattern, name):
                return f"the licence is {name!r}: {reason}"
    licences = _files(directory, LICENCE_FILES)
    # A licence that is named says more than what the model was made of.
    bases = strings(card.get("base_model")) if not names or "other" in names else []
    stated = " ".join([*names, *bases])
    opt = _OPT.search(stated) or any("OPT-175B LICENSE" in _read(file).upper() for file in licences)
    if opt and not (licences and _files(directory, NOTICE_FILES)):
        return (
            "the licence is OPT-175B's: a copy needs the licence (LICENSE.md) and its notice (NOTICE: OPT-175B is "
            "licensed under the OPT-175B license, Copyright (c) Meta Platforms, Inc. All Rights Reserved.) beside it"
        )
    return None


def _slug(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _files(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in directory.glob(pattern) if file.is_file())


def _read(file: Path) -> str:
    return file.read_bytes()[:_MAX_LICENCE_BYTES].decode(errors="replace")
