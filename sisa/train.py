"""Train a model from a run file, or move an existing one to a changed run file.

Everything is read and checked before anything is written. Records that an existing model does not hold
are counted and left to `add`. `flows/reconfigure.py` carries out the effects of a changed run file.
"""

from __future__ import annotations

import secrets
import uuid
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from sisa.audit.garbage import AREAS, LEDGER_FILES
from sisa.config.config import Difference, RunConfig, differences
from sisa.config.fields import Effect, is_uri
from sisa.config.runfile import load_run_file
from sisa.core.digest import KEY_BYTES, Keyed
from sisa.core.domain import DEFAULT_PRECISION, Record
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.event_chain import key_name
from sisa.core.events import Notice, Report, silent
from sisa.core.ledger_meta import FORM
from sisa.core.patches import active, wanted
from sisa.core.ports import Change
from sisa.core.run import running
from sisa.data.reader import located_problems, read_records
from sisa.flows import reconfigure
from sisa.flows.answers.ask import usual_kind
from sisa.flows.context.commit import commit, is_behind
from sisa.flows.context.context import Context, trained_over
from sisa.flows.ingest import Taken, check_same_records, train
from sisa.flows.reconcile import Trained, adopt_and_erase, under_way
from sisa.flows.record_checks import check_first, check_risks
from sisa.flows.restored_backup import catch_up
from sisa.flows.wiring import wiring
from sisa.flows.wiring.executors import OpenExecutor, find_executor
from sisa.flows.wiring.keys import (
    PARTITION_KEY,
    deleted_under,
    keep_key,
    keep_new_key,
    keyrings_dir,
    witness_dir,
    witness_of,
    write_key,
)
from sisa.flows.wiring.ledger_place import (
    LEDGER,
    LOCK,
    claim_ledger,
    has_ledger,
    model_lock,
    open_ledger,
)
from sisa.flows.wiring.progress import progress
from sisa.flows.wiring.resources import Resources, indexed_digest
from sisa.flows.wiring.scratch_base import guard, prepare_base
from sisa.lm.base.cuda_device import require_device
from sisa.model import Model
from sisa.planning.layout import Assigner
from sisa.store.areas import CHECKPOINTS, INDEX, REPLAYS, VAULT, storage_root
from sisa.store.blobs import files
from sisa.store.blobs.keyring import read_secret
from sisa.store.ledger.database import ledger_version
from sisa.store.ledger.sqlite import COMMIT_LOCK


@running()
def train_model(
    run_file: Path | str | RunConfig,
    *,
    records: list[Record] | None = None,
    executor: str | OpenExecutor = "auto",
    report: Report | None = None,
    accept_differences: bool = False,
    allow_deleted: bool = False,
) -> tuple[Model, Taken]:
    """Train a run file's model, or what is missing of it.

    `records` are trained instead of those of the run file's `datasets`. `report` gets the events of
    `sisa.core.events`, and the model keeps it. Without one, progress is shown on standard error until
    this function returns. `accept_differences` moves an existing model to a changed run file; without it
    ConfigConflict lists the differences. A first training refuses records that another model under the
    same partition key deleted, unless `allow_deleted`; an existing model counts deleted records and
    never takes them.
    """
    config = run_file if isinstance(run_file, RunConfig) else load_run_file(Path(run_file))
    with progress() if report is None else nullcontext(report) as shown:
        find_executor(executor)  # refuses an unknown one before anything is written
        require_device(config.precision)
        _check_keys_outside(config)
        first = not _committed(config.output_dir)
        if records is None:
            records = read_records(
                config.datasets,
                config.sisa.group_by,
                config.limits,
                subjects="some" if first else "any",
                identifiers=config.identifiers.columns,
            )
            shown(Notice(records.subject_report()))
        with located_problems(records):
            if first:
                _check_no_foreign_files(config.output_dir)
                taken = _first_training(config, records, executor, shown, allow_deleted=allow_deleted)
            model = Model(config.output_dir, executor=executor, report=shown)
            if not first:
                taken = _move_and_train(model, config, records, accept_differences=accept_differences)
    if report is None:
        model.report = silent
    return model, taken


def _move_and_train(
    model: Model, config: RunConfig, records: list[Record], *, accept_differences: bool
) -> Taken:
    """Move an existing model to a run file, then train what is missing."""
    found = differences(model.config, config)
    if found or accept_differences:
        check_risks(config.sisa.bands, records)
    _check_move(model, config, accept_differences=accept_differences)
    resources = None  # the model's own stay
    if accept_differences:  # the lock is not held while others are trained or fetched
        if any((each.key, each.effect) == ("base_model", "reset") for each in found):
            prepare_base(config, records, model.executor, model.report)
        resources = Resources(config, None, None)
        _ = resources.base, resources.embedder
    with model.locked():  # one lock over both steps
        _check_move(model, config, accept_differences=accept_differences)  # it may have moved meanwhile
        moved = _move(model, config, resources, records)
        model.reload()
        with model.context(locked=True) as context:
            model.resources.refuse_changed_base()
            taken = train(context, records)
    return replace(
        taken,
        record_epochs_trained=taken.record_epochs_trained + moved.record_epochs_trained,
        slices_trained=taken.slices_trained + moved.slices_trained,
        record_epochs_others=taken.record_epochs_others + moved.record_epochs_others,
    )


