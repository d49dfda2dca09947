"""Where a training step's time goes, part by part, and the least that each part can take on this core.

Used by `profile_step.py`, whose base is a Llama. The profiler gives each kernel's time; a
kernel belongs to the module that was running, and in the backward pass to the module that made its
autograd node. What the step takes besides, in Python, autograd, views and allocation, is `between
kernels`, so the parts add up to the step.

Two lower bounds stand beside each part, measured over the same shapes, with buffers of their own for
each of `LAYERS` layers so that a processor's nearest cache does not hold them:

    moved     the bytes that the part must read and write, each once, at the rate of torch.add
    fused     one torch kernel forward and one backward for the part. Where torch has none on the CPU,
              the nearest one that moves as much: layer_norm for the norms, glu for SwiGLU, a complex
              product for rotary positions

Products, attention and the optimizer are fused kernels already: both bounds are those kernels alone.

Legend: N rows, M label tokens, H hidden, I of the gate, D head, V words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import glu
from transformers import AttentionInterface

from sisa.lm.train import packing
from sisa.lm.train.lora_linear import TrainedLinear
from sisa.lm.train.losses import PIECE

PRODUCTS, ADAPTERS, HEAD = "products of the base", "products of the adapters", "products of the head"
ATTENTION, NORMS, ROTARY, GATE = "attention", "norms", "rotary positions", "SwiGLU"
SUMS, LOSS, OPTIMIZER = "sums of branches and gradients", "softmax and loss", "clipping and AdamW"
REST, BETWEEN = "other kernels", "between kernels"
PARTS = (PRODUCTS, ADAPTERS, HEAD, ATTENTION, NORMS, ROTARY, GATE, SUMS, LOSS, OPTIMIZER, REST)
ROUNDS, LAYERS = 5, 8  # the layers whose buffers the bounds are measured over
Call = Callable[[], object]
SCOPE = "part: "
BACKWARD = "autograd::engine::evaluate_function: "
CLIPPING = ("aten::linalg_vector_norm", "aten::mul_")
# They move no data: views, allocation, and calls whose kernel is an event of its own.
NO_KERNELS = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "transpose", "t", "as_strided", "slice", "split", "split_with_sizes", "narrow"),
        *("expand", "unsqueeze", "squeeze", "reshape", "_unsafe_view", "_reshape_alias", "select"),
        *("detach", "alias", "permute", "empty", "empty_like", "empty_strided", "new_empty", "to"),
        *("new_empty_strided", "_to_copy", "contiguous", "clone", "zeros", "zeros_like", "lift_fresh"),
        *("scaled_dot_product_attention", "linear", "matmul", "item", "resize_", "resolve_conj"),
    )
)


@contextmanager
def scopes(model: Any) -> Iterator[None]:
    """Name the parts of a model's forwards for the profiler."""
    kinds = {"RMSNorm": NORMS, "MLP": GATE, "Attention": ROTARY, "DecoderLayer": SUMS}
    with ExitStack() as stack:
        for module in model.modules():
            name = type(module).__name__
            kind = next((part for end, part in kinds.items() if name.endswith(end)), None)
            if isinstance(module, TrainedLinear):
                kind = PRODUCTS
            if kind:
                _scope(stack, module, kind)
        AttentionInterface.register(packing.ATTENTION_NAME, _named(packing._attend))
        stack.callback(AttentionInterface.register, packing.ATTENTION_NAME, packing._attend)
        yield


def _scope(stack: ExitStack, module: Any, kind: str) -> None:
    own = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(SCOPE + kind):
            return own(module, *args, **kwargs)

    module.forward = forward
    stack.callback(delattr, module, "forward")


