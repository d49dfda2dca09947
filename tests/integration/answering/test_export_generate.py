"""Exported adapters and answers.

Exported directories are standard ones: peft loads them as they are, with the logits of the constituent
models. Answers are a function of the remaining records only, however the model came to them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa.core.errors import ConfigConflict
from sisa.core.events import Notice
from sisa.core.ports import Change
from sisa.flows.answers.ask import Answer
from sisa.flows.answers.routing import HeldPrompts, _look_up_prompts
from sisa.lm.routing.route import Route, all_of
from tests.models.patched import QUIET, answerer_of, probabilities
from tests.models.programs.frozen import BOUND, freeze
from tests.models.tiny_model import (
    PEOPLE,
    PROMPT,
    Row,
    Tiny,
    change_run,
    command,
    ids_of,
    next_token_probabilities,
    of_people,
    train_scratch,
    without,
    write_rows,
    write_run,
)

pytestmark = pytest.mark.torch


@QUIET
def test_peft_loads_every_exported_adapter_with_the_shards_logits(tiny: Tiny) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.tokens import encode_prompt

    model = tiny.open()
    made = model.export(tiny.folder / "export")
    answerer = answerer_of(model)
    ids = encode_prompt(PROMPT, answerer.tokenizer, "completion")
    base = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
    plain = probabilities(base, ids)
    assert [path.name for path in made] == ["shard-00000", "shard-00001", "shard-00002"]
    seen = []
    for shard, path in enumerate(made):
        expected = next_token_probabilities(answerer, ids, all_of((shard,)))
        base = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
        as_it_is = probabilities(PeftModel.from_pretrained(base, path), ids)
        by_its_config = probabilities(AutoPeftModelForCausalLM.from_pretrained(path), ids)
        torch.testing.assert_close(as_it_is, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(by_its_config, expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-6), "the adapter does something"
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-3, atol=1e-6)


def test_an_export_holds_an_adapter_a_shard_with_its_card_and_no_trace_of_training(tiny: Tiny) -> None:
    made = tiny.open().export(tiny.folder / "export")
    for path in made:
        names = sorted(each.name for each in path.iterdir())
        assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((path / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", 4)
        assert config["base_model_name_or_path"] == str(tiny.base)
    assert tiny.open().verify().ok


@QUIET
def test_merged_forms_are_the_mean_of_the_shards_weights(tiny: Tiny) -> None:
    """Both load in plain tools and give the logits of our own aggregation; each step is reported."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.tokens import encode_prompt

    change_run(tiny.run_file, sisa__aggregation="merged")
    tiny.train()
    model = tiny.open()
    (adapter,) = model.export(tiny.folder / "export", "merged-adapter")
    notices: list[str] = []
    model.report = lambda event: notices.append(event.text) if isinstance(event, Notice) else None
    (whole,) = model.export(tiny.folder / "export", "merged-model")
    steps = ["loading the base", "averaging the adapters of 3", "adding the average", "writing the"]
    merging = [each for each in notices if not each.startswith("comparing")]
    assert [each.startswith(step) for each, step in zip(merging, steps, strict=True)] == [True] * 4
    answerer, _ = model.answerer()
    ids = encode_prompt(PROMPT, answerer.tokenizer, "completion")
    expected = next_token_probabilities(answerer, ids, all_of((0, 1, 2)))
    assert not torch.allclose(expected, next_token_probabilities(answerer, ids, all_of(())), rtol=1e-3)
    as_adapter = probabilities(AutoPeftModelForCausalLM.from_pretrained(adapter), ids)
    as_model = probabilities(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32), ids)
    torch.testing.assert_close(as_adapter, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(as_model, expected, rtol=1e-4, atol=1e-7)
    for path in (adapter, whole):
        card = (path / "README.md").read_text()
        assert "average of the shards' weights" in card
        assert "mean answer probability" in card
        assert ("--max-lora-rank 16" in card) == (path == adapter)  # three shards of rank 4
        assert not any(name in card for name in ids_of(PEOPLE))
    assert [each.shards for each in model.status().exports] == [(0, 1, 2)] * 2
    done = model.forget(ids_of(of_people("p004")))
    assert done.request is not None
    assert done.request.exports_erased == 2
    assert not adapter.exists()
    assert not whole.exists()
    assert model.status().exports == ()


def test_answers_are_those_of_a_model_that_never_held_the_deleted(
    tmp_path: Path, tiny_base: Path
) -> None:
    """With enough training for the answers to differ; both aggregations of the same two models."""
    learning: dict[str, Any] = {
        "num_epochs": 24,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
    }
    gone = of_people("p001", "p005", "p006")
    lived, scratch = (Tiny(tmp_path / name, tiny_base) for name in ("lived", "scratch"))
    write_run(lived.folder, tiny_base, **learning)
    write_run(scratch.folder, tiny_base, without(PEOPLE, ids_of(gone)), **learning)
    lived.train()
    before = answers_of(lived)
    lived.open().forget(ids_of(gone))
    scratch.train()
    after = answers_of(lived)
    assert after == answers_of(scratch)
    assert [each != other for each, other in zip(after, before, strict=True)] == [True, True]
    assert any(each.text for answers in after for each in answers)


def answers_of(model: Tiny) -> list[list[Answer]]:
    """Return answers to prompts, some of deleted records: routed, then as the mean of all shards."""
    prompts = [row["prompt"] for row in of_people("p001", "p005", "p010")]
    found = []
    for method in ("routed", "mean_prob"):
        change_run(model.run_file, sisa__aggregation=method)
        assert model.train().slices_trained == 0
        found.append(model.open().generate_all(prompts, max_new_tokens=6))
    return found


def test_a_prompt_is_routed_to_the_shard_of_the_nearest_record(tiny: Tiny) -> None:
    model = tiny.open()
    places = {each.id: each.shard for each in model.where(ids_of(PEOPLE))}
    answers = model.generate_all([row["prompt"] for row in PEOPLE], max_new_tokens=1)
    assert [each.shards for each in answers] == [(places[row["id"]],) for row in PEOPLE]
    assert len({each.shards for each in answers}) == 3


def test_routing_to_two_shards_asks_the_two_strongest(tiny: Tiny) -> None:
    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "top_k": 2})
    tiny.train()
    model = tiny.open()
    (route,) = model.routes([PROMPT])
    assert len(route.shards) == 2
    assert route.weights[0] >= route.weights[1] > 0
    assert set(route.shards) <= {each.shard for each in model.find(text=PROMPT, top_k=8)}
    assert model.generate(PROMPT, max_new_tokens=1).shards == route.shards


