"""What `sisa gc`, `sweep` and `doctor` tell a person: what was found, what was done, the next step."""

from __future__ import annotations

from dataclasses import asdict, replace

from cluster.cli import maintenance
from cluster.cli.maintenance import collected, diagnosed, repaired, scanned
from sisa.audit.doctor import Diagnosis
from sisa.audit.findings import REPAIR_STEPS, Finding
from sisa.audit.garbage import STRAY, UNKNOWN_FILE, Collected, Garbage
from sisa.audit.repair import RepairOutcome
from sisa.audit.residue import Residue, Scan
from sisa.core.ports import KeptVersions
from sisa.lm.train.self_test import Numerics

GARBAGE = (
    Garbage("records/old.parquet", 1234, UNKNOWN_FILE, True),
    Garbage("notes.txt", 4, STRAY, False),
)
KEPT = (KeptVersions("s3://bucket/model/records", "AccessDenied"),)
COUNTS = {
    **{"files": 3, "bytes": 12_345, "checkpoints": 2, "rows": 40, "vectors": 1, "adapters": 0},
    **{"unreadable": 0, "shredded": 0, "strings": 5, "strings_too_short_for_raw_bytes": 0},
}
CLEAN = Scan(True, ("model", "exports"), COUNTS, (), ())
DAMAGED = Diagnosis(
    "model",
    False,
    False,
    (
        Finding("index", "error", "shard 0", "the index is damaged", "reindex"),
        Finding("stray", "warning", "notes.txt", "a stray file", step="move it"),
    ),
)
HEALTHY = Diagnosis("model", True, True, ())
NUMERICS = Numerics(
    "f" * 64,
    {
        **{"device": "cpu", "dtype": "float32", "threads": 1, "libraries": {"torch": "2.13.0"}},
        **{"processor": {"machine": "x86_64", "model": "a processor"}, "settings": {"MKL_CBWR": None}},
    },
    ("d" * 64, "d" * 64),
)


def test_a_dry_run_of_gc_lists_what_it_would_remove_and_what_it_keeps() -> None:
    found = collected(Collected(True, GARBAGE, 0, 0, old_versions_kept=KEPT))
    assert found.json["old_versions_kept"] == (asdict(KEPT[0]),)  # as `forget` calls them
    assert found.text.splitlines() == [
        "retired or unknown files and directories: 2, 1,238 bytes",
        f"         1,234  records/old.parquet: {UNKNOWN_FILE}",
        f"             4  notes.txt: {STRAY}  (kept)",
        "nothing was changed",
        "old versions in the bucket: s3://bucket/model/records (AccessDenied)",
    ]


def test_gc_says_what_it_removed_gave_up_and_could_not_purge() -> None:
    text = collected(Collected(False, GARBAGE, 1, 1234, ("/gone/export",), KEPT)).text
    assert text.splitlines()[3:] == [
        "1 removed, 1,234 bytes",
        "given up: the export /gone/export",
        "NOT PURGED, kept by the bucket: s3://bucket/model/records (AccessDenied)",
        f"  next: {REPAIR_STEPS['purge']}",
    ]


def test_a_sweep_says_what_it_read_and_ends_with_its_verdict() -> None:
    assert scanned(CLEAN).text.splitlines() == [
        "scanned 3 files, 12,345 bytes, in 2 places:",
        "  2 checkpoints, 40 rows, 1 vector, 0 exported adapters; searched for 5 strings",
        "clean: no residue",
    ]


def test_a_sweep_lists_each_trace_and_what_it_could_not_read() -> None:
    left = (
        Residue("raw", "exports/log.txt", "byte 7", "the id of string 1"),
        Residue("link", "exports/out", "", "a link that leads out of the places read"),
    )
    counts = COUNTS | {"shredded": 1, "strings_too_short_for_raw_bytes": 2}
    text = scanned(
        replace(CLEAN, clean=False, residue=left, outdated_exports=("/e",), scanned=counts)
    ).text
    assert text.splitlines()[2:] == [
        "  1 encrypted file that no held key opens",
        "  2 strings too short for raw bytes: compared with values alone",
        "  - exports/log.txt, byte 7: the id of string 1",
        "  - exports/out: a link that leads out of the places read",
        "  outdated, yet clean: /e",
        "RESIDUE: 2 places",
    ]


def test_doctor_names_each_defect_with_its_next_step() -> None:
    assert diagnosed(HEALTHY).text == "model: healthy"
    first, *rest = diagnosed(DAMAGED).text.splitlines()
    assert first == "model: 1 error, 1 warning"
    assert rest[0] == "  error    shard 0: the index is damaged"
    assert "--repair" in rest[1]
    assert rest[1].startswith("           next step: ")
    assert rest[2:] == ["  warning  notes.txt: a stray file", "           next step: move it"]


def test_a_repair_says_what_it_found_did_and_left() -> None:
    text = repaired(RepairOutcome(("shard 0: index made again",), DAMAGED, HEALTHY)).text
    assert text.splitlines() == [
        "found: 1 error, 1 warning",
        "  shard 0: index made again",
        "now:",
        "model: healthy",
    ]


def test_a_machine_that_does_not_repeat_itself_is_called_so() -> None:
    text = maintenance.tested(NUMERICS).text
    assert text.startswith(
        f"fingerprint {'f' * 64}\n  cpu, float32, threads: 1\n  x86_64, a processor\n"
    )
    assert text.endswith(f"  torch 2.13.0\nrepeats itself: 2 trainings gave {'d' * 64}")
    other = maintenance.tested(replace(NUMERICS, digests=("d" * 64, "e" * 64))).text.splitlines()
    assert other[-3:] == [
        "DOES NOT REPEAT ITSELF: do not train here. The trainings gave",
        "  " + "d" * 64,
        "  " + "e" * 64,
    ]
