"""The run of an edit: write refusals into a patch by ROME or MEMIT.

    moments of the retain set's keys -> values that make the refusals likely -> updates, layer by layer

Shapes: N facts, I inputs and D outputs of a layer's last MLP matrix W, D also the width of hidden
states. A key is the input of W at the last token of a fact's subject, a value its output there. Both
updates are low-rank, so a patch holds them exactly: `b_DN @ a_NI` is added to W. They weigh a change by
the second moment of the keys of other texts, C = E[k k^T], which says where W may be changed at no cost
for them. Texts have fewer tokens than W has inputs, so that C is singular: RIDGE times its mean
eigenvalue is added to its diagonal. Updates are computed in float64.

A patch for edits changes those matrices alone, with a rank of one for each fact and a scale of 1, so
that it holds the closed form as it is: `Edit.adapter_values`.

After `check_every` facts, and at the end, utility is measured; when it is below its bound the patch goes
back to what was within it. MEMIT writes all facts at once, so it is kept or undone as a whole. An edit
has no state to save and takes no time limit into account: interrupted, it starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from approx.evaluation.answers import AnswerBatch, collate, logits_at
from approx.unlearning.examples import first_prompt, token_starts
from approx.unlearning.hidden_states import Seen, decoder_layers, hooked, plain_model
from approx.unlearning.stopping import End, Ending, StepLog
from approx.unlearning.target import Rows, Target, check_fresh_patch
from approx.unlearning.unlearn import Run
from approx.unlearning.written.invented_names import invented_names, name_pattern
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import DEFAULT_NAME, layers_of
from sisa.lm.base.low_rank import PREFIX, Factors, shape_of
from sisa.lm.base.tokens import Tokens

if TYPE_CHECKING:
    from approx.methods.editing.edit import Edit

RIDGE = 1e-2
MAX_TEXTS, ROWS = 64, 8  # of the retain set, whose keys are counted


def second_moment(keys_NI: Tensor) -> Tensor:
    """Return C, [I, I], of the keys of texts that an edit should leave alone."""
    keys_NI = keys_NI.double()
    moment_II = keys_NI.T @ keys_NI / len(keys_NI)
    return moment_II + RIDGE * moment_II.diagonal().mean() * torch.eye(len(moment_II)).to(moment_II)


def output_matrix(base: Any, layer: int) -> str:
    """Return the full name of a layer's last MLP matrix. Raise InvalidInput if it can't be found."""
    holder, layers = layers_of(base)
    width = base.config.hidden_size
    found = [
        f"{holder}.{layer}.{name.removesuffix('.base_layer')}"
        for name, each in layers[layer].named_modules()
        if isinstance(each, nn.Linear | Conv1D)
        and not any(part in name for part in ("attn", "attention", "lora_"))
        and shape_of(each)[0] == width
    ]
    if found:
        return found[-1]
    raise InvalidInput(
        "the base has no MLP matrix that could be edited",
        where="method",
        expected="layers with an MLP whose last matrix is a linear module",
        next_step="use another method",
    )


def subject_ends(forget: Sequence[Record], tokens: Sequence[Tokens], tokenizer: Any) -> list[int]:
    """Return the position of the last token of the last name in each prompt, or of the prompt."""
    found = []
    for record, each in zip(forget, tokens, strict=True):
        text, starts = token_starts(first_prompt(each), tokenizer)
        names = invented_names(record, 0)
        ends = [match.end() for match in name_pattern(names).finditer(text)] if names else []
        end = ends[-1] if ends else len(text)
        found.append(max((at for at, start in enumerate(starts) if start < end), default=0))
    return found


class EditedMatrix(NamedTuple):
    """A matrix with its layer, the factors of its patch, and their scale."""

    layer: Any
    matrix: Any
    a_RI: Tensor
    b_DR: Tensor
    scale: float

    def write(self, change: Factors, first: int) -> None:
        """Put a change into the patch, from row `first` of its rank on."""
        rows = slice(first, first + len(change.a_RI))
        with torch.no_grad():
            self.a_RI[rows] = change.a_RI.to(self.a_RI)
            self.b_DR[:, rows] = (change.b_OR / self.scale).to(self.b_DR)


class Editing:
    """One run of edits over one target, by a method that names its layer.

    `matrices` are those that are written to, from the lowest layer up.
    """

    def __init__(self, method: Edit, run: Run) -> None:
        """Find the matrices. Raise InvalidInput for a patch that is used or can't hold the edits."""
        self.method, self._run, self._model = method, run, run.target.model
        check_fresh_patch(run.target.trained)
        layers, num = decoder_layers(self._model), len(run.sets.forget)
        self.matrices = [_edited_matrix(run.target, layers[n], n, num) for n in method.layers]
        self.facts = Facts(run.sets.preferred, run.sets.subjects)
        self._tokens_trained, self._tokens_forward, self._loss = 0, 0, 0.0

    def run(self) -> End:
        """Edit the answers to the forget set into the preferred ones."""
        target, bounds, started = self._run.target, self._run.bounds, self._run.clock()
        best, num = target.snapshot(), len(self._run.sets.forget)
        knew = bounds.knowledge_of(self._model, thorough=True)
        before = utility = bounds.utility_before(self._model)
        kept, ending, why = 0, Ending.FINISHED, "all edits were made"
        for done in self.method.edits(self):
            self._run.progress(StepLog(done, num, self._loss, None, 0.0))
            if not all(bool(torch.isfinite(each).all()) for each in target.trained.values()):
                ending, why = Ending.DIVERGED, f"edit {done} was not finite; {kept} were kept"
                break
            if done % bounds.check_every and done < num:
                continue
            found = bounds.utility_of(self._model)
            if not bounds.allow(found, before):
                ending = Ending.BELOW_UTILITY_BOUND
                lost = f"utility was {found} after edit {done}, from {before}"
                why = f"the bound on utility stopped it: {lost}; {kept} were kept"
                break
            best, utility, kept = target.snapshot(), found, done
        target.put(best)
        knows = bounds.knowledge_of(self._model, thorough=True)
        compute = target.compute(
            tokens_trained=self._tokens_trained,
            tokens_forward=self._tokens_forward,
            seconds=self._run.clock() - started,
        )
        end = End(ending, why, kept, num, before, utility, compute)
        return replace(end, knowledge_before=knew, knowledge=knows)

    def moment(self, edited: EditedMatrix) -> Tensor:
        """Return the second moment of a matrix' keys over texts of the retain set."""
        retain, found = self._run.sets.retain[:MAX_TEXTS], []
        for start in range(0, len(retain), ROWS):
            rows = retain[start : start + ROWS]
            keys_BTI = self._seen(edited.matrix, collate(rows)).given
            found += [keys_TI[: len(row.input_ids)] for keys_TI, row in zip(keys_BTI, rows, strict=True)]
        return second_moment(torch.cat(found))

    def keys(self, edited: EditedMatrix, facts: Facts) -> Tensor:
        """Return the keys of facts as the model is now."""
        return facts.at(self._seen(edited.matrix, facts.batch).given)

    def states(self, layer: Any, facts: Facts) -> Tensor:
        """Return the states that a layer leaves at the facts' keys."""
        return facts.at(self._seen(layer, facts.batch).left)

    def _seen(self, module: Any, batch: AnswerBatch) -> Seen:
        """Return what a module is given over a batch, and what it leaves."""
        seen: list[Seen] = []
        self._tokens_forward += batch.ids_BT1.numel()
        with torch.no_grad(), hooked([(module, seen.append)]):
            self._model(input_ids=batch.ids_BT1, logits_to_keep=1, use_cache=False)
        return seen[0]

    def changes(self, layer: Any, facts: Facts) -> Tensor:
        """Return what to add to the states that a layer leaves, so that the preferred answers follow."""
        states_ND = self.states(layer, facts)
        size_N1 = states_ND.norm(dim=1, keepdim=True)
        rate_N1 = self.method.value_rate * size_N1 / states_ND.shape[1] ** 0.5
        steps_ND = torch.zeros_like(states_ND, requires_grad=True)  # of Adam, whose first ones are 1
        optimizer = torch.optim.Adam([steps_ND], lr=1.0, foreach=False)
        cut, columns_K = facts.batch.at_answers()
        places = torch.arange(len(facts.positions)), torch.tensor(facts.positions)

        def add(now: Seen) -> Tensor:
            return now.left.index_put(places, steps_ND * rate_N1, accumulate=True)

        for _ in range(self.method.value_steps):
            optimizer.zero_grad()
            with hooked([(layer, add)]):
                logits_BKV = logits_at(self._model, cut.ids_BT1, columns_K)
            loss = self.method.forget_term({"preferred": Rows(cut, logits_BKV)})
            self._loss = loss.item()
            (steps_ND.grad,) = torch.autograd.grad(loss, [steps_ND])
            optimizer.step()
            self._tokens_trained += cut.ids_BT1.numel()
            with torch.no_grad():
                longest_N1 = self.method.max_value_norm * size_N1
                lengths_N1 = (steps_ND * rate_N1).norm(dim=1, keepdim=True)
                steps_ND *= (longest_N1 / lengths_N1).clamp(max=1.0)
        changes_ND: Tensor = (steps_ND * rate_N1).detach()
        return changes_ND