def _first_training(
    config: RunConfig,
    records: list[Record],
    executor: str | OpenExecutor,
    report: Report,
    *,
    allow_deleted: bool,
) -> Taken:
    """Train a new model.

    Every record and the base are checked before anything is written. A base from scratch is the
    exception: it must be trained before tokens can be counted.
    """
    key_file, directory = config.sisa.partition_key_file, config.output_dir
    secret = read_secret(key_file) if key_file else secrets.token_bytes(KEY_BYTES)
    keyed, resources = Keyed(secret), Resources(config, None, None)
    deleted = [] if allow_deleted else deleted_under(config, keyed)
    known = isinstance(config.base_model, str)  # one from scratch counts tokens once it is trained
    checks = [resources.count_tokens] if known else []
    check_first(config.training(), Assigner(keyed, config.layout), records, deleted, checks)
    witness_of(config, keyed, uuid.uuid4().hex).check_writable()
    if config.storage is not None:
        storage_root(config.storage).check_usable()
    if config.ledger is not None:
        ledger_version(config.ledger)  # can be reached, and may be used
    prepare_base(config, records, executor, report)
    resources.count_tokens(records)
    resources.check_base()
    form = usual_kind(Counter[str](record.kind for record in records))
    meta = {**resources.meta(), FORM: form, "key": key_name(keyed)}
    files.make_directory(directory)
    if config.ledger is None and (kind := files.network_file_system(directory)):
        what = "its ledger is not safe there; name a server by `ledger:`, or only `storage:` there"
        report(Notice(f"output_dir is on a network file system ({kind}): {what}"))
    with model_lock(directory, config.ledger):
        if _committed(directory):
            raise Busy(
                "another process has trained this model meanwhile",
                where=str(directory),
                next_step="run the same command again",
            )
        claim_ledger(directory, config.ledger)
        name = _new_name(config)
        keep_new_key(directory, config, name, secret)
        with wiring.open_context(
            directory, resources, keyed, name, executor, report, create=True
        ) as context:
            return train(context, records, {**meta, "model": name})


def _new_name(config: RunConfig) -> str:
    """Return a name for a new model.

    Keys and areas of an encrypted model, or of one in a storage, contain its name. Such a model keeps
    its name through interrupted attempts, so that abandoned files can be found again.
    """
    with open_ledger(config.output_dir, create=True) as ledger:
        name = ledger.meta().get("model") or uuid.uuid4().hex
        if config.encrypt or config.storage:
            ledger.commit(Change(meta={"model": name}))
    return name


def _check_keys_outside(config: RunConfig) -> None:
    keys, within = keyrings_dir(config).resolve(), [config.output_dir]
    within += [Path(config.storage)] if config.storage and not is_uri(config.storage) else []
    if any(keys.is_relative_to(each.resolve()) for each in within):
        raise InvalidInput(
            "the keys would be inside the model, so a copy of the model would include its keys",
            where=str(keys),
            next_step="name another directory by `keyring:`",
        )


def _check_keys_moved(model: Model, config: RunConfig) -> None:
    """Raise ConfigConflict if `keyring:` names a directory to which the keys were not moved."""
    old, new = (keyrings_dir(each) / model.id for each in (model.config, config))
    needed = model.config.encrypt or model.keyring.held(VAULT)
    if needed and old != new and not new.is_dir():
        raise ConfigConflict(
            "the model's keyring is not where the run file says",
            where=str(new),
            next_step=f"move {old} there first",
        )


def _check_move(model: Model, config: RunConfig, *, accept_differences: bool) -> None:
    """Raise ConfigConflict for settings that can't change and for unaccepted differences."""
    named = config.sisa.partition_key_file
    if named is not None and Keyed(read_secret(named)).name != Keyed(model.secret).name:
        raise ConfigConflict(
            "a model's partition key can't change: its ledger of deleted records is kept under it",
            where="sisa.partition_key_file",
            next_step="give the key that the model was trained with, or train a new model",
        )
    found = _differences(model, config)
    if not accept_differences:
        reconfigure.check_no_differences(found, str(config.output_dir))
    if any(each.key == "sisa.group_by" for each in found):
        raise ConfigConflict(
            "the column that names the subject can't change: the held records do not have another",
            where="sisa.group_by",
            next_step="restore it, or train a new model",
        )
    _check_keys_moved(model, config)
    if model.config.ledger != config.ledger:
        raise ConfigConflict(
            "a model's ledger can't change by training: a command moves it",
            where="ledger",
            expected=model.config.ledger or "null",
            got=config.ledger or "null",
            next_step="run `sisa ledger move -m DIR --to URL` (or `--to file`), or restore the key",
        )
    if model.config.storage != config.storage:
        raise ConfigConflict(
            "a model's storage can't change: what is held would have to be moved",
            where="storage",
            expected=model.config.storage or "null",
            got=config.storage or "null",
            next_step="restore it, or train a new model",
        )