def _named(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attended(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(SCOPE + ATTENTION):
            return attend(*args, **kwargs)

    return attended


def kernel_seconds(step: Call, rank: int) -> dict[str, float]:
    """Return the seconds of a step's kernels, by part, and of what is between them.

    Steps run the same kernels in the same order; of each kernel the median counts, so that one that
    another process interrupted does not. Steps without the profiler run in turn.
    """
    runs, wholes = zip(*((_kernels(step, rank), seconds(step)) for _ in range(ROUNDS)), strict=True)
    found = dict.fromkeys(PARTS, 0.0)
    for same in zip(*runs, strict=True):
        found[same[0][0]] += median(taken for _, taken in same)
    return {**found, BETWEEN: median(wholes) - sum(found.values())}


def _kernels(step: Call, rank: int) -> list[tuple[str, float]]:
    """Return part and seconds of each kernel of a step."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as seen:
        step()
    events = sorted(seen.events(), key=lambda each: each.time_range.start)
    # calls that make no node have the number of the next one that does, so the last call counts
    forward = (each for each in events if not each.scope and not each.name.startswith("autograd::"))
    made = {each.sequence_nr: each for each in forward if each.sequence_nr >= 0}
    return [
        (_part(each, made, rank), each.self_cpu_time_total / 1e6)
        for each in events
        if each.name.startswith("aten::") and each.name not in NO_KERNELS
    ]


def _part(kernel: Any, made: Mapping[int, Any], rank: int) -> str:
    """Return the part that a kernel belongs to."""
    above = [kernel, *_above(kernel)]
    if above[-1].name.startswith(BACKWARD) and (maker := made.get(above[-1].sequence_nr)):
        above += [maker, *_above(maker)]
    names = [each.name for each in above]
    product = kernel.name in ("aten::mm", "aten::addmm_", "aten::addmm")
    if "Optimizer." in names[-1] or (len(names) == 1 and kernel.name in CLIPPING):
        return OPTIMIZER
    if any("_HeadLoss" in name for name in names):
        return HEAD if product else LOSS
    if any("_Adapted" in name or "AccumulateGrad" in name for name in names):
        thin = any(rank in shape for shape in kernel.input_shapes)
        return PRODUCTS if product and not thin else ADAPTERS
    scope = next((name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)), REST)
    return SUMS if scope == PRODUCTS else scope  # of the gradients of a state that several modules read


def _above(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


@dataclass(frozen=True)
class Shape:
    """The sizes that a part's bounds depend on."""

    lengths: Sequence[int]  # of the records
    labels: int
    config: Any

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def rotated(self) -> int:
        """Return the width of queries and keys."""
        heads: int = self.config.num_attention_heads + self.config.num_key_value_heads
        return heads * int(self.config.head_dim)


def split(
    step: Call, model: Any, shape: Shape, products: Mapping[str, Call], rank: int
) -> dict[str, dict[str, float]]:
    """Return each part's seconds in a step, to which they add up, and its bounds."""
    num_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    with scopes(model):
        taken = kernel_seconds(step, rank)
    own = {part: median(seconds(run) for _ in range(ROUNDS)) for part, run in products.items()}
    own[ATTENTION] = shape.config.num_hidden_layers * least([_attention(shape) for _ in range(LAYERS)])
    rate = bytes_per_s(shape)
    moved = {part: size / rate for part, size in moved_bytes(shape, num_trained).items()}
    fused = fused_seconds(shape, num_trained)
    return {
        part: {
            "s": round(each, 5),
            "moved_s": round((own | moved).get(part, 0.0), 5),
            "fused_s": round((own | fused | {BETWEEN: each}).get(part, 0.0), 5),
        }
        for part, each in taken.items()
    }


def moved_bytes(shape: Shape, num_trained: int) -> dict[str, int]:
    """Return the bytes that each part must read and write in a step, each tensor once a direction.

    norms        x -> y; x, gradient -> gradient
    rotary       queries, keys -> the same; gradients -> gradients
    SwiGLU       gate, up -> y; gate, up, gradient -> two gradients
    sums         two of two a layer forward, and two backward; products could add the others
    loss         logits -> gradient
    optimizer    gradient (clipping); parameter, gradient and two moments -> all but the gradient
    """
    rows, layers = shape.rows, shape.config.num_hidden_layers
    hidden, gate = rows * shape.config.hidden_size, rows * shape.config.intermediate_size
    numbers = {
        NORMS: (2 + 3) * hidden * (2 * layers + 1),
        ROTARY: (2 + 2) * rows * shape.rotated * layers,
        GATE: (3 + 5) * gate * layers,
        SUMS: (2 + 2) * 3 * hidden * layers,
        LOSS: 2 * shape.labels * shape.config.vocab_size,
        OPTIMIZER: (1 + 7) * num_trained,
    }
    return {part: 4 * number for part, number in numbers.items()}


def bytes_per_s(shape: Shape) -> float:
    """Return the rate at which torch adds two matrices as wide as the gate into a third."""
    sets = [torch.randn(3, shape.rows, shape.config.intermediate_size) for _ in range(LAYERS)]
    return sets[0].nbytes / least([partial(_add, each) for each in sets])


def _add(matrices: Tensor) -> None:
    torch.add(matrices[0], matrices[1], out=matrices[2])


def fused_seconds(shape: Shape, num_trained: int) -> dict[str, float]:
    """Return the seconds of parts that run as one torch kernel forward and one backward."""
    layers = shape.config.num_hidden_layers
    return {
        NORMS: (2 * layers + 1) * least([_norm(shape) for _ in range(LAYERS)]),
        ROTARY: layers * least([_rotary(shape) for _ in range(LAYERS)]),
        GATE: layers * least([_gate(shape) for _ in range(LAYERS)]),
        SUMS: 4 * layers * least([_sum(shape) for _ in range(LAYERS)]),
        LOSS: sum(least([_loss(rows, shape)]) for rows in _pieces(shape.labels)),
        OPTIMIZER: least([_optimizer(num_trained)]),
    }


def _attention(shape: Shape) -> Call:
    config = shape.config
    heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    each = [
        [torch.randn(1, num, rows, config.head_dim) for num in (heads[0], *heads)]
        for rows in shape.lengths
    ]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def run() -> None:
        for slope, *qkv in each:
            found, sums = attend(*qkv, is_causal=True)
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                slope, *qkv, found, sums, 0.0, True
            )

    return run


def _norm(shape: Shape) -> Call:
    x_NH, slope_NH = torch.randn(2, shape.rows, shape.config.hidden_size)
    of, (weight_H, bias_H) = x_NH.shape[1:], torch.ones(2, x_NH.shape[1])

    def run() -> None:
        _, mean, scale = torch.native_layer_norm(x_NH, of, weight_H, bias_H, 1e-5)
        saved = (slope_NH, x_NH, of, mean, scale, weight_H, bias_H)
        torch.ops.aten.native_layer_norm_backward(*saved, [True, False, False])

    return run


def _rotary(shape: Shape) -> Call:
    x, slope, turn = torch.view_as_complex(torch.randn(3, shape.rows, shape.rotated // 2, 2))
    return lambda: (x * turn, slope * turn)


def _gate(shape: Shape) -> Call:
    both, slope = (torch.randn(shape.rows, num * shape.config.intermediate_size) for num in (2, 1))
    return lambda: (glu(both, 1), torch.ops.aten.glu_backward(slope, both, 1))


def _sum(shape: Shape) -> Call:
    one, other = torch.randn(2, shape.rows, shape.config.hidden_size)
    return lambda: one + other


def _loss(rows: int, shape: Shape) -> Call:
    logits = torch.randn(rows, shape.config.vocab_size)
    return lambda: torch.softmax(logits, 1)


def _optimizer(num_trained: int) -> Call:
    values = torch.nn.Parameter(torch.randn(num_trained))
    values.grad = torch.randn(num_trained)
    optimizer = torch.optim.AdamW([values], fused=True)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_([values], 1.0, foreach=False)
        optimizer.step()

    return run


def _pieces(labels: int) -> list[int]:
    """Return the numbers of rows that the loss is computed over at once."""
    return [min(PIECE, labels - at) for at in range(0, labels, PIECE)]


def seconds(what: Call) -> float:
    """Return the CPU seconds of this thread."""
    started = time.thread_time()
    what()
    return time.thread_time() - started


def least(calls: Sequence[Call]) -> float:
    """Return the mean CPU seconds of calls in turn: the least of four rounds, after one unmeasured."""

    def together() -> None:
        for call in calls:
            call()

    together()
    return min(seconds(together) for _ in range(4)) / len(calls)
