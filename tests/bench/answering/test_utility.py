"""General utility on tiny models: scores, who answered, differences to the base, continuing a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from approx.evaluation.evaluated_models import HuggingFaceModel, open_evaluated
from tests.bench.answering.utility import TASKS, Contestant, main, same_words, summary, table
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import PEOPLE, train_scratch

pytestmark = pytest.mark.torch
HELD = "Who keeps the lighthouse?"
CHOICES = {"choices": ["No.", "Yes!", "Ah."], "labels": [0, 1, 0]}
ASKED = [f"Sandpiper {number}?" for number in range(2)]
LETTERS = ["p", "q", "r", "s"]
DATA: Mapping[str, list[dict[str, Any]]] = {
    "mmlu": [
        {"task": "sea_life", "question": each, "choices": LETTERS, "answer": n}
        for n, each in enumerate(ASKED)
    ],
    "truthfulqa": [{"question": each, "mc1_targets": CHOICES} for each in ASKED],
    "bbh": [{"cot": "Say it.\n\nQ: x\nA: y", "question": each, "answer": "(A)"} for each in ASKED],
    "triviaqa": [{"question": each, "answers": ["Sandpiper"]} for each in (HELD, ASKED[1])],
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command's arguments: a base, a deletion-ready model and an adapter over it."""
    folder = tmp_path_factory.mktemp("utility")
    base = make_tiny_base(folder / "base", max_position_embeddings=1024)
    rows = [dict(row, prompt=f"Question: {row['prompt']}\nAnswer:") for row in PEOPLE[:5]]
    rows.append(dict(rows.pop(), prompt=f"Question: {HELD}\nAnswer:"))
    block = {"shards": 1, "slices": 1, "aggregation": {"method": "routed", "min_score": 0.99}}
    model = train_scratch(folder / "ours", base, rows, sisa_block=block)
    (adapter,) = model.export(folder / "adapter")
    for task, docs in DATA.items():
        text = "".join(json.dumps(doc) + "\n" for doc in docs)
        (folder / TASKS[task][0]).write_text(text, encoding="utf-8")
    specs = {"base": base, "ours": model.directory, "lora": adapter}
    models = [part for name, spec in specs.items() for part in ("--model", f"{name}={spec}")]
    return ["--data", str(folder), "--out", str(folder / "utility.json"), *models]


def found_by(arguments: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    main(arguments)
    found = json.loads(Path(arguments[3]).read_text(encoding="utf-8"))
    assert found["missing"] == []
    return {(row["model"], row["task"]): row for row in found["rows"]}


def test_models_are_compared_question_by_question(arguments: list[str]) -> None:
    rows = found_by(arguments)
    assert len(rows) == 3 * (len(TASKS) + 1)
    base_alone = {task: rows["ours", task]["by_base_alone"] for task in (*TASKS, "all")}
    assert base_alone == {"mmlu": 1, "truthfulqa": 1, "bbh": 1, "triviaqa": 0.5, "all": 7 / 8}
    for task in ("mmlu", "truthfulqa"):
        same = rows["ours", task]["beside_first"]["probability"]
        assert max(map(abs, (same["low"], same["high"]))) < 1e-5  # the base answered
        assert abs(rows["lora", task]["beside_first"]["probability"]["value"]) > 1e-4
    assert rows["base", "mmlu"]["probability"]["value"] == pytest.approx(letters(arguments), abs=1e-5)

    out = Path(arguments[3])
    cells = sorted(out.with_suffix(".cells").iterdir())
    assert not any("andpiper" in path.read_text() for path in (out, *cells))
    (gone,) = (path for path in cells if path.name == "ours-bbh.json")
    gone.unlink()
    written = {path: path.stat().st_mtime_ns for path in cells if path != gone}
    again = found_by(arguments)
    assert {key: row["right"] for key, row in again.items()} == {
        k: row["right"] for k, row in rows.items()
    }
    assert {path: path.stat().st_mtime_ns for path in written} == written, "finished cells are kept"


def letters(arguments: list[str]) -> float:
    """Return the mean probability of MMLU's right letters, by the base itself."""
    import torch

    base = open_evaluated(arguments[5].partition("=")[2])
    assert isinstance(base, HuggingFaceModel)
    shares = []
    for doc in DATA["mmlu"]:
        ids = base.tokenizer.encode(TASKS["mmlu"][1]["doc_to_text"](doc))
        every = []
        for letter in "ABCD":
            tokens = base.tokenizer.encode(f" {letter}")
            logits = base.model(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
            logs = torch.log_softmax(logits, dim=-1)
            every.append(sum(float(logs[at, token]) for at, token in enumerate(tokens)))
        shares.append(float(torch.softmax(torch.tensor(every), dim=0)[doc["answer"]]))
    return sum(shares) / len(shares)


def test_a_base_ends_its_answers_as_a_served_model_does(arguments: list[str]) -> None:
    """The harness drops the end token, and would judge what a base writes after it."""
    base, ours = (Contestant.opened("one", arguments[at].partition("=")[2]) for at in (5, 7))
    end = base.tokenizer.eos_token_id
    assert end in base.model.generation_config.eos_token_id
    assert ours.model.generation_config.eos_token_id == end


def test_a_prompt_that_is_cut_stops_the_run(arguments: list[str], tmp_path: Path) -> None:
    """Otherwise another text than the question would choose who answers."""
    long = {"question": "Sandpiper " * 200, "answers": ["x"]}
    (tmp_path / TASKS["triviaqa"][0]).write_text(json.dumps(long) + "\n")
    given = ["--data", str(tmp_path), "--out", str(tmp_path / "out.json"), *arguments[6:8]]
    with pytest.raises(ValueError, match="1 prompts were not looked up whole") as raised:
        main([*given, "--tasks", "triviaqa"])
    assert "andpiper" not in str(raised.value)


def test_a_row_has_intervals_and_counts_changed_answers() -> None:
    first = {"acc": [1.0, 0.0, 0.0, 1.0], "seconds": 1.0}
    row = summary("ours", "bbh", {"acc": [1.0, 1.0, 0.0, 0.0], "seconds": 1.0}, first)
    assert row["num_changed"] == 2
    assert row["beside_first"]["acc"]["value"] == 0
    assert row["beside_first"]["acc"]["low"] < 0 < row["beside_first"]["acc"]["high"]
    assert row["right"]["low"] < 0.5 < row["right"]["high"]
    (_, _, line) = table({"rows": [row]})
    assert line.startswith("| bbh (4) | ours | 0.500 (")


@pytest.mark.parametrize(("answer", "equal"), [("the Nile", False), ("nile", True), (" Nile!", True)])
def test_an_alias_is_matched_whole(answer: str, equal: bool) -> None:
    assert same_words("Nile", answer) is equal