def _differences(model: Model, config: RunConfig) -> list[Difference]:
    """Return the differences, except the path of the key file: only its content must be the same."""
    found = differences(model.config, config)
    return [each for each in found if each.key != "sisa.partition_key_file"]


def _move(
    model: Model, config: RunConfig, resources: Resources | None, records: list[Record]
) -> Trained:
    """Move an existing model to a changed run file; the caller holds its lock.

    `resources` are the run file's base and embedder; None: the model's own stay.
    """
    effects = {each.effect for each in _differences(model, config)} - {"none"}
    if resources is None:
        resources = Resources(config, model.base, model.embedder)
    else:  # another base or embedder may have the same name
        if resources.base.digest != model.base.digest:
            effects.add("reset")
        if indexed_digest(resources.embedder) != model.embedder.digest:
            effects.add("reindex")
    if not effects and not differences(model.config, config):
        return Trained()
    if effects:
        resources.check_base()
    with model.context(as_it_is=True) as old:
        if config.precision != DEFAULT_PRECISION:
            _check_no_patches(old)
        _catch_up_first(old, moving=witness_dir(config) != witness_dir(model.config))
        check_same_records(old, records)  # with the generations of their present slices
        if under_way(old):
            adopt_and_erase(old)  # finish the erasure of an interrupted deletion before training
    write_key(model.directory, config, model.id, model.secret)
    with wiring.open_context(
        model.directory, resources, Keyed(model.secret), model.id, model.executor, model.report
    ) as context:
        done = _apply(context, resources, effects)
    keep_key(model.directory, config, model.id, model.secret)
    return done


def _apply(context: Context, resources: Resources, effects: set[Effect]) -> Trained:
    """Carry out the effects of a changed run file, and store it."""
    config = context.settings.config
    if "reset" in effects:
        held = [each.record for each in reconfigure.all_records(context)]
        check_risks(config.sisa.bands, held)
        guard(config, held)
    if "reseal" in effects:
        reconfigure.reseal_model(context)
    if effects:
        return reconfigure.move(context, effects, resources.meta())
    commit(context, Change(meta={"config": config.to_canonical()}))
    return Trained()


def _check_no_patches(old: Context) -> None:
    patches = old.stores.ledger.patches()
    if active(patches) or wanted(patches) or trained_over(old.stores.ledger):
        raise ConfigConflict(
            "the model has patches, which need the CPU and float32",
            where="device, dtype",
            next_step="revert them first (`sisa approx revert --all --retrain-shards`)",
        )


def _catch_up_first(old: Context, *, moving: bool) -> None:
    """Let a restored backup catch up with its witness, before it is `moving` to another one."""
    try:
        if is_behind(old):
            catch_up(old)
    except EnvironmentFault as error:
        if not moving:
            raise
        old.report(Notice(f"the former witness is not compared: {error.what} ({error.where})"))


def _committed(directory: Path) -> bool:
    """Return whether a first training reached its commit. Raise IntegrityError for a lost ledger."""
    if has_ledger(directory):
        # `create`, since its creation may have been interrupted.
        with open_ledger(directory, create=True) as ledger:
            if "config" in ledger.meta():
                return True
    index_alone = files.held_names(directory / INDEX) and not has_ledger(directory)
    if files.held_names(directory / CHECKPOINTS) or index_alone:
        # Checkpoints are written after the first commit, and an index after the ledger's file.
        raise IntegrityError(
            "the ledger is missing, but other parts of a model are held",
            where=str(directory),
            expected=LEDGER,
            next_step="restore the ledger from a backup, since it records what was deleted; or start "
            "in another directory",
        )
    return False


def _check_no_foreign_files(directory: Path) -> None:
    """Raise InvalidInput if a first training would write among files that are not a model's.

    A partition key without a ledger is another model's: an attempt makes the ledger first.
    """
    ours = {*LEDGER_FILES, LOCK, COMMIT_LOCK, REPLAYS, *AREAS}
    ours |= {PARTITION_KEY} if has_ledger(directory) else set()
    foreign = sorted(files.held_names(directory) - ours) if directory.is_dir() else []
    if foreign or (directory.exists() and not directory.is_dir()):
        raise InvalidInput(
            "output_dir holds something that is not a model",
            where=str(directory),
            expected="a new or empty directory, or an interrupted first training",
            got=f"{', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}" or "a file",
            next_step="name a key of another model by `sisa.partition_key_file`"
            if foreign == [PARTITION_KEY]
            else "choose an empty or a new directory",
        )