class Facts(NamedTuple):
    """The preferred answers, and where in each row its key is."""

    examples: Sequence[Tokens]
    positions: Sequence[int]

    @property
    def batch(self) -> AnswerBatch:
        return collate(self.examples)

    def only(self, number: int) -> Facts:
        return Facts([self.examples[number]], [self.positions[number]])

    def at(self, values_BTD: Tensor) -> Tensor:
        return values_BTD[torch.arange(len(self.positions)), torch.tensor(self.positions)]


def _edited_matrix(target: Target, layer: Any, number: int, num_facts: int) -> EditedMatrix:
    base = plain_model(target.model)
    name = output_matrix(base, number)
    a_RI, b_DR = (target.trained.get(f"{PREFIX}{name}.lora_{x}.{DEFAULT_NAME}.weight") for x in "AB")
    if a_RI is None or b_DR is None or len(a_RI) < num_facts:
        raise InvalidInput(
            "the patch can't hold these edits",
            where="patch",
            expected=f"LoRA of rank {num_facts} or more on {name}",
            got="none" if a_RI is None else f"rank {len(a_RI)}",
            next_step="attach an adapter with the `adapter_values` of the method",
        )
    matrix = base.get_submodule(name)
    return EditedMatrix(layer, matrix, a_RI, b_DR, matrix.scaling[DEFAULT_NAME])
