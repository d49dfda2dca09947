"""`sisa eval rwku` and its like on tiny models: their JSON and words, and logs that are read again.

Ray is left to `test_eval_cli`: all benchmarks share one loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.benchmarks import MADE_UP, write_made_up
from tests.models.tiny_model import Done, Tiny, command

pytestmark = pytest.mark.torch
NAMED = {"model", "digest", "log", "settings"}
FINDINGS = {"extraction_strength", "depth", "membership", "comes_back", "relearning", "utility"}


class Evaluate:
    """Run a benchmark's command with few new tokens; logs go to one directory."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def arguments(self, name: str, *rest: Any) -> list[Any]:
        data = self.folder / name
        if not data.exists():
            write_made_up(data, MADE_UP[name]())
        form = ("--prompt", "completion", "--max-new-tokens", 3, "--executor", "serial")
        return [name, "--data", data, "--out", self.folder / "logs", *form, *rest]

    def __call__(self, name: str, *rest: Any) -> Done:
        return command(self.capsys, "eval", *self.arguments(name, *rest))


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Evaluate:
    return Evaluate(capsys, tmp_path)


@pytest.mark.parametrize("name", MADE_UP)
def test_the_json_of_a_model_beside_itself(evaluate: Evaluate, name: str, tiny_base: Path) -> None:
    done = evaluate(name, "-m", tiny_base, "--reference", tiny_base)
    assert done.code == 0
    assert set(done.json) == {"benchmark", "models", "references", "weakness"}
    (model,) = done.json["models"]
    assert set(model) == NAMED | {"num_questions", "measures", "membership", "privleak", "headline"}
    for each in model["measures"].values():
        assert set(each) == {"value", "low", "high", "num", "reference", "change"}
        assert each["change"]["value"] == 0
    headline = model["headline"]
    assert set(headline) == {"findings", "lost", "not_measured"}
    assert set(headline["findings"]) | set(headline["not_measured"]) == FINDINGS
    assert headline["lost"] == []
    if model["membership"] is not None:
        assert model["membership"]["reference"]["value"] == 0.5
    from cluster.cli.cli import run

    log = model["log"]
    again = evaluate.arguments(name, "-m", log, "--reference", log)
    assert run(["eval", *map(str, again)]) == 0
    out = evaluate.capsys.readouterr().out
    assert "needs --before and --reference" in out


def test_a_deletion_ready_model_and_plain_texts(evaluate: Evaluate, tiny: Tiny) -> None:
    done = evaluate("muse", "-m", tiny.directory, "--limit", 2)
    assert done.code == 0
    (model,) = done.json["models"]
    assert set(model["num_questions"].values()) == {2}
    assert set(model["measures"]) == {"verbmem", "knowmem forget", "knowmem retain"}


def test_models_in_order(evaluate: Evaluate, tiny_base: Path, knowing: Path) -> None:
    models = ("-m", tiny_base, "-m", knowing)
    done = evaluate("muse", *models, "--order", "sustainability", "--limit", 1)
    assert done.json["order"] == "sustainability"
    series = done.json["since_first"]["knowmem retain"]
    assert [set(each) for each in series] == [{"value", "low", "high", "num"}] * 2
    assert series[0]["value"] == 0
    alone = evaluate("muse", "-m", tiny_base, "--order", "scalability")
    assert alone.code == 2


def test_what_is_refused(evaluate: Evaluate, tiny_base: Path) -> None:
    log = evaluate("whp", "-m", tiny_base).json["models"][0]["log"]
    other = evaluate("wmdp", "-m", log)
    assert (other.code, other.error["message"]) == (2, "the log is of another benchmark")
    fewer = evaluate("whp", "-m", tiny_base, "--reference", log, "--limit", 1)
    assert fewer.code == 0, "a reference may have been asked more"
    more = evaluate("whp", "-m", log, "--reference", fewer.json["models"][0]["log"])
    assert (more.code, more.error["type"]) == (2, "InvalidInput")
    (evaluate.folder / "whp" / "completions.jsonl").unlink()
    missing = evaluate("whp", "-m", tiny_base)
    assert missing.problems == [("completions.jsonl", "missing")]
    nobody = evaluate("rwku", "-m", tiny_base, "--subject", "Nobody")
    assert (nobody.code, nobody.error["got"]) == (2, "Nobody")


def test_questions_that_the_model_can_not_read_are_listed_before_any_is_asked(
    evaluate: Evaluate, tiny_base: Path
) -> None:
    rows = MADE_UP["muse"]()
    rows["privleak/forget"][1]["text"] = "long " * 200
    rows["verbmem/forget"][2]["prompt"] = "long " * 110
    write_made_up(evaluate.folder / "muse", rows)
    done = evaluate("muse", "-m", tiny_base)
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert [where for where, _ in done.problems] == ["verbmem 2", "privleak forget 1"]
    assert not (evaluate.folder / "logs").exists()
