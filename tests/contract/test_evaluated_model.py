"""Test the contract of evaluated models: fake, Hugging Face model, adapter, deletion-ready model.

Order, batches and other rows change nothing beyond rounding. Equal models have equal digests, and
different models different ones. Answers have no surrounding white space and the requested length. For
the real models, scores are compared with scores computed token by token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sisa
from approx.evaluation.asking import EvaluatedModel
from approx.evaluation.questions import PromptForm
from sisa.core.errors import InvalidInput
from sisa.lm.routing.route import Route, all_of
from tests.fakes.benchmarks import made_up
from tests.fakes.evaluated import FakeEvaluated
from tests.models.tiny_base import CHAT_TEMPLATE, make_tiny_base
from tests.models.tiny_model import PEOPLE, next_token_probabilities, train_scratch

REAL = ("hugging face", "adapter", "deletion-ready")
FORMS = [
    PromptForm("completion"),
    PromptForm("completion", "Question: {question}\nAnswer: {answer}"),
    PromptForm("chat"),
]
QUESTIONS = [row["question"] for row in made_up()["full"]]
PAIRS = [(row["question"], text) for row in made_up()["full"] for text in (row["answer"], "No.")]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose own generation config is not greedy, which must not matter."""
    folder = make_tiny_base(tmp_path_factory.mktemp("evaluated") / "base")
    config = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 3.0, "eos_token_id": 258}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> sisa.Model:
    return train_scratch(tmp_path_factory.mktemp("trained"), base, PEOPLE[:12])


