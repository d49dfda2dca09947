"""The console command: exit codes, one JSON object on standard output, help, and what is not imported.

Everything is asked of the command line itself, over a model that a fake trainer made, so that no torch
and no Ray is needed; what the commands compute is tested where it is computed.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cluster
from cluster.cli import cli
from cluster.cli.command import SECTIONS
from sisa.config.runfile import parse_run_file
from sisa.core import errors
from sisa.core.domain import Record
from sisa.flows.requests import Terms, carry_out, submit
from sisa.flows.wiring.ledger_place import LEDGER
from tests.fakes.ports import fake_record
from tests.models import confessing
from tests.models.programs.imported import imported_by
from tests.unit.commands import Ask, Sisa

RUN_FILE = """
datasets: [{path: owner/people}]
output_dir: model
sisa: {shards: 3, slices: 2, embedder: hashing}
"""


def commands() -> dict[str, click.Command]:
    """Return all commands by their names, those of groups with the group's."""
    found: dict[str, click.Command] = {}
    for name, each in cli.cli.commands.items():
        inner = each.commands if isinstance(each, click.Group) else {"": each}
        found |= {f"{name} {one}".strip(): command for one, command in inner.items()}
    return found


def test_the_help_shows_every_command_once() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(cli.cli.commands)
    shown = CliRunner().invoke(cli.cli, ["--help"]).output
    for title, (first, *_) in SECTIONS.items():
        assert f"\n{title}:\n  {first} " in shown


