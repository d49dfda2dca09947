"""One tiny base and one trained model a session; each test gets its own copy of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.tiny_model import Tiny, train_scratch
from tests.tiny_base import make_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of all models of a session."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    from sisa.samples import make_people

    folder = tmp_path_factory.mktemp("template")
    train_scratch(folder, tiny_base, make_people(12, 2))
    return folder


@pytest.fixture
def tiny(_template: Path, tiny_base: Path, tmp_path: Path) -> Tiny:
    """A model of 12 people with 2 records each, in 3 shards of 2 slices, to be used up."""
    folder = tmp_path / "tiny"
    shutil.copytree(_template, folder)
    copy = Tiny(folder, tiny_base)
    copy.train()  # notes the new place
    return copy