@pytest.fixture(scope="module")
def adapter(trained: sisa.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.export(tmp_path_factory.mktemp("adapters") / "out")[0]


@pytest.fixture(
    scope="module",
    params=["fake", *(pytest.param(each, marks=pytest.mark.torch) for each in REAL)],
)
def opening(request: pytest.FixtureRequest) -> Callable[[], EvaluatedModel]:
    """Return a function that opens the model again each time."""
    if request.param == "fake":
        return lambda: FakeEvaluated({row["question"]: row["answer"] for row in made_up()["full"][:5]})
    from approx.evaluation.evaluated_models import open_evaluated

    names = {"hugging face": "base", "adapter": "adapter", "deletion-ready": "trained"}
    wanted = request.getfixturevalue(names[request.param])
    path = wanted.directory if request.param == "deletion-ready" else wanted
    return lambda: open_evaluated(str(path))


@pytest.fixture(scope="module")
def model(opening: Callable[[], EvaluatedModel]) -> EvaluatedModel:
    return opening()


def forms_of(model: EvaluatedModel) -> list[PromptForm]:
    return [each for each in FORMS if not isinstance(model, FakeEvaluated) or each.kind == model.kind]


def test_the_size_of_a_batch_changes_nothing(model: EvaluatedModel) -> None:
    for form in forms_of(model):
        whole, answers = model.score(PAIRS, form, 4), model.generate(QUESTIONS, form, 12, 4)
        for size in (1, 3, 50):
            for one, other in zip(whole, model.score(PAIRS, form, size), strict=True):
                assert one.correct == other.correct
                assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
                assert one.means == pytest.approx(other.means, abs=TOLERANCE)
                assert one.variances == pytest.approx(other.variances, abs=TOLERANCE)
            assert answers == model.generate(QUESTIONS, form, 12, size)


def test_order_and_company_change_nothing(model: EvaluatedModel) -> None:
    form = forms_of(model)[0]
    whole = model.score(PAIRS, form, 4)
    backwards = model.score(PAIRS[::-1], form, 4)[::-1]
    for pair, one, other in zip(PAIRS, whole, backwards, strict=True):
        (alone,) = model.score([pair], form, 4)
        assert one.loss == pytest.approx(other.loss, abs=TOLERANCE)
        assert one.loss == pytest.approx(alone.loss, abs=TOLERANCE)
    assert model.generate(QUESTIONS[::-1], form, 6, 3)[::-1] == model.generate(QUESTIONS, form, 6, 3)


def test_a_score_is_per_token(model: EvaluatedModel) -> None:
    for score in model.score(PAIRS, forms_of(model)[0], 4):
        lengths = {len(score.logprobs), len(score.correct), len(score.means), len(score.variances)}
        assert lengths == {score.num_tokens}
        assert all(each <= 0 for each in score.logprobs)
        assert all(each >= 0 for each in score.variances)
        assert score.without_closing().num_tokens == score.num_tokens - 1


def test_answers_are_bare_and_as_short_as_asked(model: EvaluatedModel) -> None:
    form = forms_of(model)[0]
    for short, long in zip(
        model.generate(QUESTIONS, form, 2, 4), model.generate(QUESTIONS, form, 8, 4), strict=True
    ):
        assert short == short.strip()
        assert len(short) <= len(long)
    assert (model.score([], form, 4), model.generate([], form, 4, 4)) == ([], [])


def test_equal_models_have_equal_digests(
    model: EvaluatedModel, opening: Callable[[], EvaluatedModel]
) -> None:
    assert (model.digest, model.name, model.kind) == (opening().digest, opening().name, opening().kind)


# --- the real ones, token by token ---------------------------------------------------------------


@pytest.mark.torch
def test_digests_distinguish_models(
    base: Path, adapter: Path, trained: sisa.Model, tmp_path: Path
) -> None:
    from approx.evaluation.evaluated_models import open_evaluated

    other = make_tiny_base(tmp_path / "other", seed=1)
    models = [open_evaluated(str(each)) for each in (base, other, adapter, trained.directory)]
    models.append(open_evaluated(str(base), dtype="bfloat16"))
    assert len({each.digest for each in models}) == 5


@pytest.mark.torch
def test_a_hugging_face_model_is_scored_as_transformers_does(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from approx.evaluation.evaluated_models import open_evaluated

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for (question, answer), score in zip(
        PAIRS, open_evaluated(str(base)).score(PAIRS, FORMS[1], 4), strict=True
    ):
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        answer_ids = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer_ids])
        with torch.inference_mode():
            output = plain(input_ids=torch.tensor([prompt + answer_ids]), labels=labels)
        assert score.loss == pytest.approx(float(output.loss), abs=TOLERANCE)
        logprobs = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chances = logprobs.exp()
        means = (chances * logprobs).sum(-1)
        assert score.means == pytest.approx(means.tolist(), abs=TOLERANCE)
        variances = (chances * logprobs.square()).sum(-1) - means.square()
        assert score.variances == pytest.approx(variances.tolist(), abs=1e-4)
        assert score.correct == tuple((logprobs.argmax(-1) == torch.tensor(answer_ids)).tolist())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "others", "expected"),
    [
        ("llama", {}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 8}, False),
        ("mamba", {}, False),
    ],
)
def test_where_answers_share_what_they_begin_with(
    family: str, others: dict[str, Any], expected: bool
) -> None:
    """Not where tokens look back within a window, or attention is of another kind: a row each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from approx.evaluation.answer_tree import can_branch

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **heads, initializer_range=0.5, **others)
    assert can_branch(AutoModelForCausalLM.from_config(config).eval(), longest=32) == expected


# The template, and how many tokens with loss close an answer of it.
TEMPLATES = {
    "line break after the end token": (CHAT_TEMPLATE, 1),
    "end token last": (CHAT_TEMPLATE.replace(" + '\\n' }}{% endfor", " }}{% endfor"), 1),
    "line break before the end token": (CHAT_TEMPLATE.replace("'<|im_end|>'", "'\\n<|im_end|>'"), 2),
    "no end token": (CHAT_TEMPLATE.replace(" + '<|im_end|>' + '\\n'", ""), 0),
}


@pytest.mark.torch
@pytest.mark.parametrize(("template", "num_closing"), TEMPLATES.values(), ids=TEMPLATES)
def test_metrics_of_a_chat_are_of_what_is_said(
    base: Path, tmp_path: Path, template: str, num_closing: int
) -> None:
    """Whatever the template adds after an answer; the base's tokenizer has one token a byte."""
    from transformers import AutoTokenizer

    from approx.evaluation.evaluated_models import open_evaluated

    assert "im_end" in CHAT_TEMPLATE
    copy = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copy)
    found = open_evaluated(str(copy)).score(PAIRS, PromptForm("chat"), 4)
    for (_, answer), score in zip(PAIRS, found, strict=True):
        assert score.without_closing().num_tokens == len(answer.encode())
        assert score.num_tokens == len(answer.encode()) + num_closing