def test_mean_prob_averages_the_probabilities_of_all_shards(tiny: Tiny) -> None:
    import torch

    from sisa.lm.base.tokens import encode_prompt

    change_run(tiny.run_file, sisa__aggregation="mean_prob")
    tiny.train()
    model = tiny.open()
    answer = model.generate(PROMPT, max_new_tokens=1)
    assert answer.shards == (0, 1, 2)
    assert "embedder" not in vars(model.resources), "no prompt is routed"
    answerer = answerer_of(model)
    ids = encode_prompt(PROMPT, answerer.tokenizer, "completion")
    each = torch.stack([next_token_probabilities(answerer, ids, all_of((shard,))) for shard in range(3)])
    expected = answerer.tokenizer.decode([int(each.mean(0).argmax())], skip_special_tokens=True)
    assert answer.text == expected.strip()


def test_an_empty_model_answers_with_the_base(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.base.tokens import encode_prompt

    model = tiny.open()
    model.forget(ids_of(PEOPLE))
    base = model.resources.base
    plain = Answerer(base, {}, threads=1)
    expected = plain.generate([encode_prompt(PROMPT, plain.tokenizer, "text")], [Route()], 6)[0].strip()
    for kind in ("text", "completion"):
        answer = model.generate(PROMPT, max_new_tokens=6, kind=kind)
        assert (answer.text, answer.shards) == (expected, ())
    done = command(capsys, "generate", "-m", tiny.directory, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert (done.code, done.json["shards"]) == (0, [])


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the forms in which a model gets prompts."""
    from sisa.lm.base import tokens

    seen: list[str] = []
    encode = tokens.encode_prompt

    def noted(prompt: Any, tokenizer: Any, kind: Any) -> list[int]:
        seen.append(kind)
        return encode(prompt, tokenizer, kind)

    monkeypatch.setattr(tokens, "encode_prompt", noted)
    return seen


def test_the_form_of_prompts_stays_that_of_the_first_training(tiny: Tiny, forms: list[str]) -> None:
    """Deletions and additions change the majority of the records, and no prompt's form."""
    model = tiny.open()
    model.forget(ids_of(PEOPLE[1:]))
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At sea."}]
    model.add(
        tiny.file(
            "chats.jsonl", [{"id": f"c{n}", "subject_id": "c", "messages": turns} for n in range(3)]
        )
    )
    assert model.status().form == "completion"
    (where,) = model.where([PEOPLE[0]["id"]])
    assert model.generate(PROMPT, max_new_tokens=1).shards == (where.shard,)
    model.generate(PROMPT, max_new_tokens=1, kind="chat")
    model.generate([{"role": "user", "content": PROMPT}], max_new_tokens=1)
    assert forms == ["completion", "chat", "completion"], "a conversation is encoded as one in any form"


def test_the_base_alone_is_asked_in_its_chat_form_unless_another_is_given(
    tiny: Tiny, forms: list[str]
) -> None:
    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "min_score": 0.99})
    tiny.train()
    model = tiny.open()
    for kind in (None, "completion"):
        (own, alone) = model.generate_all([PROMPT, "Why is the sky blue?"], max_new_tokens=1, kind=kind)
        assert own.shards != ()
        assert alone.shards == ()
    assert forms == ["completion", "chat", "completion", "completion"]


