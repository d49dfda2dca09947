"""Carry out one step of a model's history in its own process, which may kill itself at any effect.

    python -m tests.endurance.child '{"do": "forget", "model": "site/model", "ids": ["p001-q1"]}'
    python -m tests.endurance.child --serve cheap

An order is a JSON object:

    do           train (run, accept), add (model, file), forget (model, ids or
                 subject), submit (model, ids, external_id), run (model), base (to)
    trainer      cheap (no torch, confessing) or lora (the real one)
    home         the process's HOME and state directory
    kill         {"at": k, "when": before | after | torn}: SIGKILL at the k-th effect
    kill_after_s SIGKILL from outside, after so many seconds (with --serve)
    trace        file for the names of all effects, in order
    errors       file for the error

Effects are everything that reaches the disk (renames, fsyncs, unlinks, directories, ledger commits, each
SQL write and the emptying of the log) and every stage of training with its ticks. `torn` first cuts the
file that is about to be flushed in half, as a power cut would. With `--serve`, a process that has
imported everything and done nothing forks one child for each order on its standard input, so that a kill
costs milliseconds.

The checks of the driver are in `kills.py`. Power cuts that lose flushed data are not covered.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIGHT = (
    "sisa.model",
    "sisa.train",
    "pandas",  # pyarrow imports it when it first makes a table
    "pyarrow.dataset",
    "pyarrow.parquet",
    "faiss",
    "tests.endurance.cheap",
)
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "safetensors.torch",
    "sisa.lm.train.trainer",
    "sisa.lm.routing.embedder",
)
FAILED = 100  # plus the exit code of the error
FOLDERS = ("records", "index", "checkpoints", "scratch", "witness", "home")


def die() -> NoReturn:
    """End this process as a power cut would: nothing of it runs afterwards."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    raise AssertionError("still alive")


