"""California's DROP over a model of fakes: import, decide, run, report, and import again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from sisa.config.config import ServiceBlock
from sisa.core.domain import Record
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.core.requests import Request
from sisa.data.drop_lists import Download, Listed
from sisa.data.identifiers import hashes
from sisa.flows.context.context import Context
from sisa.flows.ingest import add, train
from sisa.flows.requests import carry_out, decide
from sisa.flows.rights import drop
from sisa.flows.rights.drop import cycle_standing, details, import_lists
from tests.crash import crashing
from tests.fakes.ports import FakeModel, changed, fake_model, fake_record, with_config

FIRST, LATER = date(2026, 8, 12), date(2026, 9, 20)
PEOPLE = ("ada", "bob", "cho")


def email(name: str) -> dict[str, str]:
    return {"email": f"{name}@example.org"}


def phone(digits: str) -> dict[str, str]:
    return {"phone": digits}


def record(number: int, subject: str | None = None, **identifiers: str) -> Record:
    return replace(fake_record(number, subject), identifiers=tuple(hashes(identifiers)))


def listed(item: str, identifiers: Mapping[str, str]) -> Listed:
    ((kind, hashed),) = hashes(identifiers)
    return Listed(item.ljust(12, "0"), kind, hashed)


def download(*rows: Listed, removed: Sequence[Listed] = (), day: date = FIRST) -> Download:
    lists: dict[str, list[Listed]] = {f"{day:%Y%m%d}_4821_{kind}": [] for kind in ("Email", "Phone")}
    for each in rows:
        lists[f"{day:%Y%m%d}_4821_{each.list_name}"].append(each)
    file = f"{day:%Y%m%d}_4821_Removed" if removed else ""
    return Download(day, "4821", lists, removed, file)


@pytest.fixture
def fake() -> FakeModel:
    """Return a model of three people with two records each, who share one telephone."""
    fake = fake_model()
    fake.context = changed(fake.context, now=lambda: "2026-08-13T09:00:00+00:00")
    records = [
        record(2 * place + n, who, **email(who), **(phone("916 555 0100") if n else {}))
        for place, who in enumerate(PEOPLE)
        for n in (0, 1)
    ]
    train(fake.context, records)
    return fake


def at(fake: FakeModel, now: str) -> Context:
    fake.context = changed(fake.context, now=lambda: now)
    return fake.context


def run(context: Context, *requests: str) -> tuple[Request, ...]:
    for each in requests:
        decide(context, each, "approved", by="dpo")
    held = {each.request_id: each for each in context.stores.ledger.requests()}
    return carry_out(context, [held[each] for each in requests])


def reported(folder: Path) -> dict[str, dict[str, int]]:
    """Return the statuses in all files of a directory of responses, by file and work item."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.rglob("*.csv")):
        header, *rows = path.read_text().splitlines()
        assert header == "Id,Status"
        pairs = (row.split(",") for row in rows)
        found[path.relative_to(folder).as_posix()] = {
            item.rstrip("0"): int(status) for item, status in pairs
        }
    return found


ALL = (
    listed("Ada", email("ada")),
    listed("AdaToo", email("ADA")),
    listed("Bob", email("bob")),
    listed("Nobody", email("nobody")),
    listed("Shared", phone("+1 (916) 555-0100")),
)


@pytest.mark.parametrize("few", [0, drop.FEW_KEYS])  # reading all identities, or those of some keys
def test_one_request_for_each_consumer_under_the_delete_act(
    fake: FakeModel, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop, "FEW_KEYS", few)
    done = import_lists(fake.context, download(*ALL))
    assert (done.new, done.matched, done.shared, done.not_found) == (5, 3, 1, 1)
    requests = {each.external_id: each for each in fake.ledger.requests()}
    assert set(requests) == {"DROP-Ada000000000", "DROP-Bob000000000"}
    for each in requests.values():
        assert (each.regime, each.state, each.num_records) == ("delete-act", "received", 2)
        assert each.due == "2026-09-26"  # 45 days after the download, not after the import
        assert each.request_id in done.requests
    items = {each.item.rstrip("0"): each for each in fake.ledger.work_items()}
    assert items["Ada"].request_id == items["AdaToo"].request_id != items["Bob"].request_id
    assert (items["Shared"].num_consumers, items["Nobody"].num_consumers) == (3, 0)


