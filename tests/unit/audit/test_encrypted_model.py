"""An encrypted model under `gc`, `sweep`, `doctor` and `verify`, and changing its form, without torch.

Keys are destroyed before files go, so that whatever copy of a deleted record's files is put back can't
be opened; what the model still needs has its key.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.audit.doctor import Diagnosis, diagnose
from sisa.audit.garbage import ORPHAN, collect_garbage, list_garbage, remove_garbage
from sisa.audit.repair import RepairOutcome, repair_opened
from sisa.audit.residue import Scan, scan_residue
from sisa.audit.verify import check_files, verify
from sisa.config.config import RunConfig
from sisa.core.errors import IntegrityError
from sisa.core.ports import Change
from sisa.flows.context.areas import known_by_area
from sisa.flows.reconcile import erase_unreferenced, reconcile
from sisa.flows.reconfigure import reseal_model
from sisa.flows.wiring.keys import PARTITION_KEY, keep_key, key_path
from sisa.model import Model
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS, REPLAYS
from sisa.store.blobs import files
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.keyring import MAGIC, FileKeyring, is_sealed
from tests.crash import crashing
from tests.fakes.ports import SECRET, changed
from tests.models.confessing import (
    DELETED,
    NAME,
    build,
    content,
    context_of,
    delete,
    record,
    stored,
    use_fake_resources,
)

pytestmark = pytest.mark.usefixtures("own_places")
GONE = record(DELETED)
ROOMS = (RECORDS, INDEX, CHECKPOINTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return homes of the encrypted model and its keys before and after the deletion; read-only."""
    first, second = (tmp_path_factory.mktemp(name) / "home" for name in ("before", "after"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(first))
        first.mkdir()
        build(first / "model", encrypt=True)
        shutil.copytree(first, second)
        patch.setenv("XDG_STATE_HOME", str(second))
        delete(second / "model")
    return first, second


@pytest.fixture
def before(built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the model before the deletion."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shutil.copytree(built[0], tmp_path / "home")))
    return tmp_path / "home" / "model"


@pytest.fixture
def model(built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the model after the deletion of a record."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shutil.copytree(built[1], tmp_path / "home")))
    return tmp_path / "home" / "model"


@pytest.fixture
def backup(built: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a copy of the model directory from before the deletion."""
    return Path(shutil.copytree(built[0] / "model", tmp_path / "backup"))


def keyring_of(model: Path) -> FileKeyring:
    return FileKeyring(model.parent / "sisa" / "keyrings" / NAME)


def keys(model: Path) -> dict[str, frozenset[str]]:
    return {room: keyring_of(model).held(room) for room in ROOMS}


def known(model: Path) -> dict[str, frozenset[str]]:
    with context_of(model) as context:
        return {room: known_by_area(context)[room] for room in ROOMS}


def plaintexts(model: Path) -> dict[str, bytes]:
    """Return the content of all files, unsealed if they are sealed."""
    keyring = keyring_of(model)
    return {
        path: keyring.unseal(room, name, rest[0] if rest else "", data)
        for path, data in content(model).items()
        for room, name, *rest in [path.split("/")]
    }


def scan(model: Path, **options: Any) -> Scan:
    with context_of(model) as context:
        return scan_residue(context, model, **options)


def kinds(found: Scan | Diagnosis) -> list[str]:
    some = found.residue if isinstance(found, Scan) else found.findings
    return sorted({each.kind for each in some})


def repaired(model: Path) -> RepairOutcome:
    before = diagnose(model)
    with context_of(model) as context:
        done = repair_opened(context, model)
    return RepairOutcome(tuple(done), before, diagnose(model))


# --- at rest, and after a deletion ---------------------------------------------------------------


def test_all_files_are_sealed_and_hold_what_a_plain_model_holds(before: Path, trained: Path) -> None:
    assert all(map(is_sealed, content(before).values()))
    assert plaintexts(before) == content(trained)
    assert keys(before) == known(before)


def test_the_keys_of_a_deleted_records_files_are_gone(model: Path, backup: Path) -> None:
    lost = {room: names - known(model)[room] for room, names in known(backup).items()}
    assert all(lost.values())
    assert keys(model) == known(model)
    for room, names in lost.items():
        for name in names:
            source, target = backup / room / name, model / room / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    with context_of(backup) as context:
        problems = check_files(context)[1]
    assert {each.where.partition("/")[2] for each in problems} >= {*frozenset().union(*lost.values())}
    assert all("key is missing" in each.what for each in problems)


def test_a_damaged_slice_is_reported_by_its_path(model: Path) -> None:
    path = model / RECORDS / min(known(model)[RECORDS])
    path.write_bytes(path.read_bytes()[:-1])
    with context_of(model) as context:
        (problem,) = check_files(context)[1]
        (file,) = (each for each in context.stores.ledger.slices() if each.name == path.name)
        with pytest.raises(IntegrityError) as caught:
            context.stores.records.read(file)
    assert problem.where == f"{RECORDS}/{path.name}"
    assert caught.value.where == str(path)


def test_a_healthy_encrypted_model_has_no_finding(model: Path) -> None:
    found = diagnose(model)
    assert (found.findings, found.healthy) == ((), True)
    assert scan(model, ids=[GONE.id], texts=[GONE.text]).clean
    with context_of(model) as context:
        assert list_garbage(context, model) == ()
        assert check_files(context)[1] == []


def test_a_sweep_destroys_all_keys_before_it_unlinks_anything(
    model: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(backup / RECORDS, model / RECORDS, dirs_exist_ok=True)
    keyring, real = keyring_of(model), files.erase
    with context_of(model) as context:
        wanted = known_by_area(context)
    for room in wanted:  # those of no file, too
        for name in ("of no file", f"{TEMPORARY_PREFIX}left"):
            keyring.seal(room, name, "", b"")

    def erase(path: Path) -> None:
        if path.is_relative_to(model):
            assert keys(model) == known(model)
        real(path)

    monkeypatch.setattr(files, "erase", erase)
    with context_of(model) as context:
        erase_unreferenced(context)
    assert {room: keyring.held(room) for room in wanted} == wanted


@pytest.mark.parametrize("step", range(1, 8))
def test_a_sweep_that_is_cut_short_is_finished_by_the_next(before: Path, step: int) -> None:
    """Crash at every key and file that is erased."""
    with crashing((files, "erase"), at=step):
        delete(before)
    with context_of(before) as context:
        reconcile(context)
    assert keys(before) == known(before)
    assert diagnose(before).healthy
    assert scan(before, ids=[GONE.id]).clean


# --- gc ------------------------------------------------------------------------------------------


def test_gc_lists_and_destroys_keys_of_no_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)
    left = [(room, name) for room in (*ROOMS, REPLAYS) for name in ("a", f"{TEMPORARY_PREFIX}b")]
    for place in left:
        keyring_of(model).seal(*place, "", b"")
    opened = Model(model, executor="serial")
    listed = collect_garbage(opened, dry_run=True)
    wanted = sorted(keyring_of(model).location(*place) for place in left)
    assert sorted(each.path for each in listed.items) == wanted
    assert {(each.reason, each.num_bytes) for each in listed.items} == {(ORPHAN, 32)}
    assert sum(map(len, keys(model).values())) > len(left)
    done = collect_garbage(opened, dry_run=False)
    assert (done.removed, done.removed_bytes) == (len(left), 32 * len(left))
    assert keys(model) == known(model)
    assert keyring_of(model).held(REPLAYS) == frozenset()


def test_gc_removes_files_with_their_keys_and_spares_what_waits(model: Path) -> None:
    """A stage of a present target that was not recorded yet is taken over: its key stays with it."""
    with context_of(model) as context:
        head = context.stores.ledger.heads()[0]
        stage = next(each for each in context.stores.ledger.checkpoints(0) if each.key == head.key)
        context.stores.ledger.commit(
            Change(dropped=[stage.key], heads=[replace(head, key=None, depth=0)])
        )
        context.stores.records.write(0, 0, "0" * 64, [])
        (kept,) = (each for each in list_garbage(context, model) if not each.removable)
        assert kept.path == f"{CHECKPOINTS}/{stage.key}"
        removed = remove_garbage(context, model)
        assert [each.path for each in removed] == [f"records/shard-00000-slice-00000-{'0' * 64}.parquet"]
        assert stage.key in context.stores.keyring.held(CHECKPOINTS)
        reconcile(context)
    assert diagnose(model).healthy
    assert keys(model) == known(model)


# --- sweep ---------------------------------------------------------------------------------------


def test_an_old_backup_is_shredded_where_the_record_was(model: Path, backup: Path) -> None:
    found = scan(model, also=[backup], ids=[GONE.id], texts=[GONE.text])
    assert (found.residue, found.clean) == ((), True)
    assert found.scanned["shredded"] >= 3
    lost = [known(backup)[room] - known(model)[room] for room in ROOMS]
    files_lost = sum(
        1 for path in backup.rglob("*") if {path.name, path.parent.name} & frozenset().union(*lost)
    )
    assert found.scanned["shredded"] <= files_lost


def test_files_whose_key_is_gone_are_no_residue_in_the_model_either(model: Path, backup: Path) -> None:
    """What a crash leaves between the destruction of a key and the unlinking of its file."""
    for room in ROOMS:
        shutil.copytree(backup / room, model / room, dirs_exist_ok=True)
    found = scan(model, ids=[GONE.id])
    assert (found.residue, found.clean) == ((), True)
    assert found.scanned["shredded"]
    assert all(each.removable for each in diagnose_garbage(model))


def diagnose_garbage(model: Path) -> tuple[Any, ...]:
    with context_of(model) as context:
        return list_garbage(context, model)


@pytest.mark.parametrize("place", ["model", "elsewhere"])
def test_a_deleted_row_is_found_through_the_encryption(model: Path, tmp_path: Path, place: str) -> None:
    with context_of(model) as context:
        file = context.stores.records.write(0, 0, "0" * 64, [stored(context, DELETED)])
    path = model / RECORDS / file.name
    also = []
    if place == "elsewhere":
        (tmp_path / "copies").mkdir()
        path = path.rename(tmp_path / "copies" / file.name)
        also = [path.parent]
    found = scan(model, also=also, ids=[GONE.id])
    assert {"deleted_row", "string"} <= set(kinds(found))
    wanted = {str(path)} | ({keyring_of(model).location("records", file.name)} if also else set())
    assert {each.where for each in found.residue} == wanted


def test_a_tainted_checkpoint_whose_key_is_held_is_residue(before: Path, backup: Path) -> None:
    keyring = shutil.copytree(keyring_of(before).root, before.parent / "old-keys")
    delete(before)
    shutil.rmtree(keyring_of(before).root)
    shutil.copytree(keyring, keyring_of(before).root)  # a restored backup of the keyring
    assert "unknown_file" in kinds(scan(before))
    for room in ROOMS:
        shutil.copytree(backup / room, before / room, dirs_exist_ok=True)
    found = kinds(scan(before))
    assert {"deleted_row", "deleted_vector", "tainted"} <= set(found)


def test_what_a_replay_left_is_read_with_its_own_keys(model: Path, trained: Path) -> None:
    """A clean checkpoint in scratch is no residue, a tainted one is."""
    stages = sorted((trained / CHECKPOINTS).iterdir())
    clean = [path for path in stages if path.name in known(model)[CHECKPOINTS]]
    for stage, expected in ((clean[0], []), (min({*stages} - {*clean}), ["tainted", "unknown_file"])):
        left = model / REPLAYS / "replay" / stage.name
        left.mkdir(parents=True)
        for path in stage.iterdir():
            data = keyring_of(model).seal(REPLAYS, stage.name, path.name, path.read_bytes())
            (left / path.name).write_bytes(data)
        found = scan(model)
        assert kinds(found) == expected
        assert found.scanned["shredded"] == 0


def test_what_the_model_relies_on_and_can_not_open_is_damaged(model: Path) -> None:
    shutil.rmtree(keyring_of(model).root)
    found = scan(model)
    assert kinds(found) == ["damaged"]
    assert len(found.residue) == len(content(model))
    assert found.scanned["shredded"] == 0


def test_a_text_that_poses_as_sealed_is_read_all_the_same(model: Path) -> None:
    (model / RECORDS / "a.bin").write_bytes(MAGIC + GONE.text.encode())
    assert kinds(scan(model, texts=[GONE.text])) == ["string"]


# --- doctor --------------------------------------------------------------------------------------


def lose_key(model: Path, room: str) -> None:
    name = min(known(model)[room])
    (keyring_of(model).root / room / name).unlink()


@pytest.mark.parametrize("room", [INDEX, CHECKPOINTS])
def test_what_lost_its_key_and_can_be_derived_comes_back(model: Path, room: str) -> None:
    held = plaintexts(model)
    lose_key(model, room)
    found = diagnose(model)
    assert kinds(found) == [{"index": "index", "checkpoints": "checkpoint"}[room]]
    assert "key is missing from the keyring" in found.findings[0].what
    done = repaired(model)
    assert done.after.healthy
    assert plaintexts(model) == held
    assert all(map(is_sealed, content(model).values()))


def test_a_slice_without_its_key_is_lost_and_nothing_is_erased(model: Path) -> None:
    held = content(model)
    lose_key(model, RECORDS)
    lose_key(model, CHECKPOINTS)
    (model / RECORDS / ".tmp-x").write_bytes(b"half")
    found = diagnose(model)
    assert kinds(found) == ["checkpoint", "slice", "unknown"]
    assert not found.ok
    repaired(model)
    assert content(model).items() >= held.items()


def test_a_missing_keyring_is_reported_and_nothing_is_erased(model: Path) -> None:
    held = content(model)
    aside = keyring_of(model).root.rename(model.parent / "aside")
    found = diagnose(model)
    assert kinds(found) == ["checkpoint", "index", "key", "keyring", "slice"]
    (finding,) = [each for each in found.findings if each.kind == "keyring"]
    assert finding.where == str(keyring_of(model).root)
    assert "`keyring:`" in finding.next_step
    assert not repaired(model).done
    assert content(model) == held
    aside.rename(keyring_of(model).root)
    assert diagnose(model).healthy


def test_the_partition_key_rests_with_the_other_keys(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the ledger it would make a dictionary of the tombstones, as an earlier version left it."""
    use_fake_resources(monkeypatch)
    beside, kept = model / PARTITION_KEY, keyring_of(model).root / PARTITION_KEY
    assert (beside.exists(), kept.is_file(), kept.stat().st_mode & 0o777) == (False, True, 0o600)
    kept.rename(beside)
    assert kinds(diagnose(model)) == ["key_place"]
    opened = Model(model, executor="serial")
    secret = beside.read_bytes()
    opened.resume()
    assert (beside.exists(), kept.read_bytes()) == (False, secret)
    assert diagnose(model).healthy
    plain = opened.config.model_copy(update={"encrypt": False})
    keep_key(model, plain, opened.id, opened.secret)
    assert (kept.exists(), beside.read_bytes()) == (False, secret)


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_partition_key_that_moves_to_a_named_file_is_there_alone(
    model: Path, tmp_path: Path, encrypt: bool
) -> None:
    opened = Model(model, executor="serial")
    own = opened.config.model_copy(update={"encrypt": encrypt})
    keep_key(model, own, opened.id, opened.secret)
    place = key_path(model, own, opened.id)
    named = tmp_path / "named.key"
    named.write_bytes(place.read_bytes())
    sisa = own.sisa.model_copy(update={"partition_key_file": named})
    lost = own.sisa.model_copy(update={"partition_key_file": tmp_path / "lost.key"})
    keep_key(model, own.model_copy(update={"sisa": lost}), opened.id, opened.secret)
    assert place.is_file()
    keep_key(model, own.model_copy(update={"sisa": sisa}), opened.id, opened.secret)
    assert named.is_file()
    assert not place.exists()
    sisa = own.sisa.model_copy(update={"partition_key_file": place})  # its own place, by name
    place.write_bytes(named.read_bytes())
    keep_key(model, own.model_copy(update={"sisa": sisa}), opened.id, opened.secret)
    assert place.is_file()


def test_keys_that_others_may_read_are_reported_and_repaired(model: Path) -> None:
    root = keyring_of(model).root
    key = root / RECORDS / min(known(model)[RECORDS])
    key.chmod(0o644)
    root.chmod(0o755)
    found = diagnose(model)
    assert kinds(found) == ["mode"]
    assert {each.where for each in found.findings} == {str(key), str(root)}
    assert repaired(model).after.healthy
    assert (key.stat().st_mode & 0o777, root.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_key_of_no_file_is_reported_and_destroyed(model: Path) -> None:
    keyring_of(model).seal(INDEX, "shard-00000-gone.faiss", "", b"")
    found = diagnose(model)
    assert (kinds(found), found.ok) == (["unknown"], True)
    assert "key without a file" in found.findings[0].what
    assert repaired(model).after.healthy
    assert keys(model) == known(model)


def unseal_one(model: Path) -> None:
    path = model / RECORDS / min(known(model)[RECORDS])
    path.write_bytes(keyring_of(model).unseal(RECORDS, path.name, "", path.read_bytes()))
    path.chmod(0o600)


def test_a_plain_file_in_an_encrypted_model_is_read_reported_and_sealed(model: Path) -> None:
    held = plaintexts(model)
    unseal_one(model)
    with context_of(model) as context:
        assert check_files(context)[1] == []
        (problem,) = verify(context, [], None).findings
    assert problem.what == "not encrypted, although the model is"
    found = diagnose(model)
    assert (kinds(found), found.ok) == (["form"], True)
    assert repaired(model).after.healthy
    assert all(map(is_sealed, content(model).values()))
    assert plaintexts(model) == held


# --- on and off ----------------------------------------------------------------------------------


def set_form(model: Path, *, seals: bool) -> Callable[[], None]:
    """Bring every file into its other form, as `--reconfigure` does; return the commit."""
    with context_of(model) as context:
        reseal_model(changed(context, keyring=FileKeyring(keyring_of(model).root, seals)))

    def commit() -> None:
        with context_of(model) as context:
            config = RunConfig.from_canonical(context.stores.ledger.meta()["config"]).model_copy(
                update={"encrypt": seals}
            )
            context.stores.ledger.commit(Change(meta={"config": config.to_canonical()}))
        keep_key(model, config, NAME, SECRET)

    return commit


def test_a_model_that_is_no_longer_encrypted_is_a_plain_one(model: Path) -> None:
    held = plaintexts(model)
    commit = set_form(model, seals=False)
    assert content(model) == held
    assert not any(keys(model).values())
    with context_of(model) as context:  # cut short before the commit
        assert check_files(context)[1] == []
    commit()
    assert diagnose(model).healthy
    shutil.rmtree(keyring_of(model).root)
    assert diagnose(model).healthy


def test_turning_encryption_off_that_was_cut_short_is_reported_and_repaired(model: Path) -> None:
    set_form(model, seals=False)()
    name = min(known(model)[RECORDS])
    keyring_of(model).seal(RECORDS, name, "", b"")  # as if its key had been left
    assert kinds(diagnose(model)) == ["form"]
    assert repaired(model).after.healthy
    assert not any(keys(model).values())


def test_turning_encryption_on_that_was_cut_short_loses_nothing(model: Path) -> None:
    """Some files are sealed and the ledger does not say so yet: reading, deleting and sweeping go on."""
    held = plaintexts(model)
    set_form(model, seals=False)()
    set_form(model, seals=True)
    assert all(map(is_sealed, content(model).values()))
    assert kinds(diagnose(model)) == ["form"]
    with context_of(model) as context:
        reconcile(context)
    assert plaintexts(model) == held
    delete(model, DELETED + 1)
    with context_of(model) as context:
        assert check_files(context)[1] == []
        assert not context.stores.keyring.seals
    assert repaired(model).after.healthy
    assert not any(map(is_sealed, content(model).values()))
