"""Hidden states that a model keeps: they affect no bit, and are erased with their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.cli.asking import located
from sisa.audit.residue import sweep_model
from sisa.store.areas import HIDDEN_STATES
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    held_files,
    ids_of,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

TOP: dict[str, Any] = {"lora_layers": "top:1", "num_epochs": 1}
ROWS = PEOPLE


def kept(tiny: Tiny) -> dict[str, Path]:
    """Return the files of hidden states by shard and slice."""
    paths = (tiny.directory / HIDDEN_STATES).glob("*")
    return {path.name.rpartition("-")[0]: path for path in paths}


@pytest.mark.parametrize("encrypt", [False, True])
def test_states_are_kept_used_and_erased_with_their_record(
    tmp_path: Path, tiny_base: Path, encrypt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    tiny = Tiny(tmp_path / "kept", tiny_base)
    options = {**TOP, "num_epochs": 2, "encrypt": encrypt, "sisa_block": {"shards": 2, "slices": 2}}
    write_run(tiny.folder, tiny_base, ROWS, prefix_cache_bytes=1 << 24, **options)
    tiny.train()
    before = kept(tiny)
    assert len(before) == 4

    from sisa.lm.train.frozen_layers import PROBE_IDS

    gone = ids_of(ROWS)[5]
    (at,) = (each for each in tiny.open().where([gone]))
    mine = f"shard-{at.shard:05d}-slice-{at.slice:05d}"
    assert at.kept_states == (str(before[mine]),)
    assert at.kept_states[0] in located(tiny.open().where([gone])).text
    spoilt = before[f"shard-{1 - at.shard:05d}-slice-00000"]  # of a shard that is left alone
    spoilt.write_bytes(b"x" + spoilt.read_bytes()[1:])
    half = before[f"shard-{at.shard:05d}-slice-{1 - at.slice:05d}"]
    half.unlink()
    computed = count_computed(monkeypatch)
    tiny.open().forget([gone])
    here = [each for each in tiny.open().where(ids_of(ROWS)) if each.shard == at.shard]
    missing = [each for each in here if each.state == "trained" and each.slice != at.slice]
    records = [each for each in computed if each > len(PROBE_IDS)]
    assert len(records) == len(missing), "what was not held is computed, and nothing else"
    after = kept(tiny)
    assert tiny.open().where([gone])[0].kept_states == ()
    assert before[mine].name not in {path.name for path in after.values()}
    assert spoilt.exists()
    with_cache = held_files(tiny.directory)
    assert sweep_model(tiny.open(), ids=[gone]).clean

    write_run(tiny.folder, tiny_base, ROWS, prefix_cache_bytes=0, **options)
    tiny.train()
    assert kept(tiny) == {}
    assert held_files(tiny.directory) == with_cache
    if not encrypt:
        scratch = train_scratch(tmp_path / "fresh", tiny_base, without(ROWS, [gone]), **options)
        assert held_files(scratch.directory) == with_cache


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each record whose states are computed."""
    from sisa.lm.train import frozen_layers

    alone, computed = frozen_layers.FrozenLayers.alone, list[int]()

    def counting(self: frozen_layers.FrozenLayers, input_ids: Any) -> Any:
        computed.append(len(input_ids))
        return alone(self, input_ids)

    monkeypatch.setattr(frozen_layers.FrozenLayers, "alone", counting)
    return computed


def test_lower_layers_are_asked_once_in_what_form_they_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.base.weights import load_base, resolve_base
    from sisa.lm.train.frozen_layers import FrozenLayers

    base = resolve_base(str(make_tiny_base(tmp_path / "base", layers=5)))
    lower = FrozenLayers(load_base(base)[0], 4)
    states = lower.alone([1, 2, 3])
    computed = count_computed(monkeypatch)
    for _ in range(2):
        with lower.skipped([states], packed=False):
            pass
    assert len(computed) == 1


def test_a_bound_holds_and_reaches_no_bit(tiny_base: Path) -> None:
    from sisa.lm.base.weights import resolve_base
    from sisa.lm.train.trainer import LoraTrainer
    from tests.fakes.ports import FakeHiddenStates
    from tests.models.stages import RECORDS, job_for, names

    base = resolve_base(str(tiny_base))
    job = job_for(base, **TOP_JOB)
    rows = [each.__class__(each.id_digest, each.record, 0) for each in RECORDS]
    found = []
    for num_bytes in (1 << 24, 30_000, 0):
        store = FakeHiddenStates()
        trainer = LoraTrainer(base, 1, hidden_states=store, state_bytes=num_bytes)
        files = [trainer.train(job, None, rows, lambda _: None) for _ in range(2)]
        assert names(files[0]) == names(files[1])
        found.append(names(files[0]))
        assert store.num_bytes("") <= num_bytes
        assert bool(store.held()) == bool(num_bytes)
        again = LoraTrainer(base, 1, hidden_states=store, state_bytes=num_bytes)
        assert names(again.train(job, None, rows, lambda _: None)) == found[0]
    assert found[0] == found[1] == found[2]


TOP_JOB: dict[str, Any] = {"lora_layers": "top:1", "lora_target_modules": "all-linear"}