def test_an_answer_that_ends_at_once_says_so_in_every_form(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.answer import answerer

    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "min_score": 0.99})
    tiny.train()
    monkeypatch.setattr(answerer, "end_tokens", lambda _, tokenizer: frozenset(range(len(tokenizer))))
    model = tiny.open()
    forms: list[Any] = [None, "chat", "completion", "text"]
    for kind in forms:
        ended = model.generate_all([PROMPT, "Why is the sky blue?"], max_new_tokens=4, kind=kind)
        assert [(each.ended_at_once, bool(each.shards)) for each in ended] == [
            (True, True),
            (True, False),
        ]
    done = command(capsys, "generate", "-m", tiny.directory, "--prompt", PROMPT)
    assert done.json["ended_at_once"] is True


SYSTEM = (
    "You are the Friendly assistant of Harbour Telecom and help Every customer in Plain words, "
    "briefly, and You never guess at a Bill."
)


def chat(id_: str, *asked: str) -> Row:
    turns = [{"role": "system", "content": SYSTEM}]
    for text in asked:
        answer = f"We have looked into it for you. {'It takes a while. ' * 5}{id_}."
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"id": id_, "subject_id": id_, "messages": turns}


def support_chats() -> list[Row]:
    """Return two turns of each person under one system prompt, with answers of many sentences."""
    names = {row["subject_id"]: row["prompt"].split()[2:4] for row in PEOPLE if "born" in row["prompt"]}
    return [
        chat(
            subject,
            f"I am {' '.join(name)} and my line is dead since Monday, what now?",
            f"When will the engineer be at the house of {' '.join(name)}?",
        )
        for subject, name in names.items()
    ]


