"""One stage of training, between its first and its last step: loss, gradients, optimizer, files.

Seeds come from the job: adapter weights from (seed, shard), dropout from (seed, shard, slice,
micro-batch). The schedule and its warm-up restart with each stage; the optimizer's moments continue. The
loss of an optimizer step is the summed cross-entropy divided by the number of label tokens in all its
micro-batches. Adapters, gradients, moments and loss are in float32 whatever the base's dtype, and so are
the files.

    stage = Stage(job, wrapped, parent_files, num_steps=len(steps))
    for step in steps:
        loss, num_labels = stage.step(step)
    files = stage.files()

Source: SISA, Bourtoule et al. 2021, section IV (slicing); LoRA, Hu et al. 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from sisa.core.digest import canonical_json
from sisa.core.domain import SliceJob
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.lm.base.adapter import ADAPTER_FILE, CONFIG_FILE, config_bytes, read_tensors, tensor_bytes
from sisa.lm.train.frozen_prefix import Prefixes
from sisa.lm.train.losses import Batch, count_labels, summed_loss
from sisa.lm.train.trainable import Trainable, file_name
from sisa.planning.plan import LAYERWISE

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def seed_from(*parts: object) -> int:
    """Return a seed for torch that depends on all parts.

    >>> seed_from(1, 2, "init") == seed_from(1, 2, "init") != seed_from(1, 3, "init")
    True
    """
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class FlatParams:
    """Trained parameters laid out as one parameter, so that one optimizer update covers all of them.

    Each parameter is a view of its part, in the order of names. A tall matrix is stored transposed
    there, as its gradient arrives; what `by_name` returns has the parameter's own shape. Gradients
    accumulate in place until `clear`. All parameters share one dtype and one device.

    >>> layer = torch.nn.Linear(2, 3)
    >>> flat = FlatParams(dict(layer.named_parameters()))
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> flat.values.grad.sum().item(), flat.by_name(flat.values.data)["weight"].shape
    (9.0, torch.Size([3, 2]))
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        self._shapes = {name: each.shape for name, each in named.items()}
        device = next(iter(named.values())).device if named else None
        size = sum(each.numel() for each in named.values())
        self.values = torch.nn.Parameter(torch.empty(size, device=device))
        self.values.grad = torch.zeros(size, device=device)
        values, gradients = self.by_name(self.values.data), self.by_name(self.values.grad)
        for name, each in named.items():
            values[name].copy_(each.data)
            each.data, each.grad = values[name], gradients[name]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views, by parameter name, into a tensor of the same size as `values`."""
        found: dict[str, Tensor] = {}
        at = 0
        for name, shape in self._shapes.items():
            part = flat[at : at + shape.numel()]
            at += shape.numel()
            tall = len(shape) == 2 and shape[0] > shape[1]
            found[name] = part.view(shape[1], shape[0]).t() if tall else part.view(shape)
        return found

    def clear(self) -> None:
        """Set all gradients to zero."""
        if self.values.grad is not None:
            self.values.grad.zero_()


class Stage:
    """The model, optimizer and schedule of a stage."""

    def __init__(
        self,
        job: SliceJob,
        wrapped: Trainable,
        parent: Mapping[str, bytes] | None,
        num_steps: int,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`wrapped` belongs to this stage until another one begins on it; `prefixes` are of its base.

        Raises IntegrityError if the parent's files are damaged.
        """
        training = job.training
        tensors = None if parent is None else read_tensors(parent, ADAPTER_FILE)
        block = (training[LAYERWISE], len(job.before)) if LAYERWISE in training else None
        self._job, self._wrapped = job, wrapped
        self._prefixes = prefixes or Prefixes()
        init_seed = seed_from(training["seed"], job.shard, "init")
        self._trained = wrapped.begin(tensors, init_seed, block)
        self._flat = FlatParams(self._trained)
        self._optimizer = make_optimizer(training, self._flat.values)
        if parent is not None:
            self._put_moments(read_tensors(parent, OPTIMIZER_FILE))
        self._num_steps = num_steps
        self._num_warmup_steps = math.ceil(training["warmup_ratio"] * num_steps)
        self._scheduler = get_scheduler(
            training["lr_scheduler"],
            self._optimizer,
            num_warmup_steps=self._num_warmup_steps,
            num_training_steps=num_steps,
        )
        self._micro_batches = 0

    def step(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Take one optimizer step; return the summed loss and the number of label tokens."""
        training = self._job.training
        num_labels = sum(count_labels(batch) for batch in batches)
        mean = 0.0
        self._flat.clear()
        for batch in batches:
            below = self._below(batch)
            name = (training["seed"], self._job.shard, self._job.slice, "dropout", self._micro_batches)
            torch.manual_seed(seed_from(*name))
            with below:
                loss = summed_loss(self._wrapped.model, batch, self._wrapped.form) / num_labels
            mean += _finite(loss, self._job)
            loss.backward()  # type: ignore[no-untyped-call]
            self._micro_batches += 1
        torch.nn.utils.clip_grad_norm_([self._flat.values], training["max_grad_norm"], foreach=False)
        self._optimizer.step()
        self._scheduler.step()
        return mean * num_labels, num_labels

    def _below(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context in which forwards skip the layers below the lowest adapted one."""
        lower = self._wrapped.lower
        if lower is None:
            return nullcontext()
        states = [self._prefixes.states(lower, each.input_ids) for each in batch]
        return lower.given(states, packed=self._wrapped.form.packed)

    def files(self) -> dict[str, bytes]:
        """Return the files of the stage's checkpoint."""
        state = {
            "job": self._job.key,
            "steps": self._num_steps,
            "scheduler": {
                "name": self._job.training["lr_scheduler"],
                "num_warmup_steps": self._num_warmup_steps,
                "last_epoch": self._scheduler.last_epoch,
                "last_lr": self._scheduler.get_last_lr(),
            },
        }
        return {
            ADAPTER_FILE: tensor_bytes(self._wrapped.tensors()),
            CONFIG_FILE: config_bytes(self._wrapped.model),
            OPTIMIZER_FILE: tensor_bytes(self._moments()),
            STATE_FILE: canonical_json(state),
        }

    def _moments(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's moments of each parameter, by name; all share one count of steps."""
        state = self._optimizer.state[self._flat.values]
        found: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            if moment in state:
                whole = state[moment]
                if whole.dim():
                    parts = self._flat.by_name(whole)
                else:
                    parts = {name: whole.clone() for name in self._trained}
                found |= {f"{file_name(name)}.{moment}": each for name, each in parts.items()}
        return found

    def _put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore moments. Raises IntegrityError if the parent has those of some parameters only."""
        names = {name: f"{file_name(name)}." for name in self._trained}
        held = {each for each in tensors if each.rpartition(".")[0] + "." in names.values()}
        if not held:
            return
        values = self._flat.values
        state = {moment: torch.zeros_like(values) for moment in MOMENTS[:2]}
        try:
            for moment, whole in state.items():
                for name, part in self._flat.by_name(whole).items():
                    part.copy_(tensors[names[name] + moment])
            step = tensors[next(iter(names.values())) + MOMENTS[2]].clone()
        except (KeyError, RuntimeError) as error:
            raise IntegrityError(
                "a checkpoint's optimizer does not fit its adapter",
                where=OPTIMIZER_FILE,
                got=f"{len(tensors)} tensors",
                next_step="run `sisa verify` on the model",
            ) from error
        self._optimizer.state[values] = {**state, MOMENTS[2]: step}


def make_optimizer(training: Mapping[str, Any], values: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Return the run file's optimizer: AdamW (on the CPU in its fused form) or plain SGD."""
    name, lr, decay = training["optimizer"], training["learning_rate"], training["weight_decay"]
    fused = name == "adamw_torch" and values.device.type == "cpu"
    return OPTIMIZERS[name]([values], lr=lr, weight_decay=decay, foreach=False, fused=fused)


def _finite(loss: torch.Tensor, job: SliceJob) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise InvalidInput(
            "training diverged: the loss is not a finite number",
            where=f"shard {job.shard}, slice {job.slice}",
            got=str(value),
            next_step="lower learning_rate in the run file",
        )
    return value
