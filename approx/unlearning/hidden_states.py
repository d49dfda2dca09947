"""Hidden states of a model's layers: hooks that read or replace them in a forward.

    seen: list[Seen] = []
    with hooked([(layer, seen.append) for layer in decoder_layers(model)]):
        model(input_ids=ids_BT)
    seen[3].left                # what layer 3 leaves, [B, T, D]

Shapes: B rows, T positions, D units of a hidden state, K columns that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from sisa.lm.base.adapter import layers_of


def decoder_layers(model: Any) -> list[Any]:
    """Return a causal model's layers, from the lowest up; a PEFT model's are those of its base."""
    return list(layers_of(plain_model(model))[1])


def plain_model(model: Any) -> Any:
    """Return the causal model within a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Seen(NamedTuple):
    """The hidden states that a module is given in a forward, and those that it leaves."""

    given: Tensor
    left: Tensor


Hook = Callable[[Seen], Tensor | None]


@contextmanager
def hooked(hooks: Sequence[tuple[Any, Hook]]) -> Iterator[None]:
    """Call hooks after the forwards of their modules; what a hook returns replaces what was left."""
    with ExitStack() as stack:
        for module, hook in hooks:
            added = module.register_forward_hook(partial(_call, hook), with_kwargs=True)
            stack.callback(added.remove)
        yield


def _call(hook: Hook, _module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    is_tuple = isinstance(output, tuple)
    changed = hook(Seen(given, output[0] if is_tuple else output))
    return (changed, *output[1:]) if is_tuple and changed is not None else changed


class _Reached(Exception):
    """Raised to leave a forward pass."""


def hidden_at(model: Any, layer: int, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
    """Return the hidden states that a layer leaves at some columns. The layers above are not run."""
    found: list[Tensor] = []

    def leave(now: Seen) -> None:
        found.append(now.left)
        raise _Reached

    with hooked([(decoder_layers(model)[layer], leave)]), suppress(_Reached):
        model(input_ids=ids_BT1, use_cache=False)
    return found[0][:, columns_K]
