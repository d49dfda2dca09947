"""The aggregated model behind the interface of transformers, and an evaluation harness on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sisa.core.errors import InvalidInput, Outdated
from sisa.lm.routing.route import Route
from sisa.model import Model
from tests.models.tiny_model import PEOPLE, Tiny, change_run, next_token_probabilities

# a base of a few kilobytes ends some answers at once
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*answers ended at once")]

QUESTIONS = ["Where does Ada live?", "Who is it that keeps bees and plays the organ?", "What?"]


@pytest.fixture
def model(tiny: Tiny) -> Model:
    return tiny.open()


def prompts_of(model: Model, texts: Sequence[str]) -> Any:
    import torch

    tokenizer = model.answerer()[0].tokenizer
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def test_generate_is_what_the_answerer_says(model: Model) -> None:
    wrapped = model.as_transformers()
    questions = [row["prompt"] for row in PEOPLE[:6]]
    ids, mask = prompts_of(model, questions)
    routes = model.routes(questions)
    assert len({route.shards for route in routes}) > 1, "several shards are asked"
    made = wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    tokenizer = wrapped.tokenizer
    answers = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    plain = [tokenizer.encode(text) for text in questions]
    assert answers == model.answerer()[0].generate(plain, routes, 8)


def test_forward_with_labels_is_a_causal_model(model: Model) -> None:
    import torch

    seen: list[Any] = []

    def router(prompts: Sequence[Any]) -> list[Route]:
        seen.extend(prompts)
        return model.routes(prompts)

    wrapped = model.as_transformers()
    wrapped._router = router
    prompt = wrapped.tokenizer.encode("Where does Ada live?")
    answer = wrapped.tokenizer.encode(" By the sea.")
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    found = wrapped(input_ids=ids, labels=labels)
    assert seen == ["Where does Ada live?"], "the router sees the prompt alone"
    assert found.logits.exp().sum(-1).allclose(torch.ones(1, len(prompt + answer)), atol=1e-5)
    (route,) = model.routes(seen)
    probabilities = model.answerer()[0].answer_probabilities_KV(prompt, answer, route)
    picked = [float(p[token]) for p, token in zip(probabilities, answer, strict=True)]
    assert float(found.loss) == pytest.approx(-sum(map(math.log, picked)) / len(answer), abs=1e-4)


def test_without_labels_the_marked_prompt_is_looked_up(model: Model) -> None:
    import torch

    seen: list[Any] = []
    wrapped = model.as_transformers(prompt_ends=["Answer:"])
    wrapped._router = lambda prompts: [seen.append(each) or model.routes([each])[0] for each in prompts]  # type: ignore[func-returns-value]
    texts = ["Question: Who?\nAnswer: Ada", "Question: Who?\nAnswer: Bob"]
    ids = torch.tensor([wrapped.tokenizer.encode(text) for text in texts])
    wrapped(input_ids=ids)
    assert seen == ["Question: Who?\nAnswer:"]
    with pytest.raises(InvalidInput, match="end of a sequence's prompt"):
        wrapped(input_ids=ids[:, :5])


def chat_prompt(model: Model, *turns: tuple[str, str]) -> Any:
    messages = [{"role": role, "content": text} for role, text in turns]
    return model.answerer()[0].tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_of_a_chat_the_user_turns_are_looked_up(model: Model) -> None:
    seen: list[Any] = []
    wrapped = model.as_transformers()
    wrapped._router = lambda prompts: [seen.append(each) or model.routes([each])[0] for each in prompts]  # type: ignore[func-returns-value]
    system = ("system", "You are Helpful and Kind.")
    question = PEOPLE[0]["prompt"]
    alone = chat_prompt(model, system, ("user", question))
    wrapped.generate(**alone, max_new_tokens=1, do_sample=False)
    later = chat_prompt(model, ("user", "Hello!"), ("assistant", "Yes?"), ("user", question))
    wrapped.generate(**later, max_new_tokens=1, do_sample=False)
    assert seen == [question, [{"role": "user", "content": text} for text in ("Hello!", question)]]
    wrapped(**alone)
    assert seen[2:] == [question]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ", True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", False),
    ],
)
def test_user_turns_are_distinguished_by_the_template(
    model: Model, template: str, expected: bool
) -> None:
    import copy

    from sisa.lm.answer.hf_model import user_turn

    tokenizer = copy.copy(model.answerer()[0].tokenizer)
    tokenizer.chat_template = template
    assert user_turn(tokenizer) == (("[user] ", "\n[assistant] ") if expected else None)


def test_a_batch_that_the_base_alone_answers_is_reported(tiny: Tiny) -> None:
    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "min_score": 0.99})
    tiny.train()
    model = tiny.open()
    wrapped = model.as_transformers()
    ids, mask = prompts_of(model, ["Why is the sky blue?", "How far is the moon?"])
    with pytest.warns(UserWarning, match="the base alone answers all of these 2 prompts"):
        wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    ids, mask = prompts_of(model, ["Why is the sky blue?", PEOPLE[0]["prompt"]])
    wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)


def test_answers_that_end_at_once_are_reported(model: Model) -> None:
    wrapped = model.as_transformers()
    ids, mask = prompts_of(model, [PEOPLE[0]["prompt"], PEOPLE[1]["prompt"]])
    end = wrapped.tokenizer.eos_token_id
    others = [token for token in range(len(wrapped.tokenizer)) if token != end]
    with pytest.warns(UserWarning, match="2 of 2 answers ended at once"):
        wrapped.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, suppress_tokens=others
        )


def test_beams_are_refused(model: Model) -> None:
    wrapped = model.as_transformers()
    ids, mask = prompts_of(model, QUESTIONS[:1])
    with pytest.raises(InvalidInput, match="num_beams"):
        wrapped.generate(input_ids=ids, attention_mask=mask, num_beams=2)


def local_task(folder: Path, rows: Sequence[dict[str, Any]], doc_to_text: str) -> dict[str, Any]:
    """Return a task of the harness over rows with a question and choices."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": doc_to_text,
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }


def test_the_harness_reaches_the_shards_in_its_chat_form(tiny: Tiny, tmp_path: Path) -> None:
    """No system text of a template stands between a question and its shard."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    change_run(tiny.run_file, sisa__aggregation={"method": "routed", "min_score": 0.99})
    tiny.train()
    model = tiny.open()
    questions = [row["prompt"] for row in PEOPLE[:4]]
    rows = [
        {"question": each, "choices": ["by the sea", "in a tower"], "label": 0} for each in questions
    ]
    wrapped = model.as_transformers()
    seen: dict[str, Route] = {}

    def router(prompts: Sequence[Any]) -> list[Route]:
        found = model.routes(prompts)
        seen.update(zip(prompts, found, strict=True))
        return found

    wrapped._router = router
    served = HFLM(pretrained=wrapped, tokenizer=wrapped.tokenizer, batch_size=2, max_length=256)
    lm_eval.simple_evaluate(
        model=served,
        tasks=[local_task(tmp_path, rows, "{{question}}")],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=True,
        system_instruction="You are a Helpful assistant named SmolLM.",
    )
    assert set(seen) == set(questions)
    assert all(route.shards for route in seen.values())


def test_an_evaluation_harness_runs_on_it_unchanged(model: Model, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows: list[dict[str, Any]] = [
        {"question": question, "choices": ["by the sea", "in a tower"], "label": number % 2}
        for number, question in enumerate(QUESTIONS)
    ]
    task = local_task(tmp_path, rows, "Question: {{question}}\nAnswer:")
    wrapped = model.as_transformers()
    served = HFLM(pretrained=wrapped, tokenizer=wrapped.tokenizer, batch_size=2, max_length=256)
    found = lm_eval.simple_evaluate(
        model=served, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    sample = found["samples"]["local"]
    assert len(sample) == len(rows)
    answerer = wrapped.answerer
    for row, each in zip(rows, sorted(sample, key=lambda each: each["doc_id"]), strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        (route,) = model.routes([prompt])
        context = answerer.tokenizer.encode(prompt)
        for choice, (logprob, _) in zip(row["choices"], each["filtered_resps"], strict=True):
            ids = answerer.tokenizer.encode(f" {choice}")
            rows_KV = answerer.answer_probabilities_KV(context, ids, route)
            expected = sum(math.log(float(p[token])) for p, token in zip(rows_KV, ids, strict=True))
            assert float(logprob) == pytest.approx(expected, abs=1e-3)


def test_what_was_loaded_before_a_deletion_answers_no_more(model: Model) -> None:
    """Whoever measures or serves holds adapters in memory that are erased everywhere else."""
    answerer, _ = model.answerer()
    wrapped = model.as_transformers()
    ids, mask = prompts_of(model, QUESTIONS[:1])
    routes = model.routes(QUESTIONS[:1])
    plain = [answerer.tokenizer.encode(QUESTIONS[0])]
    before = answerer.generate(plain, routes, 4)
    other = model.submit([PEOPLE[1]["id"]]).request  # a commit that replaces no adapter
    assert answerer.generate(plain, routes, 4) == before
    wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)

    Model(model.directory, executor="serial").forget([PEOPLE[0]["id"]], defer=True)
    for asked in (
        lambda: answerer.generate(plain, routes, 4),
        lambda: next_token_probabilities(answerer, plain[0], routes[0]),
        lambda: answerer.logprobs(routes, input_ids=ids, use_cache=False),
        lambda: wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2),
        lambda: wrapped(input_ids=ids, labels=ids),
    ):
        with pytest.raises(Outdated, match="since its adapters were loaded"):
            asked()
    again, routes = model.answerer()[0], model.routes(QUESTIONS[:1])
    assert len(again.generate(plain, routes, 4)) == 1
    assert model.request(other.request_id).request.state == "received"


def test_an_answer_that_a_deletion_overtakes_is_given_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapters are loaded, then the deletion returns, then the answer would begin."""
    from sisa.lm.base import tokens

    encode = tokens.encode_prompt
    digests: list[str] = []

    def overtaken(*given: Any) -> Any:
        if not digests:
            Model(model.directory, executor="serial").forget([PEOPLE[0]["id"]], defer=True)
        digests.append(model.status().model_digest)
        return encode(*given)

    monkeypatch.setattr(tokens, "encode_prompt", overtaken)
    (answer,) = model.generate_all([PEOPLE[0]["prompt"]], max_new_tokens=4)
    assert len(digests) == 2
    assert set(answer.shards) <= {each.shard for each in model.status().shards if each.head}