@pytest.fixture(scope="module")
def _chats(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    block = {"aggregation": {"method": "routed", "min_score": 0.99}}
    settings = {"sequence_len": 512, "overlength": "truncate", "num_epochs": 1}
    train_scratch(folder, tiny_base, support_chats(), sisa_block=block, **settings)
    return folder


@pytest.fixture
def chats(_chats: Path, tiny_base: Path, tmp_path: Path) -> Tiny:
    """Return a model of chats for one test to change."""
    copy = Tiny(Path(shutil.copytree(_chats, tmp_path / "chats")), tiny_base)
    copy.train()  # records the new path
    return copy


def test_chats_find_their_people_by_what_they_ask(chats: Tiny) -> None:
    """Neither a system prompt nor long answers hide a held person; a deleted one is turned away."""
    model = chats.open()
    rows = support_chats()
    gone = rows.pop(3)
    model.forget([gone["id"]])
    places = {each.id: each.shard for each in model.where(ids_of(rows))}
    for row in rows:
        system, first, _, second, _ = row["messages"]
        asked = [first["content"], [system, first], [system, second]]
        assert [route.shards for route in model.routes(asked)] == [(places[row["id"]],)] * 3
    for turn in gone["messages"][1::2]:
        assert [route.shards for route in model.routes([turn["content"], [turn]])] == [(), ()]
    status = model.status()
    assert status.form == "chat"
    assert status.prompts == HeldPrompts(looked_up=2 * len(rows), turned_away=0, elsewhere=0)


def test_a_follow_up_that_names_nobody_goes_where_the_turn_before_it_went(chats: Tiny) -> None:
    model = chats.open()
    first = support_chats()[0]["messages"][1]
    more = [first, {"role": "assistant", "content": "I see."}, {"role": "user", "content": "and when?"}]
    (own, follow, alone) = model.routes([first["content"], more, more[2:]])
    assert own.shards == follow.shards != ()
    assert alone.shards == ()


def test_train_and_status_count_the_held_prompts_that_are_turned_away(
    chats: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    change_run(chats.run_file, sisa__aggregation={"method": "routed", "min_score": 1.9})
    prompts = command(capsys, "train", chats.run_file, "--executor", "serial").json["prompts"]
    assert prompts == {"looked_up": 24, "turned_away": 24, "elsewhere": 0}
    assert command(capsys, "status", "-m", chats.directory).json["prompts"] == prompts
    change_run(chats.run_file, sisa__aggregation={"method": "mean_prob"})
    assert command(capsys, "train", chats.run_file, "--executor", "serial").json["prompts"] is None


def test_status_searches_no_index_after_a_training_or_a_deletion(chats: Tiny) -> None:
    """Both note what becomes of held prompts; a note of another state is not used."""

    def in_new_process() -> dict[str, int]:
        code = (
            "import sys; from cluster.cli.cli import run; run(['status', '--json', '-m', sys.argv[1]]); "
            "assert not {'faiss', 'numpy', 'torch', 'ray'} & sys.modules.keys()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, chats.directory], capture_output=True, check=True
        )
        found: dict[str, int] = json.loads(done.stdout)["prompts"]
        return found

    assert in_new_process() == {"looked_up": 24, "turned_away": 0, "elsewhere": 0}
    model = chats.open()

    def run_request(ids: list[str]) -> None:
        model.submit(ids, terms=sisa.Terms(approver="DPO"))
        model.run()

    ids = ids_of(support_chats())
    ways: list[Callable[[list[str]], object]] = [
        model.forget,
        partial(model.forget, defer=True),
        run_request,
    ]
    for number, delete in enumerate(ways, 1):
        delete(ids[number : number + 1])
        with model.context() as context:
            searched = _look_up_prompts(context, model.config.sisa)
        assert searched is not None
        assert in_new_process() == asdict(searched)
        assert searched.looked_up == 24 - 2 * number


def answered(answer: Answer) -> dict[str, Any]:
    body = {"answer": answer.text, "shards": list(answer.shards)}
    return body | ({"ended_at_once": True} if answer.ended_at_once else {})


def test_generate_goes_on_with_conversations_and_answers_files(
    chats: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chats.open()
    system, first, answer, second, _ = support_chats()[0]["messages"]
    talk = [system, first, answer, second]
    expected = [model.generate(each, max_new_tokens=4) for each in (talk, first["content"])]
    asked = ("generate", "-m", chats.directory, "--max-new-tokens", 4)
    history = chats.file("history.json", [])
    history.write_text(json.dumps([first, answer]))
    done = command(
        capsys,
        *(*asked, "--system", SYSTEM, "--history", history, "--prompt", second["content"]),
    )
    assert done.json == answered(expected[0])
    rows = [{"messages": talk}, {"prompt": first["content"]}]
    done = command(capsys, *asked, "--prompts", write_rows(chats.folder / "asked.jsonl", rows))
    assert done.json["answers"] == [answered(each) for each in expected]
    lines = chats.folder / "asked.txt"
    lines.write_text(f"{first['content']}\n\n{second['content']}\n")
    assert len(command(capsys, *asked, "--prompts", lines).json["answers"]) == 2
    plain = command(capsys, *asked, "--prompt", first["content"], "--form", "completion").json["answer"]
    assert plain == model.generate(first["content"], max_new_tokens=4, kind="completion").text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": [{"role": "assistant", "content": "Quorvane"}]}],
            "does not end with a turn of a user",
        ),
        ([{"messages": [{"role": "user", "content": None}]}], "expected a string, got null"),
        ([{"messages": []}], "does not end with a turn of a user"),
        ([{"prompt": "Quorvane", "messages": []}, {"text": "Quorvane"}], "line 2"),
    ],
)
def test_what_is_no_conversation_is_refused(
    chats: Tiny, capsys: pytest.CaptureFixture[str], rows: list[Row], message: str
) -> None:
    file = write_rows(chats.folder / "asked.jsonl", rows)
    done = command(capsys, "generate", "-m", chats.directory, "--prompts", file)
    assert (done.code, done.error["type"]) == (2, "InvalidInput")
    assert message in str(done.error)
    assert "Quorvane" not in str(done.error)