def test_the_same_download_again_changes_nothing(fake: FakeModel) -> None:
    import_lists(fake.context, download(*ALL))
    before, seq = fake.ledger.work_items(), fake.ledger.seq()
    done = import_lists(fake.context, download(*ALL))
    assert (done.new, done.known, done.requests) == (0, 5, ())
    assert (fake.ledger.work_items(), fake.ledger.seq()) == (before, seq)


def test_a_whole_cycle(fake: FakeModel, tmp_path: Path) -> None:
    ada, bob = import_lists(fake.context, download(*ALL)).requests
    early = drop.report(fake.context, tmp_path / "early", opted_out=False)
    assert reported(tmp_path / "early") == {"20260812_4821_Email.csv": {"Nobody": 5}}
    assert (early.open, early.amend) == (4, ())
    run(fake.context, ada)
    decide(fake.context, bob, "denied", "exempt: a journalist's source")
    done = drop.report(fake.context, tmp_path / "done", opted_out=True)
    assert reported(tmp_path / "done") == {
        "20260812_4821_Email_2608130900.csv": {"Ada": 3, "AdaToo": 3, "Bob": 2},
        "20260812_4821_Phone.csv": {"Shared": 4},
    }
    assert (done.open, done.statuses) == (0, {2: 1, 3: 2, 4: 1})
    nothing = drop.report(fake.context, tmp_path / "nothing", opted_out=True)
    assert (nothing.upload, nothing.amend, nothing.statuses) == ((), (), {})
    assert not (tmp_path / "nothing").exists()
    drop.report(fake.context, tmp_path / "lost", again=True, suffix="again")
    assert reported(tmp_path / "lost") == {
        "20260812_4821_Email_again.csv": {"Ada": 3, "AdaToo": 3, "Bob": 2, "Nobody": 5},
        "20260812_4821_Phone_again.csv": {"Shared": 4},
    }
    context = at(fake, "2026-09-21T09:00:00+00:00")
    late = listed("Late", email("nobody"))
    second = import_lists(context, download(late, removed=[ALL[2], ALL[0]], day=LATER))
    assert (second.new, second.withdrawn, second.cancelled) == (1, 2, ())
    drop.report(context, tmp_path / "second", opted_out=False)
    assert reported(tmp_path / "second") == {"20260920_4821_Email.csv": {"Late": 5}}


def test_what_was_found_later_amends_the_report(fake: FakeModel, tmp_path: Path) -> None:
    import_lists(fake.context, download(ALL[3]))
    drop.report(fake.context, tmp_path / "first", opted_out=False)
    with pytest.raises(InvalidInput, match="had themselves deleted"):
        add(fake.context, [record(9, "new", **email("nobody"))])
    add(fake.context, [record(9, "new", **email("nobody"))], allow_deleted=True)
    context = at(fake, "2026-09-21T09:00:00+00:00")
    (request,) = import_lists(context, download(day=LATER)).requests
    run(context, request)
    done = drop.report(context, tmp_path / "next", opted_out=False)
    assert done.amend == ("amend/20260812_4821_Email_2609210900.csv",)
    assert reported(tmp_path / "next") == {done.amend[0]: {"Nobody": 3}}


def test_who_withdraws_is_not_deleted(fake: FakeModel) -> None:
    ada, bob = import_lists(fake.context, download(*ALL), "dpo").requests
    done = import_lists(fake.context, download(removed=[ALL[0], ALL[2], ALL[3]], day=LATER))
    assert done.cancelled == (bob,)  # Ada's second address is still listed
    states = {each.request_id: each.state for each in fake.ledger.requests()}
    assert states == {ada: "approved", bob: "cancelled"}
    assert [each.note for each in fake.ledger.events()][-1] == "withdrawn at DROP"
    kept = {each.item.rstrip("0") for each in fake.ledger.work_items() if each.key}
    assert kept == {"AdaToo", "Shared"}
    add(fake.context, [record(9, "new", **email("nobody"))])  # nobody asks to keep them out
    again = import_lists(fake.context, download(*ALL))  # the older lists do not bring them back
    assert (again.new, again.requests) == (0, ())
    later = download(ALL[2], day=date(2026, 11, 1))
    assert len(import_lists(fake.context, later).requests) == 1


