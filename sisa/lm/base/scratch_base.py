"""Training a base: a byte-level BPE tokenizer and a small Llama decoder, with Hugging Face's `Trainer`.

The recipe's seed decides weights and orders; threads and precision are those of the numerics
fingerprint, so one machine makes the same bytes again. Texts are packed into rows of `context_len`
tokens, and each text ends with the end token. The result is saved as any other base (`weights.py`).
Training is in float32, with one worker unless `prepare` brings in more.

    write_rows(recipe, texts, target_directory, rows_file, print)
    train_base(recipe, rows_file, target_directory, print)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from sisa.core.errors import InvalidInput
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import encode_plain

END = "<|endoftext|>"
NUM_REPORTS = 20  # of the loss, over the training


def write_rows(
    recipe: Mapping[str, Any],
    texts: Sequence[str],
    target: Path,
    rows: Path,
    report: Callable[[str], None],
) -> None:
    """Train a tokenizer and save it in `target`; write the texts' rows of ids to a file.

    `report` receives a message. Raise InvalidInput if the corpus is too small.
    """
    tokenizer = make_tokenizer(texts, recipe["vocab_size"])
    packed = pack(tokenizer, texts, recipe["context_len"])
    report(f"the corpus has {packed.size:,} tokens, the vocabulary {len(tokenizer)}")
    tokenizer.save_pretrained(target)
    np.save(rows, packed, allow_pickle=False)


def train_base(
    recipe: Mapping[str, Any],
    rows: Path,
    target: Path,
    report: Callable[[str], None],
    prepare: Callable[[Any], Any] = lambda trainer: trainer,
    *,
    saves: bool = True,
) -> None:
    """Train a decoder, and save it beside its tokenizer unless another worker `saves` it.

    `report` receives messages about the progress; `prepare` may wrap the `Trainer`, for several workers.
    """
    logging.disable_progress_bar()
    pin_threads(recipe["threads"])
    packed = np.load(rows, allow_pickle=False).tolist()
    torch.manual_seed(recipe["seed"])
    model = LlamaForCausalLM(_config(recipe, PreTrainedTokenizerFast.from_pretrained(target)))
    report(f"the base has {model.num_parameters():,} parameters")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, scratch),
            train_dataset=[{"input_ids": row, "labels": row} for row in packed],
            callbacks=[_Reporting(report)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints on standard output
        prepare(trainer).train()
    if saves:
        model.generation_config.do_sample = False
        model.save_pretrained(target, max_shard_size="1TB")


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def pack(tokenizer: Any, texts: Sequence[str], context_len: int) -> NDArray[np.int32]:
    """Return rows of exactly `context_len` ids [rows, context_len]; ids beyond the last are left out.

    Raise InvalidInput if the texts do not fill one row.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*encode_plain(text, tokenizer), tokenizer.eos_token_id]
    num_rows = len(ids) // context_len
    if not num_rows:
        raise InvalidInput(
            "the corpus is shorter than one row of training",
            where="base_model.scratch.corpus",
            expected=f"at least {context_len} tokens (context_len)",
            got=f"{len(ids)} tokens",
            next_step="add text, or lower context_len",
        )
    return np.array(ids[: num_rows * context_len], np.int32).reshape(num_rows, context_len)


def _config(recipe: Mapping[str, Any], tokenizer: Any) -> Any:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe["hidden_size"],
        intermediate_size=recipe["intermediate_size"],
        num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"],
        num_key_value_heads=recipe["heads"],
        max_position_embeddings=recipe["context_len"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def _arguments(recipe: Mapping[str, Any], scratch: str) -> Any:
    steps = -(-recipe["tokens"] // (recipe["batch_size"] * recipe["context_len"]))
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=max(1, recipe["batch_size"] // recipe["workers"]),
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        lr_scheduler_type="cosine",
        warmup_steps=min(steps // 10, 100),
        optim="adamw_torch",
        seed=recipe["seed"],
        data_seed=recipe["seed"],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=max(1, steps // NUM_REPORTS),
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )


class _Reporting(TrainerCallback):  # type: ignore[misc]
    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            at = f"step {state.global_step} of {state.max_steps}"
            self._report(f"base: {at}, loss {float(logs['loss']):.3f}")
