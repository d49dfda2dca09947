"""What ROME and MEMIT share: they write refusals into the last MLP matrices of some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from approx.methods.editing.edit_run import Editing, output_matrix
from approx.methods.method import Family, Method, Role, mean_nll
from approx.unlearning.causal_tracing import trace_states
from approx.unlearning.examples import Sets
from approx.unlearning.stopping import End
from approx.unlearning.target import Rows
from approx.unlearning.unlearn import Run
from approx.unlearning.value_checks import given, whole_numbers
from sisa.core.errors import Problem


@dataclass(frozen=True)
class Edit(Method):
    """An edit towards a refusal: how far a value may move, and in how many steps it is found."""

    layer: int | None = None
    value_steps: int = 25
    value_rate: float = 0.2
    max_value_norm: float = 4.0
    family: ClassVar[Family] = "editing"
    positive: ClassVar[tuple[str, ...]] = ("value_rate", "max_value_norm")
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget", "preferred", "retain"})
    at_subjects: ClassVar[bool] = True

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the edit is not defined."""
        yield from super().problems()
        yield from whole_numbers(1, value_steps=self.value_steps)
        yield from whole_numbers(0, **given(layer=self.layer))

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return the loss by which values are found."""
        return mean_nll(rows["preferred"].current_BTV, rows["preferred"].batch)

    @property
    def num_layers(self) -> int:
        """Return the number of layers that are written to, `layer` and those beneath."""
        return 1

    @property
    def layers(self) -> range:
        """Return the layers that are written to, from the lowest up. Raise ValueError without one."""
        if self.layer is None:
            raise ValueError("the layer is chosen before anything is edited")
        return range(max(0, self.layer + 1 - self.num_layers), self.layer + 1)

    def edits(self, editing: Editing) -> Iterator[int]:
        """Make one edit after another; yield the number of facts that the patch now holds."""
        raise NotImplementedError

    def apply(self, run: Run) -> End:
        """Edit the answers to the forget set into the preferred ones."""
        return Editing(self, run).run()

    def layer_effects(self, model: Any, sets: Sets) -> list[float]:
        """Return the effects at the subjects, where layers above what the answers read have none."""
        return trace_states(model, sets.forget, sets.subjects)

    def adapter_values(self, base: Any, num_texts: int) -> dict[str, Any]:
        """Return rank, scale and modules of a patch that can hold the edits."""
        modules = [output_matrix(base, layer) for layer in self.layers]
        return {"lora_target_modules": modules, "lora_r": num_texts, "lora_alpha": num_texts}

    def patch_problems(self, *, bounded: bool, selected: bool) -> Iterator[Problem]:  # noqa: ARG002
        """Yield a problem for a selection of modules."""
        if selected:
            yield Problem("selection", f"{self.name} chooses its layers itself: all")
