"""A model that its operator holds with its keys, for the tests of attacks and of audits.

The model is real but for its trainer; keys, log, tree of records, ledger and witness are real.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sisa.evidence.audit import Audit, audit_model
from sisa.evidence.keys.keys import Keys
from sisa.evidence.keys.model_keys import keys_of, start_evidence
from sisa.evidence.log.tiles import CHECKPOINT
from sisa.evidence.open_evidence import issue
from sisa.flows.context.slices import held_rows
from sisa.model import Model
from sisa.store.areas import LOG
from tests.models.confessing import build, open_fake, record, use_fake_resources

STATE_HOME = "XDG_STATE_HOME"


@dataclass
class Operator:
    """A model that its operator holds with its keys."""

    directory: Path

    @property
    def model(self) -> Model:
        return Model(self.directory, executor=open_fake)

    @property
    def keys(self) -> Keys:
        return keys_of(self.model)

    @property
    def log(self) -> Path:
        return self.directory / LOG

    def forget(self, *numbers: int) -> str:
        """Delete records; return the request's id."""
        done = self.model.forget([record(each).id for each in numbers])
        assert done.request is not None
        return done.request.request_id

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of the held records."""
        known = {record(number).id: number for number in range(40)}
        with self.model.context() as context:
            digests = {context.settings.assigner.id_digest(each): known[each] for each in known}
            return sorted(digests[each.id_digest] for each in held_rows(context, digests))

    def keep(self) -> bytes:
        """Return the checkpoint that is published now, for an outsider to keep."""
        return (self.log / CHECKPOINT).read_bytes()

    def audit(self, *kept: bytes, sample: int = 0) -> Audit:
        return audit_model(self.model, sample, "a seed", kept=kept)

    def failed(self, *kept: bytes, sample: int = 0) -> set[str]:
        """Return the checks of an audit that failed."""
        return {each.name for each in self.audit(*kept, sample=sample).checks if each.findings}


@pytest.fixture(scope="module")
def _certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certified model of 24 records, of which one was deleted, and its keys."""
    folder = tmp_path_factory.mktemp("operator")
    with pytest.MonkeyPatch.context() as patch:
        use_fake_resources(patch)
        patch.setenv(STATE_HOME, str(folder / "state"))
        build(folder / "model")
        operator = Operator(folder / "model")
        start_evidence(operator.model)
        certify(operator)
        operator.forget(3)
    return folder


@pytest.fixture
def operator(_certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """Return a copy of the model for one test to attack."""
    use_fake_resources(monkeypatch)
    shutil.copytree(_certified / "model", tmp_path / "model")
    shutil.copytree(_certified / "state", os.environ[STATE_HOME], dirs_exist_ok=True)
    return Operator(tmp_path / "model")


def certify(operator: Operator) -> None:
    """Sign and log the present state, whatever it is."""
    assert issue(operator.model)
