"""Reading records: every form is read, every defect is named by its place, and no text leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.config.sources import DatasetSource, SourceLimits
from sisa.core.domain import Part, Record
from sisa.core.errors import EnvironmentFault, InvalidInput, Problem
from sisa.data import dataset_export
from sisa.data.reader import Subjects, located_problems, read_ids, read_prompts, read_records
from sisa.store.blobs import temporary_directories

SECRET = "Quorvane"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": SECRET}]
ROWS: list[dict[str, Any]] = [
    {"id": "r1", "subject_id": "ada", "text": SECRET, "other": 1},
    {"id": "r2", "subject_id": None, "prompt": "", "completion": SECRET},
    {"id": "r3", "messages": CHAT},
]
RECORDS = [
    Record("r1", "ada", "text", (Part("text", SECRET),)),
    Record("r2", None, "completion", (Part("prompt", ""), Part("completion", SECRET))),
    Record("r3", None, "chat", (Part("user", "Who?"), Part("assistant", SECRET))),
]


def refused(sources: list[Any]) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        read_records(sources)
    assert SECRET not in json.dumps(caught.value.to_json())
    assert caught.value.what.endswith("in the records; nothing was read")
    return [(each.where, each.what) for each in caught.value.problems]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_prompts_are_read_in_the_forms_of_records(tmp_path: Path, suffix: str) -> None:
    write, file = parquet if suffix == ".parquet" else jsonl, tmp_path / f"asked{suffix}"
    good: list[dict[str, Any]] = [
        {"prompt": "Who?", "messages": None},
        {"prompt": None, "messages": CHAT[:1]},
    ]
    assert read_prompts(write(file, good)) == ["Who?", CHAT[:1]]
    rows = [good[0], {"prompt": SECRET, "messages": CHAT}, {"text": SECRET}]
    with pytest.raises(InvalidInput) as caught:
        read_prompts(write(file, rows))
    unit = "row" if suffix == ".parquet" else "line"
    expected = [f"asked{suffix}, {unit} {number}" for number in (2, 3)]
    assert [each.where for each in caught.value.problems] == expected
    assert SECRET not in json.dumps(caught.value.to_json())
    for empty in (tmp_path / "missing.jsonl", write(tmp_path / f"none{suffix}", [])):
        with pytest.raises(InvalidInput):
            read_prompts(empty)


def test_json_lines_are_read_with_any_line_ends(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    file.write_bytes(b"\xef\xbb\xbf\r\n" + file.read_bytes().replace(b"\n", b"\r\n\r\n") + b"  \n")
    assert read_records([file]) == RECORDS


def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    columns = ("id", "subject_id", "text", "prompt", "completion", "messages", "other")
    rows = [{name: row.get(name) for name in columns} for row in ROWS]
    assert read_records([parquet(tmp_path / "a.parquet", rows)]) == RECORDS


def test_a_directory_of_files_and_several_sources(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "b.jsonl", ROWS[2:])
    jsonl(folder / "a.json", ROWS[1:2])
    (folder / "README.md").write_text("not data")
    first = jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert read_records([str(first), DatasetSource(path=str(folder))]) == RECORDS


def test_the_subject_comes_from_the_named_column(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl", [{"id": "r1", "text": "x", "author": "ada"}, {"id": "r2", "text": "y"}]
    )
    assert [each.subject_id for each in read_records([file], "author")] == ["ada", None]
    message = (
        "0 of 2 records have a subject (column 'autor'); columns not used: author; name the column, "
    )
    message += "or set `group_by: null` if records have no subject"
    needs: list[Subjects] = ["some", "column"]
    for needed in needs:
        with pytest.raises(InvalidInput) as caught:
            read_records([file], "autor", subjects=needed)
        assert caught.value.problems == (Problem("sisa.group_by", message),)
    assert [each.subject_id for each in read_records([file], None, subjects="some")] == [None, None]


def test_what_is_not_used_of_the_sources_is_reported(tmp_path: Path) -> None:
    rows = [{"id": 1001, "text": "x", "customer_id": "cust-1001", "te\x1bam": 1}, {"id": 2, "text": "y"}]
    lines = jsonl(tmp_path / "a.jsonl", rows)
    table = parquet(tmp_path / "b.parquet", [{"id": "r3", "text": "z", "subject_id": 7, "age": 40}])
    found = read_records([lines, table], subjects="some")
    assert [(each.id, each.subject_id) for each in found] == [("1001", None), ("2", None), ("r3", "7")]
    report = (
        "1 of 3 records have a subject (column 'subject_id'); columns not used: customer_id, team, age"
    )
    assert found.subject_report() == report
    empty = jsonl(tmp_path / "c.jsonl", [{"id": "r4", "text": "x", "subject_id": None}])
    assert len(read_records([empty], subjects="column")) == 1


def test_columns_have_the_names_that_the_source_gives_them(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": SECRET}]
    rows = [{"key": 1, "question": "Who?", "answer": SECRET, "prompt": 3}, {"key": 2, "turns": turns}]
    mapped = {"id_column": "key", "prompt_column": "question", "completion_column": "answer"}
    mapped |= {"messages_column": "turns"}
    keys = {"message_property_mappings": {"role": "from", "content": "value"}}
    expected = [
        Record("1", None, "completion", (Part("prompt", "Who?"), Part("completion", SECRET))),
        Record("2", None, "chat", (Part("user", "Who?"), Part("assistant", SECRET))),
    ]
    names = ("key", "question", "answer", "prompt", "turns")
    whole = [{name: row.get(name) for name in names} for row in rows]
    files = [jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", whole)]
    for file in files:
        source = DatasetSource.model_validate({"path": str(file), **mapped, **keys})
        assert read_records([source]) == expected
    jsonl(tmp_path / "a.jsonl", [{"id": 1, "prompt": "x", "completion": SECRET}])
    problems = refused([DatasetSource.model_validate({"path": str(files[0]), **mapped})])
    assert [what for _, what in problems] == [
        "no 'key'",
        "no body; expected 'text', or 'question' and 'answer', or 'turns'",
    ]


def test_turns_of_tools_and_pieces_of_text_are_taken(tmp_path: Path) -> None:
    pieces = [{"type": "text", "text": "Who"}, {"type": "text", "text": " is it?"}]
    turns = [
        {"role": "user", "content": pieces},
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "Ada", "name": "look"},
        {"role": "assistant", "content": SECRET},
    ]
    (found,) = read_records([jsonl(tmp_path / "a.jsonl", [{"id": "r", "messages": turns}])])
    read = [(each.role, each.text) for each in found.parts]
    assert read == [
        ("user", "Who is it?"),
        ("assistant", "I look."),
        ("tool", "Ada"),
        ("assistant", SECRET),
    ]


# --- too much of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["people.jsonl", "people.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    what = "expected a regular file, got a pipe, a socket or a device"
    assert refused([tmp_path / name]) == [(name, what)]
    assert refused([tmp_path]) == [(tmp_path.name, what)]


def test_a_long_line_is_never_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("wb") as sink:
        sink.write(b'{"id": "r1", "text": "')
        sink.truncate(1 << 30)  # a gigabyte of NUL, which takes no room
        sink.seek(0, os.SEEK_END)
        sink.write(b'"}\n{"id": "r2", "text": "fine"}\n')
    tracemalloc.start()
    assert refused([file]) == [("a.jsonl, line 1", "longer than limits.max_record_bytes 1048576")]
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_small_table_of_many_equal_rows_is_refused_at_once(tmp_path: Path) -> None:
    rows = 20_000_000
    column = pa.DictionaryArray.from_arrays(np.zeros(rows, dtype=np.int32), pa.array([SECRET]))
    pq.write_table(pa.table({"id": column, "text": column}), tmp_path / "a.parquet")
    assert refused([tmp_path / "a.parquet"]) == [
        ("a.parquet", "20000000 rows, more than limits.max_records 2000000")
    ]


def test_a_long_text_that_a_table_repeats_is_in_memory_once(tmp_path: Path) -> None:
    """8 MB in each of 24 rows, at rest in some kilobytes."""
    text = "a" * 8_000_000
    turns = [[{"role": "assistant", "content": text}]] * 24
    ids = [f"r{number}" for number in range(24)]
    pq.write_table(pa.table({"id": ids, "text": [text] * 24}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ids, "messages": turns}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        tracemalloc.start()
        problems = refused([tmp_path / name])
        assert problems == [
            (f"{name}, row {n}", "longer than limits.max_record_bytes 1048576") for n in range(1, 25)
        ]
        assert tracemalloc.get_traced_memory()[1] < 10 * len(text)
        tracemalloc.stop()


def test_limits_are_the_users_to_raise(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "text": "x" * 30} for n in range(5)]
    files = [jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)]
    for file in files:
        for limits, what in (
            (SourceLimits(max_records=4), "limits.max_records 4"),
            (SourceLimits(max_bytes=149), "limits.max_bytes 149"),
            (SourceLimits(max_record_bytes=29), "limits.max_record_bytes 29"),
        ):
            with pytest.raises(InvalidInput) as caught:
                read_records([file], limits=limits)
            assert what in caught.value.problems[-1].what
        roomy = SourceLimits(max_records=5, max_bytes=1000, max_record_bytes=100)
        assert len(read_records([file], limits=roomy)) == 5


def test_all_problems_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"id": "r", "text": "x"}] * 12)
    with pytest.raises(InvalidInput) as caught:
        read_records([file], limits=SourceLimits(max_problems=3))
    assert caught.value.what == "11 problems in the records; nothing was read"
    assert [each.where for each in caught.value.problems] == [
        *("a.jsonl, line 2", "a.jsonl, line 3", "a.jsonl, line 4"),
        "limits.max_problems",
    ]
    assert caught.value.problems[-1].what == "8 more problems are not listed"


DEFECTS: dict[str, bytes] = {
    "broken": b'{"id": "x1", "text": "Quorvane"',
    "utf8": b'{"id": "x2", "text": "Quorvane \xff"}',
    "array": b'["Quorvane"]',
    "string": b'"Quorvane"',
    "twice": b'{"id": "x3", "text": "Quorvane", "text": "y"}',
    "nan": b'{"id": "x4", "text": "Quorvane", "score": NaN}',
    "digits": b'{"id": "x5", "text": "Quorvane", "score": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "no id": b'{"text": "Quorvane"}',
    "null id": b'{"id": null, "text": "Quorvane"}',
    "fraction id": b'{"id": 3.5, "text": "Quorvane"}',
    "flag id": b'{"id": true, "text": "Quorvane"}',
    "empty id": b'{"id": " ", "text": "Quorvane"}',
    "long id": b'{"id": "' + b"Quorvane" * 65 + b'", "text": "x"}',
    "control id": b'{"id": "Quorvane\\n", "text": "x"}',
    "surrogate id": b'{"id": "Quorvane\\ud800", "text": "x"}',
    "subject type": b'{"id": "x6", "subject_id": ["3"], "text": "Quorvane"}',
    "subject empty": b'{"id": "x7", "subject_id": "", "text": "Quorvane"}',
    "no body": b'{"id": "x8"}',
    "two bodies": b'{"id": "x9", "text": "Quorvane", "messages": []}',
    "empty text": b'{"id": "x10", "text": ""}',
    "blank text": b'{"id": "x11", "text": " \\n"}',
    "text type": b'{"id": "x12", "text": ["Quorvane"]}',
    "nul": b'{"id": "x13", "text": "Quorvane\\u0000"}',
    "surrogate": b'{"id": "x14", "text": "Quorvane\\udfff"}',
    "no completion": b'{"id": "x15", "prompt": "Quorvane"}',
    "no prompt": b'{"id": "x16", "completion": "Quorvane"}',
    "empty completion": b'{"id": "x17", "prompt": "Quorvane", "completion": " "}',
    "messages type": b'{"id": "x18", "messages": "Quorvane"}',
    "turn type": b'{"id": "x19", "messages": ["Quorvane"]}',
    "role": b'{"id": "x20", "messages": [{"role": "Quorvane", "content": "x"}]}',
    "role type": b'{"id": "x21", "messages": [{"role": ["Quorvane"], "content": "x"}]}',
    "content": b'{"id": "x22", "messages": [{"role": "assistant", "content": null}]}',
    "image": b'{"id": "x24", "messages": [{"role": "assistant", "content": [{"type": "Quorvane"}]}]}',
    "tool call": b'{"id": "x25", "messages": [{"role": "assistant", "tool_calls": ["Quorvane"]}]}',
    "chat as prompt": b'{"id": "x26", "prompt": [{"role": "user"}], "completion": "Quorvane"}',
    "no answer": b'{"id": "x23", "messages": [{"role": "user", "content": "Quorvane"}]}',
    "risk flag": b'{"id": "x27", "text": "Quorvane", "deletion_risk": true}',
    "risk list": b'{"id": "x28", "text": "Quorvane", "deletion_risk": [0.1]}',
    "risk below 0": b'{"id": "x29", "text": "Quorvane", "deletion_risk": -0.5}',
    "risk beyond": b'{"id": "x30", "text": "Quorvane", "deletion_risk": 1e301}',
    "risk blank": b'{"id": "x31", "text": "Quorvane", "deletion_risk": " "}',
    "generation flag": b'{"id": "x32", "text": "Quorvane", "generation": true}',
    "generation fraction": b'{"id": "x33", "text": "Quorvane", "generation": 1.5}',
    "generation text": b'{"id": "x34", "text": "Quorvane", "generation": "1"}',
    "generation below 0": b'{"id": "x35", "text": "Quorvane", "generation": -1}',
    "generation beyond": b'{"id": "x36", "text": "Quorvane", "generation": 10000}',
    "duplicate": b'{"id": "first", "text": "Quorvane"}',
}


@given(
    lines=st.lists(st.sampled_from([None, "blank", *DEFECTS]), max_size=12),
    end=st.sampled_from([b"", b"\n"]),
)
@settings(max_examples=60, deadline=None)
def test_exactly_the_defective_lines_are_named(lines: list[str | None], end: bytes) -> None:
    data = [b'{"id": "first", "text": "x"}']
    wrong = set()
    for number, defect in enumerate(lines, start=2):
        if defect is None:
            data.append(b'{"id": "r%d", "text": "x"}' % number)
        elif defect == "blank":
            data.append(b" ")
        else:
            data.append(DEFECTS[defect])
            wrong.add(f"people.jsonl, line {number}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "people.jsonl")
        file.write_bytes(b"\n".join(data) + end)
        if wrong:
            assert {where for where, _ in refused([file])} == wrong
        else:
            assert len(read_records([file])) == 1 + lines.count(None)


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_one_problem(tmp_path: Path, defect: str) -> None:
    file = tmp_path / "people.jsonl"
    file.write_bytes(b'{"id": "first", "text": "x"}\n' + DEFECTS[defect])
    found = refused([file])
    assert {where for where, _ in found} == {"people.jsonl, line 2"}
    assert all(len(what) < 150 for _, what in found)


def test_a_duplicate_names_the_line_of_the_first(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", ROWS)
    second = jsonl(tmp_path / "b.jsonl", ROWS[1:])
    assert refused([first, second]) == [
        ("b.jsonl, line 1", "the id of a.jsonl, line 2 again"),
        ("b.jsonl, line 2", "the id of a.jsonl, line 3 again"),
    ]


def test_what_is_found_later_is_reported_by_line(tmp_path: Path) -> None:
    """Blank lines and the files before count; what has another place, or no source, is left as it is."""
    for name, lines in (("a.jsonl", "\n" + json.dumps(ROWS[0])), ("b.jsonl", json.dumps(ROWS[1]))):
        (tmp_path / name).write_text(lines + "\n", encoding="utf-8")
    found = read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    problems = [
        Problem("record 2", "not as record 1"),
        Problem("record 1", "bad"),
        Problem("shard 0, record 1 of the stage", "long"),
    ]
    listed = []
    for source in (found, list(found)):
        with pytest.raises(InvalidInput) as caught, located_problems(source):
            raise InvalidInput("bad", problems=problems)
        listed.append([(each.where, each.what) for each in caught.value.problems])
    assert listed[0] == [
        ("b.jsonl, line 1", "not as a.jsonl, line 2"),
        ("a.jsonl, line 2", "bad"),
        ("shard 0, record 1 of the stage", "long"),
    ]
    assert listed[1] == [(each.where, each.what) for each in problems]


def test_files_of_one_name_are_distinguished(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    files = [jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "x" / "a.jsonl", ROWS[:1])]
    assert refused(list(files)) == [(f"{files[1]}, line 1", f"the id of {files[0]}, line 1 again")]


def test_problems_of_all_sources_are_collected(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.csv").touch()
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"id": ["r1"], "body": [SECRET]}), tmp_path / "body.parquet")
    pq.write_table(pa.table({"text": [SECRET]}), tmp_path / "id.parquet")
    pq.write_table(pa.table({"id": [1.5, 2.5], "text": [SECRET, " "]}), tmp_path / "rows.parquet")
    whole = parquet(tmp_path / "whole.parquet", [{"id": f"r{n}", "text": SECRET} for n in range(99)])
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    names = [
        *("empty.jsonl", "table.csv", "folder", "body.parquet", "id.parquet", "rows.parquet"),
        *("cut.parquet", "absent.jsonl"),
    ]
    found = refused([tmp_path / name for name in names])
    assert [where for where, _ in found] == [
        *("empty.jsonl", "table.csv", "folder", "body.parquet", "id.parquet"),
        *("rows.parquet, row 1", "rows.parquet, row 2", "rows.parquet, row 2"),
        *("cut.parquet", str(tmp_path / "absent.jsonl")),
    ]
    assert "truncated" in dict(found)["cut.parquet"]


def test_corrupt_pages_and_texts_in_parquet(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"Quorvane \xff", b"fine"]).view(pa.utf8())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": texts}), tmp_path / "utf8.parquet")
    assert refused([tmp_path / "utf8.parquet"]) == [("utf8.parquet, row 2", "invalid UTF-8")]
    rows = [{"id": f"r{n}", "text": SECRET * n} for n in range(1, 99)]
    data = bytearray(parquet(tmp_path / "page.parquet", rows).read_bytes())
    data[4:400] = b"\xff" * 396
    (tmp_path / "page.parquet").write_bytes(data)
    assert refused([tmp_path / "page.parquet"])[0][0].startswith("page.parquet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what `save_to_disk` of `datasets` writes: an Arrow stream and two JSON files."""
    folder = tmp_path_factory.mktemp("saved") / "people"
    folder.mkdir()
    table = pa.table({"id": ["r1", "r3"], "text": [SECRET, "x"]})
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("id", "text")}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    state |= {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0"}
    state |= {"_format_kwargs": {}, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def scratch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home").mkdir()


def leftovers(tmp_path: Path) -> list[Path]:
    return [each for each in tmp_path.rglob("*") if each.name not in ("home", "scratch")]


def test_a_saved_dataset_leaves_no_trace(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch_home(tmp_path, monkeypatch)
    assert [each.text for each in read_records([saved])] == [SECRET, "x"]
    assert leftovers(tmp_path) == []


def test_texts_of_a_killed_reader_are_erased_by_the_next_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch_home(tmp_path, monkeypatch)
    code = (
        "from sisa.store.blobs.temporary_directories import temporary_directory\n"
        "with temporary_directory() as folder:\n"
        "    (folder / 'rows').write_text('a text')\n    print('there', flush=True)\n    input()"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"there\n"
        (kept,) = (tmp_path / "scratch").iterdir()
        monkeypatch.setattr(temporary_directories, "LEAST_AGE_S", 0.0)
        read_records([saved])
        assert (kept / "rows").exists(), "its reader lives"
        reader.kill()
        reader.wait()
    assert (kept / "rows").exists()
    monkeypatch.setattr(temporary_directories, "LEAST_AGE_S", 60.0)
    read_records([saved])
    assert kept.exists(), "a young one may not be locked yet"
    monkeypatch.setattr(temporary_directories, "LEAST_AGE_S", 0.0)
    read_records([saved])
    assert leftovers(tmp_path) == []


def test_a_damaged_saved_dataset(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch_home(tmp_path, monkeypatch)
    copy = saved.parent / "damaged"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 60 if file.suffix == ".arrow" else None])
    assert [where for where, _ in refused([copy])] == ["damaged"]
    assert leftovers(tmp_path) == []


def test_an_unreachable_hub_is_a_fault_of_the_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch_home(tmp_path, monkeypatch)
    with pytest.raises(EnvironmentFault, match="owner/people"):
        read_records(["owner/people"])
    assert leftovers(tmp_path) == []


def test_the_childs_caches_are_scratch_and_its_token_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", "/users/home")
    monkeypatch.setenv("HF_HUB_CACHE", "/users/cache")
    environ = dataset_export._environment(tmp_path)
    assert environ["HF_TOKEN_PATH"] == os.path.join("/users/home", "token")
    assert environ["HF_HOME"].startswith(str(tmp_path))
    assert "/users/cache" not in environ.values()


def test_ids_are_read_once_each(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_bytes("\ufeffr1\n\n r2 \r\nr1\né".encode())
    assert read_ids(file) == ["r1", " r2 ", "é"]


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"Quorvane\n\xff\nb\tc\n" + b"d" * 513, ["ids, line 2", "ids, line 3", "ids, line 4"]),
        (b"\n \n", ["ids"]),
        (None, ["ids"]),
    ],
)
def test_bad_ids_files_are_refused_by_line(tmp_path: Path, data: bytes | None, where: list[str]) -> None:
    if data is not None:
        (tmp_path / "ids").write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_ids(tmp_path / "ids")
    assert [each.where for each in caught.value.problems] == where
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("given", ["Jos\u00e9", "Jose\u0301", " Jos\u00e9 "])
def test_a_subject_has_one_spelling(tmp_path: Path, given: str) -> None:
    file = tmp_path / "people.jsonl"
    file.write_text(json.dumps({"id": "r1", "subject_id": given, "text": "x"}))
    assert [each.subject_id for each in read_records([file])] == ["Jos\u00e9"]
