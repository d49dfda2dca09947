"""Constituents with drawn adapters, and what a batch of them has said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sisa.lm.base.weights import load_base

if TYPE_CHECKING:
    from sisa.lm.answer.answer_text import Token
    from sisa.lm.answer.continuous import ContinuousBatching, Ended

Files = dict[str, bytes]


def adapter(base: Any, seed: int, rank: int, layers: Sequence[int], modules: Sequence[str]) -> Files:
    import torch
    from peft import LoraConfig

    from sisa.lm.base.adapter import adapter_files, adapter_tensors, attach, put_tensors

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(modules),
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )
    model = attach(load_base(base)[0], config, None, init_seed=seed)
    drawn = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.2 * torch.randn(each.shape, generator=drawn)
        for name, each in adapter_tensors(model).items()
    }
    put_tensors(model, tensors)
    return adapter_files(model)


class Transcript:
    """What a batch has said so far, by request."""

    def __init__(self, batch: ContinuousBatching) -> None:
        self.batch = batch
        self.text: dict[Any, str] = {}
        self.tokens: dict[Any, list[Token]] = {}
        self.ended: dict[Any, Ended] = {}

    def step(self) -> list[tuple[Any, Token]]:
        """Take one step; return the tokens that came out."""
        from sisa.lm.answer.continuous import Ended

        came: list[tuple[Any, Token]] = []
        for event in self.batch.step():
            if isinstance(event, Ended):
                assert event.key not in self.ended
                self.ended[event.key] = event
                continue
            self.text[event.key] = self.text.get(event.key, "") + event.text
            self.tokens.setdefault(event.key, []).extend(event.tokens)
            came += [(event.key, token) for token in event.tokens]
        return came

    def to_the_end(self) -> Transcript:
        while self.batch.running or self.batch.waiting:
            self.step()
        return self
