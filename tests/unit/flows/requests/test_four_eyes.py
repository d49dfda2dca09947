"""Where the run file requires four eyes, the submitter of a request never approves it, in any way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import cli
from sisa.config.config import ServiceBlock
from sisa.config.runfile import parse_run_file
from sisa.core.errors import ConfigConflict, SisaError
from sisa.flows.context.context import Context
from sisa.flows.ingest import train
from sisa.flows.requests import Terms, carry_out, decide, forget_at_once, new_request, submit
from sisa.model import Model, open_model
from tests.fakes.ports import fake_model, fake_record, with_config
from tests.models.confessing import NUM_RECORDS, RUN_FILE, record, train_in, use_fake_resources

PEOPLE = ["anna", "Anna ", "ANNA", "\uff21nna", "ben", ""]  # the first four are one person


def asking() -> Context:
    """Return a model that requires four eyes."""
    fake = fake_model()
    train(fake.context, [fake_record(number, f"s{number}") for number in range(4)])
    return with_config(fake.context, service=ServiceBlock(four_eyes=True))


def person(name: str) -> str:
    return "" if not name else "ben" if name == "ben" else "anna"


moves = st.lists(
    st.tuples(
        st.sampled_from(["submit", "at once", "approve", "hold", "deny"]),
        st.sampled_from(PEOPLE),
        st.sampled_from(PEOPLE),
        st.integers(0, 3),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(moves)
def test_nobody_approves_what_they_submitted(history: list[tuple[str, str, str, int]]) -> None:
    context = asking()
    rows = sorted((row for s in range(9) for row in context.stores.ledger.rows(s)), key=str)
    for move, one, other, number in history:
        try:
            if move in ("submit", "at once"):
                approver = other if move == "at once" else None
                terms = Terms(external_id=f"T-{number}", submitter=one, approver=approver)
                submit(context, [rows[number]], (), terms)
            else:
                state = {"approve": "approved", "hold": "held", "deny": "denied"}[move]
                decide(context, f"T-{number}", state, other or "because", by=one)  # type: ignore[arg-type]
        except SisaError:
            continue
    for each in context.stores.ledger.requests():
        assert person(each.submitter)
        if each.state == "approved":
            assert person(str(each.approver)) not in ("", person(each.submitter))


def test_a_direct_deletion_has_one_pair_of_eyes() -> None:
    context = asking()
    row = next(row for s in range(9) for row in context.stores.ledger.rows(s))
    for terms in (Terms(approver="sisa forget"), Terms(submitter="anna", approver="Anna")):
        with pytest.raises(ConfigConflict, match="four eyes"):
            forget_at_once(context, new_request(context, [row], (), terms))
    assert context.stores.ledger.requests() == []


def test_a_request_from_before_needs_a_submitter_too() -> None:
    context = asking()
    row = next(row for s in range(9) for row in context.stores.ledger.rows(s))
    former = with_config(context, service=ServiceBlock(four_eyes=False))
    known = submit(former, [row], (), Terms())
    with pytest.raises(ConfigConflict, match="no submitter is named"):
        decide(context, known.request_id, "approved", by="ben")
    assert decide(context, known.request_id, "cancelled", "").state == "cancelled"


def test_two_people_delete_exactly_as_ever() -> None:
    context = asking()
    row = next(row for s in range(9) for row in context.stores.ledger.rows(s))
    known = submit(context, [row], (), Terms(submitter="anna"))
    with pytest.raises(ConfigConflict, match="may not approve"):
        decide(context, known.request_id, "approved", by="ANNA")
    agreed = decide(context, known.request_id, "approved", "checked", by="ben")
    assert (agreed.approver, context.stores.ledger.events()[-1].note) == ("ben", "ben: checked")
    (done,) = carry_out(context, [agreed])
    assert (done.state, done.submitter, done.approver) == ("completed", "anna", "ben")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    use_fake_resources(monkeypatch)
    config = parse_run_file(f"{RUN_FILE}service: {{four_eyes: true}}\n", "run.yaml")
    train_in(tmp_path / "model", config, [record(number) for number in range(NUM_RECORDS)])
    return open_model(tmp_path / "model", executor="serial")


REFUSED = [
    ["forget", record(0).id],
    ["request", "submit", record(0).id],
    ["request", "submit", record(0).id, "--approver", "ben"],
    ["request", "submit", record(0).id, "--submitter", "ben", "--approver", "Ben"],
]


def test_commands_ask_for_four_eyes_as_well(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        return cli.run([*arguments, "-m", str(model.directory)])

    for refused in REFUSED:
        assert run(*refused) == 2
        assert "four eyes" in capsys.readouterr().err
    assert model.requests() == []
    assert run("request", "submit", record(0).id, "--submitter", "anna", "--external-id", "T-1") == 0
    assert run("request", "approve", "T-1", "--approver", "anna") == 2
    assert run("request", "approve", "T-1", "--approver", "ben") == 0
    assert run("run", "--executor", "serial") == 0
    assert model.request("T-1").request.state == "completed"