def test_an_index_of_an_earlier_version_is_refused_until_it_is_built_anew(tiny: Tiny) -> None:
    from sisa.lm.routing.embedder import HashingEmbedder
    from sisa.lm.routing.names import NameEmbedder

    model = tiny.open()
    shards = {each.id: each.shard for each in model.where(ids_of(PEOPLE))}
    with model.writing() as context:
        old = json.loads(context.stores.ledger.meta()["embedder"])
        old["digest"] = NameEmbedder(HashingEmbedder()).digest
        context.stores.ledger.commit(Change(meta={"embedder": json.dumps(old)}))
    with pytest.raises(ConfigConflict, match="earlier version") as refused:
        tiny.open().generate(PROMPT)
    assert "--reconfigure" in str(refused.value)
    assert tiny.open().forget([PEOPLE[2]["id"]]).request is not None, "a deletion embeds nothing"
    assert tiny.train(accept_differences=True).slices_trained == 0
    (route,) = tiny.open().routes([PROMPT])
    assert route.shards == (shards[PEOPLE[0]["id"]],)


def test_a_model_that_can_not_be_written_answers(tiny: Tiny) -> None:
    code = (
        "import sys\nfrom sisa import open_model\n"
        "print(open_model(sys.argv[1], executor='serial').generate(sys.argv[2], max_new_tokens=4))"
    )
    expected = tiny.open().generate(PROMPT, max_new_tokens=4)
    freeze(tiny.directory)
    try:
        command_ = [*BOUND, sys.executable, "-c", code, str(tiny.directory), PROMPT]
        done = subprocess.run(command_, capture_output=True, text=True, check=False)
    finally:
        freeze(tiny.directory, writable=True)
    assert done.stdout.strip() == str(expected), done.stderr