def test_whoever_was_deleted_stays_out_until_the_withdrawal(fake: FakeModel) -> None:
    """Bob's telephone is on no list, but it was his record's."""
    bob = import_lists(fake.context, download(ALL[2])).requests
    other = record(9, "robert", **phone("916 555 0100"))
    add(fake.context, [other])
    run(fake.context, *bob)
    for whose in (email("bob"), phone("9165550100")):
        with pytest.raises(InvalidInput, match="had themselves deleted") as refused:
            add(fake.context, [record(10, "bobby", **whose)])
        assert "bob" not in str(refused.value).replace("problem", "")
    import_lists(fake.context, download(removed=[ALL[2]], day=LATER))
    add(fake.context, [record(10, "bobby", **email("bob"))])
    held = {each.id_digest for each in fake.ledger.identities()}
    assert held == {row.id_digest for shard in range(3) for row in fake.ledger.rows(shard)}


def test_one_withdrawal_of_two_lets_nothing_in_again(fake: FakeModel) -> None:
    """Whoever is deleted a second time for a work item that is left is still deleted for the first."""
    both = import_lists(fake.context, download(*ALL[:2])).requests
    run(fake.context, *both)
    add(fake.context, [record(10, "ada", **email("ada"))], allow_deleted=True)
    assert len(import_lists(fake.context, download(removed=[ALL[0]], day=LATER)).requests) == 1
    with pytest.raises(InvalidInput, match="had themselves deleted"):
        add(fake.context, [record(11, "eve", **phone("916 555 0100"))])


def test_other_deletions_leave_no_identity(fake: FakeModel) -> None:
    from sisa.flows.locations import of_subject
    from sisa.flows.requests import Terms, submit

    live, _ = of_subject(fake.context, "bob")
    request = submit(fake.context, live, (), Terms(approver="dpo"))
    before = len(fake.ledger.identities())
    carry_out(fake.context, [request])
    assert before - len(fake.ledger.identities()) == 3
    add(fake.context, [record(10, "bobby", **email("bob"))])  # an id and a text of his own


def test_identities_follow_the_source(fake: FakeModel) -> None:
    """Training again reads the columns that the run file names now."""
    keys = {each.key for each in fake.ledger.identities()}
    moved = record(0, "ada", **email("ada.new"))
    train(fake.context, [moved])
    assert len({each.key for each in fake.ledger.identities()} - keys) == 1
    assert import_lists(fake.context, download(listed("New", email("ada.new")))).matched == 1
    train(fake.context, [fake_record(0, "ada")])  # a source without the columns says nothing
    assert import_lists(fake.context, download(listed("New", email("ada.new")))).matched == 0
    assert len(fake.ledger.identities()) == 9


def test_a_record_without_a_subject_is_a_consumer(fake: FakeModel) -> None:
    add(fake.context, [record(9, None, **email("dan"))])
    done = import_lists(fake.context, download(listed("Dan", email("dan"))))
    assert (done.matched, fake.ledger.requests()[0].num_records) == (1, 1)


def test_contradictions_are_refused_whole(fake: FakeModel) -> None:
    import_lists(fake.context, download(*ALL))
    before = (fake.ledger.work_items(), fake.ledger.seq())
    other_hash = listed("Ada", email("eve"))
    both = download(ALL[1], other_hash, removed=[ALL[1]], day=LATER)
    with pytest.raises(InvalidInput) as refused:
        import_lists(fake.context, both)
    assert [each.what for each in refused.value.problems] == [
        "the ID came before with another hash or list",
        "the ID is on a list of the same download",
    ]
    with pytest.raises(ConfigConflict, match="another data broker"):
        import_lists(fake.context, replace(download(*ALL), broker="9999"))
    assert (fake.ledger.work_items(), fake.ledger.seq()) == before