class Fuse:
    """Count effects by name, and kill the process at the chosen one."""

    def __init__(self, at: int = 0, when: str = "before") -> None:
        self.at = at
        self.when = when
        self.names: list[str] = []

    def enter(self, name: str, torn: int | None = None) -> int:
        self.names.append(name)
        number = len(self.names)
        if number == self.at and self.when == "torn":
            if torn is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(torn, os.fstat(torn).st_size // 2)
            die()
        if number == self.at and self.when == "before":
            die()
        return number

    def leave(self, number: int) -> None:
        if number == self.at and self.when == "after":
            die()

    def guard(self, effect: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            torn = args[0] if effect.__name__ == "fsync" else None
            number = self.enter(name(*args), torn)
            result = effect(*args, **options)
            self.leave(number)
            return result

        return guarded


def folder_of(path: Any) -> str:
    """Return the part of a model to which a path or a file descriptor belongs."""
    if isinstance(path, int):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{path}")
    parts = Path(os.fspath(path) if not isinstance(path, int) else "?").parts
    found = next((part for part in reversed(parts) if part in FOLDERS), "model")
    return f"keys of {found}" if "keyrings" in parts else found


def commit_name(_ledger: Any, change: Any) -> str:
    """Return what a commit does, in a word or two."""
    states = [each.state for each in getattr(change, "requests", ())]
    request = getattr(change, "request", None)
    states += [request.state] if request is not None else []
    kinds = ("removed", "added", "checkpoints", "dropped", "heads", "meta")
    name = next((kind for kind in kinds if getattr(change, kind)), "nothing")
    return " ".join(["commit", name, *sorted(set(states))])


def wire(fuse: Fuse) -> None:
    """Put every effect of this process behind the fuse."""
    import sqlalchemy as sa
    from sqlalchemy.engine import Engine

    from sisa.store.ledger.ledger import SqlLedger

    names = (("replace", 1), ("rename", 1), ("link", 1), ("fsync", 0), ("unlink", 0), ("mkdir", 0))
    for name, which in names:
        label = _labelled(name, which)
        setattr(os, name, fuse.guard(getattr(os, name), label))
    shutil.rmtree = fuse.guard(shutil.rmtree, _labelled("rmtree", 0))  # type: ignore[assignment]
    SqlLedger.commit = fuse.guard(SqlLedger.commit, commit_name)  # type: ignore[method-assign]
    SqlLedger.scrub = fuse.guard(SqlLedger.scrub, lambda *_: "scrub")  # type: ignore[method-assign]

    def before(_c: Any, _u: Any, statement: str, _p: Any, context: Any, _m: Any) -> None:
        words = statement.split()
        if words[0] in ("INSERT", "DELETE", "UPDATE", "CREATE") or "wal_checkpoint" in statement:
            context.fuse_number = fuse.enter(f"sql {words[0].lower()}")

    def after(_c: Any, _u: Any, _s: str, _p: Any, context: Any, _m: Any) -> None:
        if hasattr(context, "fuse_number"):
            fuse.leave(context.fuse_number)

    sa.event.listen(Engine, "before_cursor_execute", before)
    sa.event.listen(Engine, "after_cursor_execute", after)


def _labelled(name: str, which: int) -> Callable[..., str]:
    def label(*args: Any) -> str:
        return f"{name} {folder_of(args[which])}"

    return label


def executor(fuse: Fuse, trainer: str, pause_s: float) -> Any:
    """Return a serial executor whose every stage and tick is an effect."""

    def open_executor(site: Any, _options: Mapping[str, Any]) -> Any:
        from sisa.flows.chains import SerialExecutor
        from sisa.flows.wiring.executors import open_stores, open_trainer

        inner: Any
        if trainer == "lora":
            inner = open_trainer(site)
        else:
            from tests.endurance.cheap import SlowTrainer

            inner = SlowTrainer(pause_s)

        class Watched:
            def train(self, job: Any, parent: Any, records: Any, progress: Any) -> dict[str, bytes]:
                def tick(at: Any) -> None:
                    number = fuse.enter("training tick")
                    progress(at)
                    fuse.leave(number)

                number = fuse.enter("training stage")
                files: dict[str, bytes] = inner.train(job, parent, records, tick)
                fuse.leave(number)
                return files

        return SerialExecutor(Watched(), *open_stores(site))

    return open_executor


def carry_out(order: Mapping[str, Any], fuse: Fuse) -> None:
    """Carry out an order on the model that it names."""
    import sisa

    if order["do"] == "base":
        from tests.models.tiny_base import make_tiny_base

        make_tiny_base(Path(order["to"]))
        return
    run = executor(fuse, order["trainer"], order.get("pause_s", 0.0))
    if order["do"] == "train":
        sisa.train_model(order["run"], executor=run, accept_differences=order.get("accept", False))
        return
    model = sisa.open_model(order["model"], executor=run)
    if order["do"] == "add":
        model.add(order["file"])
    elif order["do"] == "run":
        model.run()
    elif order["do"] == "submit":
        from sisa.flows.requests import Terms

        model.submit(order["ids"], terms=Terms(external_id=order["external_id"], approver="officer"))
    elif order.get("subject"):
        model.forget(subject=order["subject"])
    else:
        model.forget(order["ids"])


def obey(order: Mapping[str, Any]) -> int:
    """Carry out an order in this process; return the exit code."""
    from sisa.core.errors import SisaError
    from tests.endurance.cheap import cheap_resources

    if home := order.get("home"):
        os.makedirs(home, exist_ok=True)
        os.environ.update(HOME=home, XDG_STATE_HOME=f"{home}/state", XDG_DATA_HOME=f"{home}/data")
    fuse = Fuse(**order.get("kill", {}))
    error: BaseException | None = None
    code = 0
    parts = cheap_resources() if order.get("trainer") == "cheap" else contextlib.nullcontext()
    if order["do"] != "base":
        wire(fuse)
    try:
        with parts:
            carry_out(order, fuse)
    except SisaError as caught:
        error, code = caught, FAILED + caught.exit_code
    except BaseException as caught:
        error, code = caught, FAILED + 1
    fuse.at = 0
    if "trace" in order:
        Path(order["trace"]).write_text(json.dumps(fuse.names))
    if error is not None and "errors" in order:
        import traceback

        trace = "".join(traceback.format_exception(error))
        Path(order["errors"]).write_text(trace)
    return code


def serve(trainer: str) -> None:
    """Fork a child for each order on standard input; answer with its exit status (-9: killed)."""
    for name in (*LIGHT, *(HEAVY if trainer == "lora" else ())):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = FAILED + 1
            try:
                code = obey(order)
            finally:
                os._exit(code)
        status = _wait(pid, order.get("kill_after_s"))
        answers.write(f"{status}\n")
        answers.flush()


def _wait(pid: int, kill_after_s: float | None) -> int:
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while deadline is not None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "--serve":
        serve(arguments[1])
        return 0
    return obey(json.loads(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
