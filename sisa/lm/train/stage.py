"""One stage of training: its model, optimizer and schedule, and the files of its checkpoint.

Seeds come from the job: adapter weights from (seed, shard), dropout from (seed, shard, slice,
micro-batch). The schedule and its warm-up restart with each stage; the optimizer's moments continue. The
loss of an optimizer step is the summed cross-entropy divided by the number of label tokens in all its
micro-batches. Adapters, gradients, moments and loss are in float32 whatever the base's dtype, and so are
the files.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from sisa.core.checkpoint_files import ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE
from sisa.core.digest import canonical_json
from sisa.core.domain import SliceJob
from sisa.core.errors import IntegrityError
from sisa.lm.base.adapter import adapter_files
from sisa.lm.base.low_rank import read_tensors, tensor_bytes
from sisa.lm.base.numerics import seed_from
from sisa.lm.train.frozen_layers import HiddenStateCache
from sisa.lm.train.lanes import MicroBatch
from sisa.lm.train.losses import Batch, count_labels
from sisa.lm.train.trainable import Trainable, file_name
from sisa.planning.plan import LAYERWISE

AVERAGES, STEP = ("exp_avg", "exp_avg_sq"), "step"  # of AdamW; plain SGD has no moments


class FlatParams:
    """Trained parameters laid out as one parameter, so that one optimizer update covers all of them.

    Each parameter is a view of its part, in the order of names. A tall matrix is stored transposed
    there, as its gradient arrives; what `by_name` returns has the parameter's own shape. Gradients
    accumulate in place. All parameters share one dtype and one device.
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


class Stage:
    """The model, optimizer and schedule of a stage."""

    def __init__(
        self,
        job: SliceJob,
        wrapped: Trainable,
        parent: Mapping[str, bytes] | None,
        num_steps: int,
        hidden_states: HiddenStateCache | None = None,
    ) -> None:
        """Begin a stage from its parent's files, or from the base.

        `hidden_states` are those of the wrapped base. Raise IntegrityError if the parent's files are
        damaged.
        """
        training = job.training
        tensors = None if parent is None else read_tensors(parent, ADAPTER_FILE)
        block = (training[LAYERWISE], len(job.before)) if LAYERWISE in training else None
        self._job, self._wrapped = job, wrapped
        self._hidden_states = hidden_states or HiddenStateCache()
        self._own = wrapped.begin(tensors, seed_from(training["seed"], job.shard, "init"), block)
        self._flat = FlatParams(self._own.trained)
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

    def step(self, batches: Sequence[Batch]) -> Generator[MicroBatch, None, tuple[float, int]]:
        """Take one optimizer step; yield each micro-batch, which the caller computes.

        Return the summed loss and the number of label tokens.
        """
        training = self._job.training
        num_labels = sum(count_labels(batch) for batch in batches)
        mean = 0.0
        self._optimizer.zero_grad(set_to_none=False)
        for batch in batches:
            at = (training["seed"], self._job.shard, self._job.slice, "dropout", self._micro_batches)
            micro_batch = MicroBatch(
                job=self._job,
                wrapped=self._wrapped,
                own=self._own,
                hidden_states=self._hidden_states,
                batch=batch,
                num_labels=num_labels,
                seed=seed_from(*at),
            )
            yield micro_batch
            mean += micro_batch.loss
            self._micro_batches += 1
        torch.nn.utils.clip_grad_norm_([self._flat.values], training["max_grad_norm"], foreach=False)
        self._optimizer.step()
        self._scheduler.step()
        return mean * num_labels, num_labels

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
            **adapter_files(self._own.model),
            OPTIMIZER_FILE: tensor_bytes(self._moments()),
            STATE_FILE: canonical_json(state),
        }

    def _moments(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's moments of each parameter, by name; all share one count of steps."""
        found: dict[str, torch.Tensor] = {}
        for moment, whole in self._optimizer.state[self._flat.values].items():
            if moment == STEP:
                parts = {name: whole.clone() for name in self._own.trained}
            else:
                parts = self._flat.by_name(whole)
            found |= {f"{file_name(name)}.{moment}": each for name, each in parts.items()}
        return found

    def _put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore moments. Raise IntegrityError if the parent has those of some parameters only."""
        names = [file_name(name) for name in self._own.trained]
        if not any(each.rpartition(".")[0] in names for each in tensors):
            return
        values = self._flat.values
        state = {moment: torch.zeros_like(values) for moment in AVERAGES}
        try:
            for moment, whole in state.items():
                for name, part in self._flat.by_name(whole).items():
                    part.copy_(tensors[f"{file_name(name)}.{moment}"])
            state[STEP] = tensors[f"{names[0]}.{STEP}"].clone()
        except (KeyError, RuntimeError) as error:
            raise IntegrityError(
                "a checkpoint's optimizer does not fit its adapter",
                where=OPTIMIZER_FILE,
                got=f"{len(tensors)} tensors",
                next_step="run `sisa verify` on the model",
            ) from error
        self._optimizer.state[values] = state


def make_optimizer(training: Mapping[str, Any], values: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Return the run file's optimizer: AdamW (on the CPU in its fused form) or plain SGD."""
    lr, decay = training["learning_rate"], training["weight_decay"]
    if training["optimizer"] == "sgd":
        return torch.optim.SGD([values], lr=lr, weight_decay=decay, foreach=False, fused=False)
    fused = values.device.type == "cpu"
    return torch.optim.AdamW([values], lr=lr, weight_decay=decay, foreach=False, fused=fused)