def record(number: int) -> Record:
    return fake_record(number, f"subject-{number % 5}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 20 records, one of them (number 19) deleted."""
    directory = tmp_path_factory.mktemp("model")
    config = parse_run_file(RUN_FILE, "run.yaml")
    then = {"numerics": "f", "now": "2026-01-01T00:00:00+00:00"}
    confessing.train_in(directory, config, [record(number) for number in range(20)], **then)
    with confessing.context_of(directory, numerics="f", now="2026-01-01T00:00:00+00:00") as context:
        row = context.settings.assigner.row(record(19), 1)
        held = [
            each for each in context.stores.ledger.rows(row.shard) if each.id_digest == row.id_digest
        ]
        carry_out(context, [submit(context, held, (), Terms(approver="a person"))])
    return directory


@pytest.fixture
def ask_model(ask: Ask, directory: Path) -> Ask:
    """Run a command on the model; check its exit code, and return its one JSON object."""
    return lambda *arguments, code=0: ask(*arguments, "-m", directory, code=code)


def error_of(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)["error"]  # raises for anything around the object
    return found


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("sisa.model.open_model", raises)


COMMANDS = """
access add audit check-adapter doctor engines export find forget gc generate init metrics plan prove
quickstart rebuild receipt recipients rectify release report restrict run serve simulate status sweep
train verify verify-certificate verify-proof where
approx: methods patches probe release revert show unlearn
certificate: export issue list provenance show
cluster: logs manifest status stop submit
config: schema
drop: import report status
eval: attacks muse rwku stereotypes tofu whp wmdp
keys: check init rotate show
ledger: move upgrade
log: add-cosignature add-rebuild check cosign proof request show witness-key
request: approve cancel deny extend hold list show submit
revocations: publish
routing: calibrate
token: add list revoke
"""


def test_no_command_comes_or_goes_unnoticed() -> None:
    rows = [line.rpartition(": ") for line in COMMANDS.strip().splitlines()]
    expected = {f"{group} {name}".strip() for group, _, names in rows for name in names.split()}
    assert commands().keys() == expected


def test_every_command_is_in_the_readme() -> None:
    readme = (Path(cluster.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in commands() if not re.search(rf"\bsisa {name}\b", readme)] == []


def test_every_command_that_trains_takes_an_address() -> None:
    options = {
        name: {o for each in found.params for o in each.opts} for name, found in commands().items()
    }
    training = {name for name, found in options.items() if "--executor" in found}
    assert len(training) > 10
    assert training <= {name for name, found in options.items() if "--address" in found}


@pytest.mark.parametrize("name", commands())
def test_help_has_an_example(sisa: Sisa, name: str) -> None:
    code, out, err = sisa(*name.split(), "--help")
    assert (code, err) == (0, "")
    example = out.partition("Example:\n")[2].strip()
    assert example.startswith(f"sisa {name}")
    assert "--json" in out
    for option in re.findall(r"(?<!\S)--[a-z-]+", example):
        assert option in out.partition("Example:\n")[0]


def test_options_explain_themselves_alike() -> None:
    found = [
        (f"{name} {each.opts[-1]}", each)
        for name, command in commands().items()
        for each in command.params
        if isinstance(each, click.Option)
    ]
    assert [
        name for name, each in found if not re.fullmatch(r"\S.*\.", each.help or "", re.DOTALL)
    ] == []
    repeated = [name for name, each in found if each.multiple is not ("Repeatable" in (each.help or ""))]
    assert repeated == []
    short = {tuple(each.opts[:2]) for _, each in found if len(each.opts[0]) == 2}
    assert short == {("-m", "--model"), ("-o", "--output"), ("-f", "--follow")}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--help"]])
def test_help_and_version_go_to_standard_output(sisa: Sisa, arguments: list[str]) -> None:
    code, out, err = sisa(*arguments)
    assert (code, err) == (0, "")
    assert "sisa" in out


USAGE_ERRORS = [
    ["where"],
    ["where", "-m", "x"],
    ["where", "--no-such-option"],
    ["no-such-command"],
    ["forget", "-m", "x"],
    ["forget", "-m", "x", "r1", "--subject", "s"],
    ["find", "-m", "x"],
    ["find", "-m", "x", "--text", "a", "--subject", "b"],
    ["find", "-m", "x", "--text", "a", "--top", "0"],
    ["verify", "-m", "x", "--replay", "some"],
    ["verify", "-m", "x", "--shard", "-1"],
    ["doctor"],
    ["doctor", "--numerics", "--repair"],
    ["train"],
    ["generate", "-m", "x"],
    ["status", "-m", "x", "surplus"],
    ["eval", "tofu"],
    ["approx", "probe", "-m", "x"],
    ["approx", "release", "-m", "x"],
    ["approx", "release", "-m", "x", "--all", "--request", "r"],
    ["approx", "show", "-m", "x"],
    ["approx", "unlearn", "-m", "x", "--method", "npo"],
    ["eval", "attacks", "-m", "x"],
    ["eval", "tofu", "-m", "x", "--split", "forget99"],
    ["eval", "tofu", "-m", "x", "--reference", "a", "--reference", "b", "--reference", "c"],
    ["request", "submit", "-m", "x"],
    ["request", "submit", "-m", "x", "id-1", "--subject", "s"],
    ["request", "submit", "-m", "x", "--find-like", "id-1", "--subject", "s"],
    ["request", "submit", "-m", "x", "id-1", "--regime", "none"],
    ["request", "show", "-m", "x"],
    *(["request", name, "-m", "x", "T-1"] for name in ("approve", "deny", "hold", "extend")),
    ["run", "-m", "x", "--plan", "--watch"],
    ["run", "-m", "x", "--once", "--watch"],
    ["run", "-m", "x", "--every", "soon"],
]


@pytest.mark.parametrize("arguments", USAGE_ERRORS, ids=" ".join)
def test_wrong_usage_is_2(sisa: Sisa, arguments: list[str]) -> None:
    code, out, err = sisa(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    code, out, err = sisa(*arguments, "--json")
    assert code == 2
    error = error_of(out)
    assert (error["type"], bool(error["message"])) == ("UsageError", True)
    assert "--help` shows options and an example" in error["next_step"]


GROUPS = ("approx", "cluster", "config", "eval", "keys", "log", "request")


@pytest.mark.parametrize("arguments", [[], *([each] for each in GROUPS)])
def test_no_command_shows_help_and_is_2(sisa: Sisa, arguments: list[str]) -> None:
    code, out, err = sisa(*arguments)
    assert (code, out) == (2, "")
    _, commands = err.split("Commands:\n" if arguments else "Begin:\n")
    assert "..." not in commands  # click cuts a long summary


WITHOUT_A_MODEL = [
    *(["status"], ["where", "r1"], ["forget", "r1"], ["find", "--text", "x"], ["verify"]),
    *(["add", "new.jsonl"], ["generate", "--prompt", "x"], ["export", "--to", "out"]),
]


@pytest.mark.parametrize("command", WITHOUT_A_MODEL, ids=" ".join)
def test_a_directory_without_a_model_is_2(
    sisa: Sisa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.jsonl").write_text('{"id": "r1", "text": "x"}\n')
    (tmp_path / "empty").mkdir()
    for directory in ("empty", "absent"):
        code, out, err = sisa(*command, "-m", directory, "--json")
        assert (code, error_of(out)["type"]) == (2, "InvalidInput")
        assert "sisa train" in err
    assert {each.name for each in tmp_path.rglob("*")} == {"empty", "new.jsonl"}


KINDS: list[type[errors.SisaError]] = [
    *(errors.SisaError, errors.InvalidInput, errors.ConfigConflict, errors.UnknownRecord),
    *(errors.IntegrityError, errors.Busy, errors.EnvironmentFault),
]


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        *(
            (kind("what", where="place", next_step="step"), kind.exit_code, kind.__name__)
            for kind in KINDS
        ),
        (OSError(28, "No space left on device"), 6, "EnvironmentFault"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (RuntimeError("x"), 1, "InternalFault"),
    ],
)
def test_every_failure_has_its_code_and_all_keys_of_the_contract(
    sisa: Sisa, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, name: str
) -> None:
    raising(monkeypatch, error)
    found, out, _ = sisa("status", "-m", "x", "--json")
    assert (found, error_of(out)["type"]) == (code, name)
    _, usage, _ = sisa("status", "--no-such", "--json")
    keys = {"type", "message", "where", "expected", "got", "next_step", "problems"}
    assert error_of(out).keys() == error_of(usage).keys() == keys
    found, out, err = sisa("status", "-m", "x")
    assert (found, out) == (code, "")
    if isinstance(error, errors.SisaError):
        assert err == f"error: {error}\n"


def test_an_error_lists_its_problems(sisa: Sisa, monkeypatch: pytest.MonkeyPatch) -> None:
    error = errors.InvalidInput("what", problems=[errors.Problem("line 1", "bad")])
    raising(monkeypatch, error)
    _, out, err = sisa("status", "-m", "x", "--json")
    assert error_of(out) == error.to_json()
    assert "line 1: bad" in err


def test_control_characters_of_an_error_reach_no_terminal(
    sisa: Sisa, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, errors.InvalidInput("bad", where="\x1b]0;title\x07name"))
    _, _, err = sisa("status", "-m", "x")
    assert "\x1b" not in err
    assert "\x07" not in err


def test_an_internal_fault_shows_its_place_and_none_of_its_message(
    sisa: Sisa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SISA_DEBUG", raising=False)
    raising(monkeypatch, RuntimeError("the record text of Ada"))
    code, out, err = sisa("status", "-m", "x", "--json")
    assert code == 1
    assert "Ada" not in out + err
    error = error_of(out)
    assert error["type"] == "InternalFault"
    assert "RuntimeError in test_cli.py:" in error["message"]
    assert "SISA_DEBUG" in error["next_step"]


def test_an_interrupt_says_how_to_go_on(sisa: Sisa, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert "run the same command again" in sisa("status", "-m", "x", "--json")[2]


def test_status_of_a_model(ask_model: Ask, directory: Path) -> None:
    found = ask_model("status")
    assert (found["records"], found["deleted_records"], len(found["shards"])) == (19, 1, 3)
    for shard in found["shards"]:
        if shard["head"]:
            assert (directory / shard["adapter_path"]).is_file()


def test_where_in_a_model(ask_model: Ask, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("id-0001\n")
    found = ask_model("where", "id-0000", "id-0019", "--ids-file", ids)["records"]
    assert [(each["id"], each["state"]) for each in found] == [
        ("id-0000", "trained"),
        ("id-0019", "deleted"),
        ("id-0001", "trained"),
    ]
    assert found[1]["request_id"].startswith("req-")
    assert any(touch["is_head"] for touch in found[0]["checkpoints"])


def test_an_unknown_record_is_3_and_is_not_repeated(sisa: Sisa, directory: Path) -> None:
    code, out, err = sisa("where", "-m", directory, "id-0000", "sam@example.org", "--json")
    assert code == 3
    assert error_of(out)["problems"] == [{"where": "id 2 of 2", "what": "this model has never held it"}]
    assert "sam@" not in out + err


@pytest.mark.parametrize("command", [["where", "\udcff"], ["find", "--subject", "\udcff"]])
def test_an_argument_that_is_not_utf8_is_bad_input(
    sisa: Sisa, directory: Path, command: list[str]
) -> None:
    code, _, _ = sisa(*command, "-m", directory, "--json")
    assert code in (2, 3)


def test_find_in_a_model(ask_model: Ask) -> None:
    hits = ask_model("find", "--text", "question 7\nanswer 7", "--top", "3")["hits"]
    assert (len(hits), hits[0]["id"]) == (3, "id-0007")
    assert hits[0]["score"] == pytest.approx(1.0)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


def test_what_is_personal_need_not_stand_in_a_command_line(
    ask_model: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    given("question 7\nanswer 7\n")
    assert ask_model("find", "--text", "-") == ask_model("find", "--text", "question 7\nanswer 7")
    given("id-0007\n")
    assert ask_model("find", "--like", "-") == ask_model("find", "--like", "id-0007")
    given("id-0007\n\nid-0001\n")
    assert ask_model("where", "--ids-file", "-") == ask_model("where", "id-0007", "id-0001")
    given("id-0007\nb\tc\n")
    (problem,) = ask_model("where", "--ids-file", "-", code=2)["error"]["problems"]
    assert problem["where"] == "-, line 2"
    file = tmp_path / "subject.txt"
    file.write_text("subject-1\n")
    plain = ask_model("forget", "--subject", "subject-1", "--dry-run")
    assert ask_model("forget", "--subject-file", file, "--dry-run") == plain
    given("subject-1")
    assert ask_model("forget", "--subject-file", "-", "--dry-run") == plain
    assert ask_model("find", "--subject-file", file) == ask_model("find", "--subject", "subject-1")
    file.write_text("\n")
    ask_model("forget", "--subject-file", file, code=2)
    ask_model("forget", "--subject-file", file, "--subject", "s", code=2)


def test_a_deleted_record_is_not_found(ask_model: Ask) -> None:
    found = ask_model("find", "--text", "question 19\nanswer 19", "--top", "50")
    assert len(found["hits"]) == 19
    assert "id-0019" not in str(found)


def test_a_dry_run_changes_nothing(ask_model: Ask, directory: Path) -> None:
    def files() -> dict[Path, bytes]:
        found = (path for path in directory.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if "ledger" not in path.name}

    before = files()
    found = ask_model("forget", "--subject", "subject-1", "--dry-run")
    assert (found["records"], len(found["shards"])) == (4, 1)
    assert files() == before
    assert ask_model("status")["records"] == 19


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_unknown_id_among_others_deletes_nothing(ask_model: Ask, more: list[str]) -> None:
    error = ask_model("forget", "nobody", "id-0001", "id-0099", *more, code=3)["error"]
    assert error["type"] == "UnknownRecord"
    assert [each["where"] for each in error["problems"]] == ["id 1 of 3", "id 3 of 3"]
    ask_model("forget", "--subject", "nobody", *more, code=3)
    assert ask_model("status")["records"] == 19


def test_forgetting_what_is_deleted_says_so_and_is_0(ask_model: Ask) -> None:
    found = ask_model("forget", "id-0019")
    assert (found["request_id"], found["already_deleted"]) == (None, 1)
    assert [each.startswith("req-") for each in found["already_deleted_by"]] == [True]
    assert found["model_digest_before"] == found["model_digest_after"]


def test_a_sound_model_is_verified_without_a_replay(ask_model: Ask) -> None:
    found = ask_model("verify")
    assert (found["ok"], found["findings"]) == (True, [])
    assert [each["replayed"] for each in found["shards"]] == [False] * 3


class Reached(Exception):
    """Raised where a first training would start."""


def trains_anew(
    sisa: Sisa, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run `sisa train` into a directory, stopped before a first training writes anything."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr("sisa.train._first_training", reached)
    (tmp_path / "people.jsonl").write_text(
        '{"id": "id-0000", "subject_id": "a", "text": "once deleted"}\n'
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"datasets: [{{path: people.jsonl}}]\noutput_dir: {directory}\n")
    return sisa("train", run_file, "--json")


def test_a_model_that_lost_its_ledger_is_not_trained_anew(
    sisa: Sisa, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("ledger.sqlite*"))
    code, out, _ = trains_anew(sisa, copy, tmp_path, monkeypatch)
    assert (code, error_of(out)["type"]) == (4, "IntegrityError")


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_first_training_starts_in_a_directory_without_a_ledger_or_with_an_empty_one(
    sisa: Sisa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_killed: bool
) -> None:
    """A training that is killed while it makes the ledger leaves an empty one."""
    if was_killed:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / LEDGER).touch()
    code, out, _ = trains_anew(sisa, tmp_path / "model", tmp_path, monkeypatch)
    assert (code, "Reached" in out) == (1, True)


def test_the_schema_is_json_either_way(sisa: Sisa, ask: Ask) -> None:
    assert json.loads(sisa("config", "schema")[1]) == ask("config", "schema")


def test_init_writes_what_it_says(ask: Ask, tmp_path: Path) -> None:
    found = ask("init", tmp_path / "new")
    assert len(Path(found["data_file"]).read_text().splitlines()) == found["records"]
    assert Path(found["run_file"]).is_file()
    ask("init", tmp_path / "new", code=2)


LIGHT = """
status
where id-0000
find --text question
verify
doctor
forget id-0001 --dry-run
request submit id-0004 --external-id T-1
request list
request show T-1
run --plan
request approve T-1 --approver dpo
request cancel T-1
token add anna --role reader
"""


MORE = """
keys init
keys show
gc --dry-run
sweep
report
drop status
recipients id-0000
request submit id-0005 --external-id T-2
request extend T-2 --reason complex
request deny T-2 --reason nobody
token list
token revoke anna
engines
log show
serve --status
log check
certificate list
certificate issue
revocations publish
metrics
"""


def test_light_commands_import_nothing_heavy(directory: Path, tmp_path: Path) -> None:
    """Torch and Ray take seconds to import: no question and no decision may wait for them."""
    model = shutil.copytree(directory, tmp_path / "model")
    commands = ([*line.split(), "-m", model] for line in LIGHT.strip().splitlines())
    found = imported_by(["config", "schema"], *commands)
    assert found.isdisjoint({"torch", "ray", "peft", "transformers"})


REFERENCE = r"\bas (?:in |of |`standing` of )?`([^`]+)`"  # to another command's row, in a row


def contract() -> dict[str, str]:
    """Return the README's row of JSON keys of each command, with the rows that it refers to."""
    readme = (Path(cluster.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The JSON contract\n")[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for cell, keys in re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        group = names[0].split()[0]
        rows |= {name: keys for each in names for name in (each, f"{group} {each}")}
    for _ in range(2):  # a row that is referred to may refer to a third
        rows = {
            name: keys + "".join(rows.get(each, "") for each in re.findall(REFERENCE, keys))
            for name, keys in rows.items()
        }
    return rows


def test_every_command_is_in_the_contract() -> None:
    assert commands().keys() - contract().keys() == set()


def keys_of(printed: Any) -> Iterator[str]:
    """Yield the keys of a result at every depth, but for what is counted or measured by its name."""
    for each in printed if isinstance(printed, list) else ():
        yield from keys_of(each)
    for key, value in printed.items() if isinstance(printed, dict) else ():
        yield key
        by_name = isinstance(value, dict) and key in ("statements", "sizes_bytes")
        yield from () if by_name else keys_of(value)


def test_every_key_that_is_printed_is_in_the_contract(ask: Ask, directory: Path, tmp_path: Path) -> None:
    model, rows = shutil.copytree(directory, tmp_path / "model"), contract()
    unnamed = []
    for line in re.findall(".+", LIGHT + MORE):
        words = line.split()
        name = next(each for each in (" ".join(words[:2]), words[0]) if each in rows)
        if "--dry-run" in words and f"{name} --dry-run" in rows:
            name += " --dry-run"
        printed = ask(*words, "-m", model)
        named = set(re.findall(r"\w+", rows[name]))
        unnamed += [f"{name}: {key}" for key in keys_of(printed) if key not in named]
    assert sorted(set(unnamed)) == []


def test_a_closed_pipe_is_no_fault(directory: Path) -> None:
    """`sisa status | head -0` must not end in a traceback."""
    code = (
        "import sys\nfrom cluster.cli.cli import run\n"
        f"sys.exit(run(['status', '-m', {str(directory)!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 0
    assert b"Traceback" not in err
    assert b"Exception" not in err
