"""A model of fakes whose deletions are certified: keys, log and tree of records are real."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementPb

from sisa.config.config import RunConfig
from sisa.core.events import Event, Notice
from sisa.core.requests import Request
from sisa.evidence.database import EvidenceTables, Logged
from sisa.evidence.hook import EvidenceHook
from sisa.evidence.keys.keys import Keys, create_keys
from sisa.evidence.log.log import Log
from sisa.evidence.log.published import check_log, log_reader
from sisa.flows.ingest import add, train
from sisa.flows.patches.on_deletion import PatchesHook
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.store.areas import LOG
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier.certificate import verify_chain
from sisa.verifier.envelope import PublicKeys
from tests.fakes.ports import FakeModel, changed, fake_model, fake_recipe, fake_record

NAME = "0f" * 16
BASE = "ba" * 32
SCHEMA = json.loads((resources.files("sisa.evidence") / "schemas/statements.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def check_statement(stated: dict[str, Any]) -> None:
    """Check a statement by our schema and by in-toto's types."""
    VALIDATOR.validate(stated)
    Statement.copy_from_pb(ParseDict(stated, StatementPb())).validate()


def statements_of(log: Path, keys: PublicKeys) -> list[dict[str, Any]]:
    """Return the statements of a log, checked as an outsider does who has the keys."""
    read = log_reader(str(log))
    _, entries = check_log(read, keys.log)
    found = [each for _, each in verify_chain(entries, read, keys)]
    for each in found:
        check_statement(each)
    return found


@dataclass
class Certified:
    """The model, its hook, and what it reported."""

    fake: FakeModel
    hook: EvidenceHook
    keys: Keys
    notices: list[str]

    @property
    def log(self) -> Log:
        return Log(self.fake.context.stores.blobs[LOG], self.keys)

    @property
    def evidence(self) -> EvidenceTables:
        return self.hook.tables

    @property
    def logged(self) -> list[Logged]:
        return self.evidence.logged(self.log)

    def forget(self, *numbers: int, defer: bool = False, **terms: Any) -> Request:
        return self.fake.forget(*numbers, defer=defer, **terms)

    def add(self, *numbers: int, again: bool = False) -> None:
        add(self.fake.context, [fake_record(each) for each in numbers], allow_deleted=again)


def certified(directory: Path, numbers: int = 12, num_shards: int = 3, **options: Any) -> Certified:
    """Return a trained model with keys."""
    settings = {"datasets": [{"path": "rows.jsonl"}], "output_dir": "model"}
    config = RunConfig.model_validate({**settings, "signing": {"keys": str(directory / "keys")}})
    keys = create_keys(evidence_keys_dir(config, NAME), NAME)
    fake = fake_model(num_shards, replace(fake_recipe(), base=BASE), **options)
    hook, notices = EvidenceHook(directory, config, NAME), list[str]()

    def report(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    fake.context = changed(
        fake.context,
        hooks=(hook, PatchesHook()),
        blobs={LOG: LocalBlobs(directory / LOG)},
        report=report,
    )
    train(fake.context, [fake_record(each) for each in range(numbers)])
    return Certified(fake, hook, keys, notices)
