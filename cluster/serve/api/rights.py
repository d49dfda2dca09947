"""The rights of a person beside erasure, over HTTP: access, recipients, rectify, restrict and release.

    POST /rights/access      {"subject": "p001"}       what is held of them, as a file
    POST /rights/restrict    {"subject": "p001"}       stored and not served, until released
    POST /rights/drop/import  a ZIP                    California's DROP: its lists become requests
    POST /rights/drop/report  {"opted_out": false}     the responses that are due

People are named in bodies, never in addresses, which servers and proxies log. If the model has keys, its
log states the sha256 of what is handed out; `Log-Entry` names the entry. Restrictions are always stated,
at the latest by the next command that writes. A token for some shards sees only their records; a call
that changes the model needs a token for all shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from pydantic import Field

from cluster.render.rights import drop_shown, rectified, restricted
from cluster.serve.api.requests import NothingMore, RecordsNamed
from cluster.serve.domain import Service, TheService
from cluster.serve.engines import with_engines
from cluster.serve.tokens import MayAccess, MayDecide, MayRead, MaySubmit
from sisa.evidence.attestations import Right, log_hand_out
from sisa.flows.rights.access import as_file
from sisa.store.blobs.temporary_directories import temporary_directory

MAX_NEW_VERSIONS = 10_000

rights_router = APIRouter(prefix="/rights", tags=["rights"])


class Subject(NothingMore):
    """A person, as the subject of records."""

    subject: Annotated[str, Field(min_length=1)]


class Person(RecordsNamed):
    """A person, as the subject of records, or by the ids of records without a subject."""

    @property
    def names(self) -> list[str]:
        return self.ids or [str(self.subject)]


class Corrected(NothingMore):
    """New versions of held records, with the columns of the run file's first source."""

    records: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_NEW_VERSIONS)]


@rights_router.post("/access")
def hand_out_access(person: Person, service: TheService, caller: MayAccess) -> Response:
    """Return all that is held of a person, as a file (GDPR Art. 15 and 20)."""
    found = caller.view(service.model).access(person.ids, subject=person.subject)
    return handed(service, "access", found, person.names)


@rights_router.post("/recipients")
def hand_out_recipients(person: Person, service: TheService, caller: MayAccess) -> Response:
    """Return the exports that hold what a person's records touched (Art. 19)."""
    found = caller.view(service.model).recipients(person.ids, subject=person.subject)
    return handed(service, "recipients", found, person.names)


@rights_router.post("/rectify")
def rectify_records(given: Corrected, service: TheService, caller: MayDecide) -> dict[str, Any]:
    """Replace held records by new versions (Art. 16), and retrain what they touched."""
    with temporary_directory() as folder:
        file = folder / "records.jsonl"
        file.write_text("".join(f"{json.dumps(each)}\n" for each in given.records))
        return rectified(caller.view(service.model).rectify(file)).json


@rights_router.post("/restrict")
def restrict_subject(named: Subject, service: TheService, caller: MayDecide) -> dict[str, Any]:
    """Store a person's records and serve none of them, until released (Art. 18)."""
    model = caller.view(service.model)
    found = model.restrict(named.subject)
    return restricted(found, with_engines(model, model.recipients(subject=named.subject))).json


@rights_router.post("/release")
def release_subject(named: Subject, service: TheService, caller: MayDecide) -> dict[str, Any]:
    """End a restriction: the records are served as before it."""
    return restricted(caller.view(service.model).release(named.subject)).json


class Wanted(NothingMore):
    """Options of the responses to DROP."""

    opted_out: bool = False  # states that all consumers who share an identifier were opted out
    again: bool = False  # include what was reported before


@rights_router.post("/drop/import")
def import_drop(
    archive: Annotated[bytes, Body(media_type="application/octet-stream")],
    service: TheService,
    caller: MaySubmit,
) -> dict[str, Any]:
    """Import a download of California's DROP; submit a request for each consumer whom it matches."""
    with temporary_directory() as folder:
        file = folder / "download.zip"
        file.write_bytes(archive)
        return asdict(caller.view(service.model).drop_import(file, submitter=caller.name))


@rights_router.post("/drop/report")
def report_drop(asked: Wanted, service: TheService, caller: MayDecide) -> dict[str, Any]:
    """Return the responses to DROP that are due, by the names of the files to upload and to amend."""
    with temporary_directory() as folder:
        model = caller.view(service.model)
        done = model.drop_report(folder / "responses", opted_out=asked.opted_out, again=asked.again)
        texts = {each: Path(done.directory, each).read_text() for each in (*done.upload, *done.amend)}
    return {
        "upload": {each: texts[each] for each in done.upload},
        "amend": {Path(each).name: texts[each] for each in done.amend},
        "statuses": {str(status): count for status, count in done.statuses.items()},
        "open": done.open,
    }


@rights_router.get("/drop")
def show_drop(service: TheService, caller: MayRead) -> dict[str, Any]:
    """Return the state of DROP's 45-day cycle and its open work items, without ids of records."""
    return drop_shown(caller.view(service.model).drop_details()).json


def handed(service: Service, right: Right, found: dict[str, Any], names: Iterable[str]) -> Response:
    """Return what is held of a person as a file, and state in the log that it was handed out."""
    data = as_file(with_engines(service.model, found))
    done = log_hand_out(service.model, right, data, names)
    headers = {"Cache-Control": "no-store"}
    headers |= {} if done.entry is None else {"Log-Entry": str(done.entry)}
    return Response(data, media_type="application/json", headers=headers)
