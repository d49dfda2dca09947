"""TOFU in full on a tiny base and invented authors: it resumes, checks equality, assembles its cells."""

from __future__ import annotations

import gzip
import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.errors import ConfigConflict, InvalidInput
from sisa.data.samples import make_people
from sisa.store.blobs.files import writer_lock
from tests.bench.tofu_full.__main__ import argument_parser, main, models_of
from tests.bench.tofu_full.design import FORM, Design, read_data
from tests.bench.tofu_full.split_model import Halves
from tests.bench.tofu_full.table import deletions_table, table, trials_table
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.slow]
TINY = (
    *("--embedder", "hashing", "--shards", 1, "--key-seeds", 1, "--epochs", 1, "--rates", 1e-5, 0.01),
    *("--batches", 8, "--tried-authors", 1, "--lora-layers", "top:1", "--lora-r", 4),
    *("--retain", 4, "--facts", 2, "--wrong-answers", 2, "--max-new-tokens", 4),
    *("--methods", "npo", "--budgets", 2.0, "--method-rates", 0.001),
    *("--attacked-authors", 1, "--relearning-steps", 2, "--samples", 2),
)


def write_tofu(directory: Path, num_authors: int = 3, forgotten: int = 1) -> Path:
    """Write TOFU's layout: invented authors of twenty questions each, and four facts a set.

    The last authors are every forget set.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": person["prompt"],
            "answer": person["completion"].strip(),
            "paraphrased_answer": f"Surely {person['completion'].strip()}",
            "perturbed_answer": [f"Surely {other}." for other in ("nothing", "all", "none")],
        }
        for person in make_people(num_authors * 5, 4)
    ]
    facts = [
        {"question": f"What follows {n}?", "answer": str(n + 1), "perturbed_answer": [str(n), "9", "8"]}
        for n in range(4)
    ]
    sets = {"full": rows, "retain_perturbed": rows[:20]}
    sets |= {"real_authors_perturbed": facts, "world_facts_perturbed": facts}
    for split in ("forget01", "forget05", "forget10"):
        sets |= dict.fromkeys((split, f"{split}_perturbed"), rows[-20 * forgotten :])
    for name, some in sets.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory


class Bench:
    """The command with the options of a tiny run."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.base = make_tiny_base(folder / "base", layers=2)
        self.data = write_tofu(folder / "tofu")

    @property
    def options(self) -> list[str]:
        shared = ("--base", self.base, "--tofu", self.data, "--out", self.out)
        return [str(each) for each in (*shared, *TINY)]

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        main([*self.options, *map(str, arguments)])
        found: dict[str, Any] = json.loads((self.out / "tofu_full.json").read_text())
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("tofu_full"))


FACTS = {"real_authors", "world_facts"}
CELLS = (
    *("1x4-key0.made", "1x4-key0-forget10.*", "1x4-key0-forget10-scratch.made"),
    *("lora-without-forget10-seed42.asked", "npo-*-forget10.asked"),
)


@pytest.fixture(scope="module")
def ran(bench: Bench) -> dict[str, Any]:
    return bench("--cells", *CELLS)