@pytest.mark.torch
def test_generation_is_greedy_whatever_the_models_own_config(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from approx.evaluation.evaluated_models import open_evaluated

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = open_evaluated(str(base)).generate(QUESTIONS, FORMS[0], 12, 4)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = tokenizer(question)["input_ids"]
        start = len(ids)
        for _ in range(12):
            with torch.inference_mode():
                token = int(plain(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.torch
def test_an_adapter_is_the_shard_that_it_was_exported_from(adapter: Path, trained: sisa.Model) -> None:
    from approx.evaluation.evaluated_models import open_evaluated
    from sisa.lm.base.tokens import encode_plain, encode_prompt

    answerer, _ = trained.answerer()
    shard = int(adapter.name.removeprefix("shard-"))
    found = open_evaluated(str(adapter)).score(PAIRS, FORMS[0], 4)
    for (question, answer), score in zip(PAIRS, found, strict=True):
        expected = _by_tokens(
            answerer,
            encode_prompt(question, answerer.tokenizer, "completion"),
            [*encode_plain(answer, answerer.tokenizer), answerer.tokenizer.eos_token_id],
            all_of([shard]),
        )
        assert score.logprobs == pytest.approx(expected, abs=TOLERANCE)


def _by_tokens(answerer: Any, prompt: list[int], answer: list[int], route: Route) -> list[float]:
    found = []
    for at, token in enumerate(answer):
        probabilities = next_token_probabilities(answerer, [*prompt, *answer[:at]], route)
        found.append(float(probabilities[token].log()))
    return found


@pytest.mark.torch
def test_a_deletion_ready_model_is_scored_as_it_answers(trained: sisa.Model) -> None:
    """The same routes, the same mean of probabilities, the same answers as `generate`."""
    from approx.evaluation.evaluated_models import open_evaluated
    from sisa.lm.base.tokens import encode_plain, encode_prompt

    pairs = [(row["prompt"], row["completion"]) for row in PEOPLE[:8]]
    questions = [question for question, _ in pairs]
    routes = trained.routes(questions)
    assert len(set(routes)) > 1, "several shards are asked"
    answerer, kind = trained.answerer()
    assert kind == "completion"
    model = open_evaluated(str(trained.directory))
    for (question, answer), route, score in zip(
        pairs, routes, model.score(pairs, FORMS[0], 4), strict=True
    ):
        prompt = encode_prompt(question, answerer.tokenizer, "completion")
        ids = [*encode_plain(answer, answerer.tokenizer), answerer.tokenizer.eos_token_id]
        assert score.logprobs == pytest.approx(_by_tokens(answerer, prompt, ids, route), abs=TOLERANCE)
    answers = [each.text for each in trained.generate_all(questions, max_new_tokens=10)]
    assert model.generate(questions, FORMS[0], 10, 4) == answers


@pytest.mark.torch
def test_what_the_base_answers_alone_is_asked_as_a_chat(
    trained: sisa.Model, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `generate` asks it: a chat model may end a completion at once, with an empty answer."""
    from approx.evaluation.evaluated_models import DeletionReadyModel, open_evaluated

    ours, alone = open_evaluated(str(trained.directory)), open_evaluated(str(base))
    monkeypatch.setattr(
        DeletionReadyModel, "_routes", lambda _self, asked, _form: [Route()] * len(asked)
    )
    assert ours.generate(QUESTIONS, FORMS[0], 10, 4) == alone.generate(QUESTIONS, FORMS[2], 10, 4)
    expected = [each.logprobs for each in alone.score(PAIRS, FORMS[2], 4)]
    for score, logprobs in zip(ours.score(PAIRS, FORMS[0], 4), expected, strict=True):
        assert score.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


@pytest.mark.torch
def test_what_can_not_be_evaluated_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    from approx.evaluation.evaluated_models import open_evaluated

    nameless = tmp_path / "nameless"
    shutil.copytree(adapter, nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InvalidInput, match="does not name its base"):
        open_evaluated(str(nameless))
    with pytest.raises(InvalidInput, match="no such model"):
        open_evaluated("./absent")
    with pytest.raises(InvalidInput, match="device"):
        open_evaluated(str(base), device="no-such-device")
    model = open_evaluated(str(base))
    with pytest.raises(InvalidInput, match="longer than the model"):
        model.generate(["Who?"], FORMS[0], 512, 1)
    with pytest.raises(InvalidInput, match="longer than the model"):
        model.score([("Who?", "x" * 600)], FORMS[0], 1)
