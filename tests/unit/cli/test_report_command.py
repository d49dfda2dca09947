"""`sisa report` on a model whose requests are in several states: what it says, writes and leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sisa.config.runfile import parse_run_file
from sisa.train import train_model
from tests.models import confessing
from tests.unit.commands import Ask, Sisa

HOSTILE = '<script>alert("T-2")</script>'


@pytest.fixture
def ask(ask: Ask, model: Path) -> Ask:
    """Run a command on the model; return its JSON."""
    return lambda *arguments, **code: ask(*arguments, "-m", model, **code)


def states(report: dict[str, Any]) -> dict[int, list[str]]:
    return {row["shard"]: [each["state"] for each in row["slices"]] for row in report["shards"]}


def test_a_model_without_requests_has_a_page(sisa: Sisa, model: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, _ = sisa("report", "-m", model, "--html", page)
    assert code == 0
    assert out.endswith(f"page: {page}\n")
    assert page.stat().st_mode & 0o077 == 0
    assert "No request for deletion has been made" in page.read_text(encoding="utf-8")


def test_a_directory_is_no_page(sisa: Sisa, model: Path, tmp_path: Path) -> None:
    code, _, err = sisa("report", "-m", model, "--html", tmp_path)
    assert code == 6
    assert str(tmp_path) in err
    assert "internal" not in err


def test_requests_in_several_states_are_on_the_page(ask: Ask, tmp_path: Path) -> None:
    ids = [confessing.record(number).id for number in range(4)]
    ask("request", "submit", ids[0], "--external-id", "T-1", "--reason", "asked", "--approver", "dpo")
    ask("run")
    ask("request", "submit", ids[1], "--external-id", HOSTILE, "--reason", "\u202etxt.exe")
    ask("request", "submit", ids[2], "--external-id", "T-3")
    ask("request", "hold", "T-3", "--reason", "court order")
    ask("request", "submit", ids[3], "--external-id", "T-4")
    ask("request", "deny", "T-4", "--reason", "not the person")
    page = tmp_path / "report.html"
    found = ask("report", "--html", page, "--made-by", "Ada & sons")
    assert (found["made_by"], found["html"]) == ("Ada & sons", str(page))
    assert [each["state"] for each in found["requests"]] == ["completed", "received", "held", "denied"]
    assert [each["external_id"] for each in found["requests"]] == ["T-1", HOSTILE, "T-3", "T-4"]
    (batch,) = found["costs"]
    assert 0 < batch["record_epochs_retrained"] < batch["record_epochs_full"]
    assert {each["what"] for each in found["attention"]} == {
        "Requests that wait for a decision",
        "Requests under a legal hold",
        "Deletions are not certified",
    }
    text = page.read_text(encoding="utf-8")
    assert "Ada &amp; sons" in text
    assert "&lt;script&gt;alert(&#34;T-2&#34;)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "\u202e" not in text
    assert "court order" in text
    assert not [each for each in ids if each in text or each in json.dumps(found)]


def test_the_slices_follow_a_deletion(ask: Ask) -> None:
    assert {each for row in states(ask("report")).values() for each in row} == {"clean"}
    record = confessing.record(confessing.DELETED).id
    (place,) = ask("where", record)["records"]
    shard, slice_ = place["shard"], place["slice"]
    ask("forget", record, "--defer")
    after = states(ask("report"))
    assert after[shard] == ["clean" if n < slice_ else "rolled back" for n in range(3)]
    ask("run")
    after = states(ask("report"))
    assert after[shard] == ["clean" if n < slice_ else "retrained" for n in range(3)]
    assert after[1 - shard] == ["clean"] * 3


def test_training_the_whole_model_again_ends_what_deletions_retrained(ask: Ask, model: Path) -> None:
    data = model.parent / "people.jsonl"
    held = [confessing.record(number) for number in range(confessing.NUM_RECORDS)]
    ask("forget", held[confessing.DELETED].id)
    rows = [
        {"id": each.id, "subject_id": each.subject_id, **{part.role: part.text for part in each.parts}}
        for each in held
        if each is not held[confessing.DELETED]
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    run_file = confessing.RUN_FILE.replace("owner/people", str(data)).replace(
        "output_dir: model", f"output_dir: {model}\nlearning_rate: 0.5"
    )
    assert "retrained" in str(states(ask("report")))
    train_model(parse_run_file(run_file, "run.yaml"), executor="serial", accept_differences=True)
    assert {each for row in states(ask("report")).values() for each in row} == {"clean"}


def of_evidence(report: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the fault of the evidence, and the standing of each request's certificate."""
    return report["evidence"]["fault"], [each["certificate"]["standing"] for each in report["requests"]]


def log_files(model: Path) -> list[Path]:
    return [path for path in sorted((model / "log").rglob("*")) if path.is_file()]


def test_certificates_are_checked_as_an_outsider_would(ask: Ask, model: Path, tmp_path: Path) -> None:
    ids = [confessing.record(number).id for number in range(3)]
    ask("forget", ids[0])
    ask("keys", "init")
    report = ask("report")
    assert (report["evidence"]["fault"], of_evidence(report)[1]) == ("", ["none"])
    ask("forget", ids[1])
    shutil.copytree(model / "log", tmp_path / "before")
    ask("forget", ids[2])
    page = tmp_path / "report.html"
    report = ask("report", "--html", page)
    assert of_evidence(report) == ("", ["none", "verified", "verified"])
    assert report["evidence"]["statements"]["exact-deletion"] == 2
    assert report["evidence"]["states_what_is_served"] is True
    assert [each["severity"] for each in report["attention"]] == []
    assert "certificate verified" in page.read_text(encoding="utf-8")

    last = report["requests"][-1]["certificate"]
    statement = model / "log" / "statements" / f"{last['sha256']}.json"
    whole = statement.read_bytes()
    statement.write_bytes(whole.replace(b"payload", b"Payload", 1))
    fault, standings = of_evidence(ask("report"))
    assert fault.startswith("a statement is not the logged one")
    assert standings == ["unverified", "verified", "unverified"]
    statement.unlink()
    assert of_evidence(ask("report"))[1] == ["unverified", "verified", "unverified"]
    statement.write_bytes(whole)
    assert of_evidence(ask("report")) == ("", ["none", "verified", "verified"])

    shutil.rmtree(model / "log")
    shutil.copytree(tmp_path / "before", model / "log")
    fault, standings = of_evidence(ask("report"))
    assert fault.startswith("the log does not continue a checkpoint that was seen")
    assert standings == ["unverified"] * 3
    shutil.rmtree(model / "log")
    assert of_evidence(ask("report"))[1] == ["unverified"] * 3
    (Path(ask("keys", "show")["directory"]) / "vrf.key").write_bytes(b"short")
    assert of_evidence(ask("report"))[1] == ["unverified"] * 3


def test_a_certificate_that_can_not_be_signed_is_pending(ask: Ask) -> None:
    directory = Path(ask("keys", "init")["directory"])
    ask("forget", confessing.record(0).id)
    directory.rename(directory.with_name("elsewhere"))
    ask("forget", confessing.record(1).id)
    report = ask("report")
    assert of_evidence(report) == ("", ["verified", "pending"])
    assert "Certificates that are pending" in {each["what"] for each in report["attention"]}
    directory.with_name("elsewhere").rename(directory)
    ask("run")
    assert of_evidence(ask("report")) == ("", ["verified", "verified"])


def test_a_report_writes_nothing_into_the_model(ask: Ask, model: Path) -> None:
    ask("keys", "init")
    ask("forget", confessing.record(0).id)
    kept = {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}
    ask("report")
    assert {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()} == kept