def test_the_cycle_is_shown(fake: FakeModel, tmp_path: Path) -> None:
    assert cycle_standing(fake.context) is None
    assert details(fake.context) is None
    import_lists(fake.context, download(*ALL))
    found = cycle_standing(fake.context)
    assert found is not None
    assert (found.next_access, found.days_left) == ("2026-09-26", 44)
    assert (found.work_items, found.open, found.overdue) == (5, 5, 0)
    assert (found.to_report, found.to_opt_out) == (1, 1)
    shown = details(fake.context, show_ids=True)
    assert shown is not None
    assert {each.item.rstrip("0"): each.ids for each in shown.matched} == {
        "Ada": ("id-0000", "id-0001"),
        "AdaToo": ("id-0000", "id-0001"),
        "Bob": ("id-0002", "id-0003"),
        "Shared": tuple(f"id-{number:04d}" for number in range(6)),
    }
    assert not any(each.ids for each in details(fake.context).matched)  # type: ignore[union-attr]
    drop.report(fake.context, tmp_path / "r", opted_out=True)
    late = cycle_standing(at(fake, "2026-09-27T00:00:00+00:00"))
    assert late is not None
    assert (late.open, late.overdue, late.days_left, late.to_opt_out) == (3, 3, -1, 0)


def test_nothing_in_the_ledger_confirms_a_guess(fake: FakeModel) -> None:
    """Whoever knows an identifier knows DROP's hash of it; the ledger must hold neither."""
    import_lists(fake.context, download(*ALL))
    held = json.dumps(
        [fake.ledger.meta(), *map(repr, (*fake.ledger.work_items(), *fake.ledger.identities()))]
    )
    for each in ALL:
        assert each.hash not in held
    assert "example.org" not in held


def test_responses_are_not_overwritten(fake: FakeModel, tmp_path: Path) -> None:
    import_lists(fake.context, download(*ALL))
    (tmp_path / "20260812_4821_Email.csv").write_text("mine")
    with pytest.raises(InvalidInput, match="not overwritten"):
        drop.report(fake.context, tmp_path, opted_out=True)
    assert not any(each.status for each in fake.ledger.work_items())
    assert [each.name for each in tmp_path.iterdir()] == ["20260812_4821_Email.csv"]
    with pytest.raises(InvalidInput, match="suffix"):
        drop.report(fake.context, tmp_path, opted_out=True, suffix="not-a-suffix")
    drop.report(fake.context, tmp_path, opted_out=True, suffix="part01")
    assert (tmp_path / "20260812_4821_Email_part01.csv").stat().st_mode & 0o777 == 0o600


def test_a_crash_before_the_ledger_notes_a_report_repeats_it(fake: FakeModel, tmp_path: Path) -> None:
    import_lists(fake.context, download(*ALL))
    with crashing((drop, "commit")):
        drop.report(fake.context, tmp_path / "first", opted_out=True)
    drop.report(fake.context, tmp_path / "second", opted_out=True)
    assert reported(tmp_path / "first") == reported(tmp_path / "second") != {}


def test_an_import_is_one_commit_or_nothing(fake: FakeModel) -> None:
    with crashing((drop, "commit")):
        import_lists(fake.context, download(*ALL))
    assert (fake.ledger.work_items(), fake.ledger.requests()) == ([], [])
    seq = fake.ledger.seq()
    import_lists(fake.context, download(*ALL))
    assert fake.ledger.seq() == seq + 1


def test_four_eyes_hold_for_imports(fake: FakeModel) -> None:
    context = with_config(fake.context, service=ServiceBlock(four_eyes=True))
    for approver, submitter in ((None, ""), ("anna", "anna")):
        with pytest.raises(ConfigConflict, match="four eyes"):
            import_lists(context, download(*ALL), approver, submitter)
    import_lists(context, download(*ALL), "ben", "anna")
    assert {(each.state, each.submitter) for each in fake.ledger.requests()} == {("approved", "anna")}
