"""Make a tiny base model with random weights and a byte-level tokenizer, for tests that load torch.

>>> make_tiny_base(Path("base"))                                              # doctest: +SKIP
PosixPath('base')
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

END, START, TEXT_END = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_base(
    directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **config: Any
) -> Path:
    """Save a Llama of about 150,000 random weights in the standard form; return `directory`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([TEXT_END, START, END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=TEXT_END, chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(seed)
    described = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": 512, **config},
    )
    LlamaForCausalLM(described).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_embedder(directory: Path) -> Path:
    """Save a BERT of random weights beside the tokenizer of a tiny base; return `directory`."""
    import torch
    from transformers import BertConfig, BertModel

    from sisa.lm.base.weights import load_tokenizer

    make_tiny_base(directory)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(load_tokenizer(directory)), num_hidden_layers=2, **size)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory
