"""Fixtures that more than one test file uses."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


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
def fake_hub() -> ModuleType:
    """The module `fake_hub.py`. The tests are no package and their folder is not on sys.path, so it is not imported."""
    spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
