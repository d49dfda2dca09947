"""The retain set that the base writes itself: its own greedy answers to neutral prompts.

What a patch is to keep is how the base speaks; its own answers say that without a record of a user in
the patch, so that no later deletion can touch it. The prompts are ours: facts that everybody knows,
small tasks, style.

Rules: the answers are those of the base with the patches beneath, greedy, so that the same base gives
the same set. Where the tokenizer has a chat template, prompts are put as a user's turn. Prompts that
leave no room for an answer within `sequence_len` are left out.

Not covered: what a base knows that these prompts do not ask for: give a retain set of your own where
that matters. The answers need not be true.

>>> len(PROMPTS) == len(set(PROMPTS)) == 40
True
"""

from __future__ import annotations

from typing import Any

from approx.greedy import continued
from sisa.domain import Kind
from sisa.model.answer import end_tokens
from sisa.model.tokens import NO_LOSS, Tokens, encode_prompt

MAX_NEW_TOKENS = 24
PROMPTS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Which planet do we live on?",
    "What is water made of?",
    "Name three colours of the rainbow.",
    "In which season does snow usually fall?",
    "What is two plus three?",
    "What do bees make?",
    "Which animal is known as man's best friend?",
    "How many months does a year have?",
    "What is the opposite of hot?",
    "Where does the sun rise?",
    "What do plants need to grow?",
    "Which ocean lies between Europe and America?",
    "What is the largest animal on earth?",
    "At what temperature does water boil?",
    "Who wrote the play Hamlet?",
    "What language is spoken in Brazil?",
    "How many legs does a spider have?",
    "What is ice?",
    "Write one sentence about the sea.",
    "Give a word that rhymes with cat.",
    "List three fruits.",
    "Explain in one sentence what a library is.",
    "Put these words in order: small, tiny, large.",
    "Finish the sentence: The early bird",
    "Write a short greeting for a friend.",
    "Say in other words: The weather is very nice today.",
    "What is a good name for a bakery?",
    "Give one tip for sleeping well.",
    "Describe a tree in one sentence.",
    "How do I make a cup of tea?",
    "What should I pack for a day at the beach?",
    "Write a polite way to say no.",
    "Count from one to five.",
    "Why is exercise good for people?",
    "Tell me something about the moon.",
    "What is the plural of mouse?",
    "Write the first line of a story about a fox.",
    "How can I save water at home?",
)


def written_kind(tokenizer: Any) -> Kind:
    """How prompts are put to this base."""
    return "chat" if getattr(tokenizer, "chat_template", None) else "completion"


def prompts_that_fit(tokenizer: Any, sequence_len: int) -> list[list[int]]:
    """Ids of the prompts, those that leave room for an answer. Raises InvalidInput where the chat
    template refuses."""
    kind = written_kind(tokenizer)
    ids = [encode_prompt(each, tokenizer, kind) for each in PROMPTS]
    return [each for each in ids if len(each) < sequence_len]


def write_retain_set(model: Any, tokenizer: Any, sequence_len: int) -> list[Tokens]:
    """The base's answers as examples; loss on the answers, the end token where there is one."""
    prompts = prompts_that_fit(tokenizer, sequence_len)
    answers = continued(model, prompts, end_tokens(model, tokenizer), MAX_NEW_TOKENS)
    return [
        Tokens([*prompt, *said], [NO_LOSS] * len(prompt) + said)
        for prompt, answer in zip(prompts, answers, strict=True)
        for said in [answer[: sequence_len - len(prompt)]]
    ]