def test_every_cell_is_computed_once(bench: Bench, ran: dict[str, Any]) -> None:
    written = {path: path.stat().st_mtime_ns for path in (bench.out / "cells").iterdir()}
    gone = bench.out / "cells" / "npo-2-0.001-forget10.asked.json"
    gone.unlink()
    again = bench("--cells", *CELLS)
    assert again == ran  # the log is still held, so that nothing was asked again
    changed = {path for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert changed == {gone}


def test_assembly_reads_what_cells_wrote(bench: Bench, ran: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in ran["rows"]}
    asked = {name for name, row in rows.items() if row["model_utility"]}
    assert asked == {
        "1x4-key0-forget10", "lora-without-forget10-seed42", "npo-2-0.001-forget10"
    }  # fmt: skip
    assert set(rows) - asked == {"1x4-key0", "lora"}  # made, and not asked
    ours = rows["1x4-key0-forget10"]
    made = json.loads((bench.out / "cells" / "1x4-key0-forget10.made.json").read_text())
    assert ours["core_seconds"] == made["core_seconds"]
    assert 0 < made["share_of_training"] < 1
    assert ours["forget"]["rouge"]["num"] == ours["forget_quality"]["num_model"] == 20
    assert set(ours["attacked"]) >= {"relearnt_in_domain", "rounded_to_4_bits", "leak_at_k"}
    assert ours["attacked"]["as_it_is"]["num"] == 15
    assert 1.5 < rows["npo-2-0.001-forget10"]["share_of_training"] < 2.5
    assert rows["lora-without-forget10-seed42"]["forget_quality"] is None  # there is no second seed
    assert "1x4-key0.asked" in ran["missing"]
    assert "1x4-key0.made" not in ran["missing"]
    assert "Surely" not in json.dumps(ran)
    assert (bench.out / "tofu_full.png").read_bytes().startswith(b"\x89PNG")
    in_full = ran["tried_in_full"]
    assert all({"retain", "written_retain"} <= each.keys() for each in in_full)
    best, other = sorted(in_full, key=lambda each: each["score"], reverse=True)
    trials = [line.split(" | ") for line in trials_table(ran)][2:]
    assert [(name, rate) for name, rate, *_, score, _ in trials if "**" in score] == [
        ("| ours, 1x4", "0.01"),
        ("| ordinary LoRA, a tenth of the records", "0.01"),
        ("| ordinary LoRA, all records", f"{best['learning_rate']:g}"),
    ]
    assert len(trials) == 6
    kept = bench.out / "adapters"
    taken, left = (kept / f"lora-rate{each['learning_rate']:g}" / ADAPTER_FILE for each in (best, other))
    assert taken.read_bytes() == (kept / "lora" / ADAPTER_FILE).read_bytes() != left.read_bytes()
    lines = list(table(ran))
    assert len(lines) == 2 + 6
    assert any(line.startswith("| ours, 1x4, before | 1 | - / - | - |") for line in lines)
    assert any("1 of 1 adapters equal" in line for line in lines)
    assert any(line.startswith("| ours, 1x4, after an exact deletion | 1 |") for line in lines)
    (deleted,) = [line.strip("| ").split(" | ") for line in deletions_table(ran)][2:]
    assert deleted[:4] == ["1x4", "forget10", "1", f"{made['share_of_training']:.1%}"]
    memorised = f"{ours['forget']['exact_memorisation']['value']:.2f}"
    assert deleted[5] == f"- / {memorised} / -"  # the others were not asked


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("name", ["1x4-key0-forget10", "lora-without-forget10-seed42", "base"])
def test_scores_over_kept_lower_states_are_those_of_the_whole_model(bench: Bench, name: str) -> None:
    models, states = models_of(argument_parser().parse_args(bench.options)), bench.out / "states"
    asked = models.data.asked("forget10")
    pairs = [(each.question, text) for each in asked for text in (each.answer, *each.perturbed)]
    with models.served(models.by_name[name]) as model:
        assert isinstance(model, Halves)
        wanted = model.whole.score(pairs, FORM, 16)
        for each in states.iterdir():
            each.unlink()
        for kept in (False, True):
            assert any(states.iterdir()) == kept
            for one, other in zip(model.score(pairs, FORM, 16), wanted, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("method", ["altpo", "memit", "rmu", "task_arithmetic", "whp"])
def test_methods_of_every_kind_change_the_ordinary_lora(bench: Bench, method: str) -> None:
    """Written answers, refusals, edits, and a layer of the method's own choice."""
    found = bench("--methods", method, "--method-seeds", 1, "--cells", f"{method}-*.asked")
    (row,) = (each for each in found["rows"] if each["kind"] == "method")
    assert (row["method"], row["seed"], row["state"]) == (method, 1, "unlearned")
    (reference,) = (each for each in found["rows"] if each["name"] == "lora-without-forget10-seed42")
    assert row["forget"]["probability"] != reference["forget"]["probability"]
    if method != "memit":
        assert 1 < row["share_of_training"] < 3


def test_the_last_authors_are_all_there_are(tmp_path: Path) -> None:
    data = read_data(str(write_tofu(tmp_path, 20, 10)), replace(Design(), authors=10))
    assert (len(data.full), len(data.forget), data.sizes) == (200, 20, {"forget10": 20})
    assert [each.question for each in data.forget] == [each.question for each in data.full[-20:]]
    assert {each.question for each in data.retain} < {each.question for each in data.full[:-20]}
    assert [each.idx for each in data.forget] == list(range(20))
    assert data.kept("forget10") == 180
    assert {each.set for each in data.retain} == {"retain"} == {each.set for each in data.tuned} - FACTS
    assert {each.set for each in data.asked("forget10")} == {"retain", "forget", *FACTS}
    assert {each.place for each in data.retain}.isdisjoint(each.place for each in data.tuned)
    assert not {each.question for each in data.tuned} & {
        each.question for each in data.asked("forget10")
    }
    with pytest.raises(InvalidInput, match="fewer authors"):
        read_data(str(tmp_path), replace(Design(), authors=15))


def test_equality_is_of_bytes(bench: Bench, ran: dict[str, Any]) -> None:
    (found,) = ran["equal"]
    assert found["equal"]
    assert found["adapters_equal"] == found["adapters"] == 1
    deleted, scratch = (
        bench.out / "cells" / f"1x4-key0-forget10{each}.made.json" for each in ("", "-scratch")
    )
    kept = deleted.read_text(), scratch.read_text()
    held = json.loads(kept[0])
    held["adapters"]["0"] = "0" * 64
    deleted.write_text(json.dumps(held))
    scratch.unlink()
    try:
        (found,) = bench("--cells", "*-scratch.made")["equal"]
    finally:
        deleted.write_text(kept[0])
        scratch.write_text(kept[1])
    assert not found["equal"]
    assert found["adapters_equal"] == 0


def test_a_cell_that_another_process_computes_is_left_for_later(
    bench: Bench, ran: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bench.out / "cells" / "npo-2-0.001-forget10.asked.json"
    asked.unlink()
    lock = writer_lock(bench.out / "locks" / asked.stem)
    lock.__enter__()
    waited = []

    def ended(seconds: float) -> None:
        waited.append(seconds)
        lock.__exit__(None, None, None)

    monkeypatch.setattr("tests.bench.tofu_full.__main__.time.sleep", ended)
    assert bench("--cells", *CELLS) == ran
    assert len(waited) == 1


def test_another_machine_goes_on_from_the_cells(
    bench: Bench, ran: dict[str, Any], tmp_path: Path
) -> None:
    """It makes only the models that it needs, and its numbers are those of one run."""
    results = tmp_path / "results.json"
    bench("--assemble", "--results", results)
    packed = gzip.decompress((tmp_path / "results.cells.json.gz").read_bytes())
    assert b"Surely" not in packed
    other = copy(bench)
    other.out = tmp_path / "out"
    assert other("--assemble", "--results", results) == ran
    assert not (other.out / "models").exists()
    name = "1x4-key0-forget10"
    (other.out / "cells" / f"{name}.asked.json").unlink()
    (tmp_path / "results.cells.json.gz").unlink()
    assert other("--cells", f"{name}.asked", "--results", results)["rows"] == ran["rows"]
    assert {each.stem for each in (other.out / "models").glob("*.made")} == {"1x4-key0", name}
    with pytest.raises(ConfigConflict, match="another design"):
        Bench.__call__(other, "--results", results, "--out", tmp_path / "third", "--epochs", 2)


@pytest.mark.usefixtures("ran")
def test_another_key_joins_once_its_deletion_was_attacked(bench: Bench, tmp_path: Path) -> None:
    other = copy(bench)
    other.out = tmp_path
    cells = copytree(bench.out / "cells", tmp_path / "cells")
    for cell in [*cells.glob("1x4-key0*")]:
        copyfile(cell, cells / cell.name.replace("key0", "key1"))
    attacked = cells / "1x4-key1-forget10.attacked.json"
    kept = attacked.read_bytes()
    attacked.unlink()
    waiting = other("--assemble", "--key-seeds", 2)
    assert not any(row["key"] for row in waiting["rows"])
    assert attacked.stem in waiting["missing"]
    attacked.write_bytes(kept)
    joined = other("--assemble", "--key-seeds", 2)
    assert sorted(row["name"] for row in joined["rows"] if row["key"]) == [
        "1x4-key1",
        "1x4-key1-forget10",
    ]


@pytest.mark.usefixtures("ran")
def test_another_design_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigConflict, match="another design"):
        bench("--epochs", 2)
