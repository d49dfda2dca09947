"""One data broker's two cycles with California's DROP, by commands, over a real model."""

from __future__ import annotations

import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sisa.data.identifiers import hashes
from tests.models.tiny_model import (
    PEOPLE,
    Done,
    Tiny,
    all_files,
    change_run,
    command,
    held_files,
    residue,
    train_scratch,
    write_rows,
)

pytestmark = pytest.mark.torch

DAY = datetime.now(UTC)
COLUMNS = {"email": "mail", "first_name": "given", "last_name": "family", "vin": "car"}


def row(person: str) -> dict[str, str]:
    number = int(person[1:])
    car = f"1HGCM82633A{number:06d}"
    return {"mail": f"{person}@example.org", "given": "Zoë", "family": f"Quill-{person}", "car": car}


def identifier(person: str, kind: str) -> str:
    named = {key: row(person)[column] for key, column in COLUMNS.items()}
    return dict(hashes(named))[kind]


def zipped(path: Path, days: int, **lists: str) -> Path:
    """Write a download; each list's rows are given without their header."""
    day = f"{DAY + timedelta(days):%Y%m%d}"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, rows in lists.items():
            header = "ID,Hash,ListType\n" if kind == "Removed" else "ID,Hash\n"
            archive.writestr(f"{day}_4821_{kind}.csv", header + rows)
    return path


def test_two_cycles(tiny: Tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def sisa(*arguments: object) -> Done:
        return command(capsys, *arguments)

    model, before = ("-m", tiny.directory), held_files(tiny.directory)
    rows = [{**each, **row(each["subject_id"])} for each in PEOPLE]
    write_rows(tiny.folder / "people.jsonl", rows)
    (tiny.folder / "shared.key").chmod(0o600)
    change_run(tiny.run_file, identifiers=COLUMNS)
    assert sisa("train", tiny.run_file, "--executor", "serial").json["slices_trained"] == 0
    assert held_files(tiny.directory) == before

    listed = "".join(
        f"{person}MailItem,{identifier(person, 'Email')}\n" for person in ("p004", "p003", "p099")
    )
    cars = f"p004CarItem1,{identifier('p004', 'NameVIN')}\n"
    files = all_files(tiny.directory)
    broken = zipped(tmp_path / "broken.zip", 0, Email=listed + "p001MailItem,aGFzaA==\n", NameVIN=cars)
    refused = sisa("drop", "import", *model, broken)
    assert refused.code == 2
    assert refused.problems == [
        (
            f"{DAY:%Y%m%d}_4821_Email.csv, line 5",
            "Hash: expected 44 characters of base64, a SHA-256; got 8 characters",
        )
    ]
    assert all_files(tiny.directory) == files

    first = zipped(tmp_path / "first.zip", 0, Email=listed, NameVIN=cars)
    done = sisa("drop", "import", *model, first).json
    assert (done["new"], done["matched"], done["not_found"]) == (4, 3, 1)
    assert len(done["requests"]) == 2
    assert sisa("drop", "import", *model, first).json["new"] == 0
    sisa("request", "approve", *model, "DROP-p004CarItem1", "--approver", "dpo")
    assert len(sisa("run", *model, "--executor", "serial").json["requests"]) == 1
    cycle = sisa("request", "list", *model).json["drop"]
    days_left = 45 - (datetime.now(UTC).date() - DAY.date()).days  # 44 if midnight has passed
    assert (cycle["open"], cycle["overdue"], cycle["days_left"]) == (4, 0, days_left)
    waiting = sisa("drop", "status", *model, "--show-ids").json["matched"]
    assert [(each["item"], each["ids"]) for each in waiting] == [
        ("p003MailItem", ["p003-q1", "p003-q2"])
    ]
    responses = tmp_path / "responses"
    report = sisa("drop", "report", *model, "-o", responses).json
    assert report["statuses"] == {"3": 2, "5": 1}
    assert (responses / f"{DAY:%Y%m%d}_4821_Email.csv").read_text() == (
        "Id,Status\np004MailItem,3\np099MailItem,5\n"
    )
    assert (responses / f"{DAY:%Y%m%d}_4821_NameVIN.csv").read_text() == "Id,Status\np004CarItem1,3\n"

    again = [{**each, "id": f"{each['id']}-new", "text": "Something else entirely."} for each in rows]
    again = [{k: v for k, v in each.items() if k in {"id", "text", *row("p001")}} for each in again]
    file = tiny.file("again.jsonl", [each for each in again if each["mail"].startswith("p004")])
    assert sisa("add", *model, file, "--executor", "serial").code == 2
    later = zipped(
        tmp_path / "later.zip",
        30,
        Email="",
        Removed=f"p003MailItem,{identifier('p003', 'Email')},Email\n",
    )
    assert sisa("drop", "import", *model, later).json["cancelled"] == [waiting[0]["request_id"]]
    assert sisa("drop", "status", *model).json["standing"]["open"] == 0
    assert sisa("sweep", *model, "p004-q1").json["clean"]
    assert sisa("doctor", *model).json["findings"] == []

    hashed = [identifier(each, kind) for each in ("p003", "p004") for kind in ("Email", "NameVIN")]
    assert residue(tiny.directory, [*row("p003").values(), "p004@example.org", *hashed]) == []
    scratch = train_scratch(
        tmp_path / "scratch", tiny.base, [each for each in rows if each["subject_id"] != "p004"]
    )
    assert held_files(tiny.directory) == held_files(scratch.directory)
