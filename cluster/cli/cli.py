"""Run the console command `sisa`: carry out a command line, and exit with a code that means something.

Importing a family adds its commands to `cli`. README.md lists the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Sequence

import click

from cluster.cli import (  # noqa: F401
    asking,
    jobs,
    maintenance,
    patches,
    plan,
    requests,
    rights,
    serve,
    training,
)
from cluster.cli.command import cli
from cluster.cli.evaluation import attacks, benchmarks, tofu  # noqa: F401
from cluster.cli.evidence import audits, certificates, keys, log, proofs, revocations  # noqa: F401
from cluster.observe.reporting import log_format_of, open_log
from cluster.render.result import EXIT_INTERRUPTED, EXIT_USAGE, printable
from sisa.core.errors import (
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    Problem,
    SisaError,
    internal_fault,
)
from sisa.core.run import new_run, running

__all__ = ["cli"]
EXIT_SIGNAL = 128  # plus the signal's number


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line, print its result or failure, and return its exit code."""
    with running(new_run(log_format_of(arguments))):
        return _carry_out(arguments, as_json="--json" in arguments)


def _carry_out(arguments: Sequence[str], *, as_json: bool) -> int:
    try:
        _refuse_bad_encoding(arguments)
        done = cli.main(args=list(arguments), prog_name="sisa", standalone_mode=False)
        if isinstance(done, int):  # --help and --version
            return done
        # Print outside click, which would end the process on a closed pipe.
        code, text = done
        print(text, flush=True)
        return int(code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        next_step = f"`{context.command_path} --help` shows options and an example" if context else ""
        return _fail(InvalidInput(error.format_message(), next_step=next_step), as_json, "UsageError")
    except SisaError as error:
        return _fail(error, as_json)
    except (KeyboardInterrupt, click.Abort):
        how, code = "interrupted", EXIT_INTERRUPTED
        if _ended_by:
            how, code = f"ended by {_ended_by[-1].name}", EXIT_SIGNAL + _ended_by[-1]
        fault = SisaError(f"{how}; run the same command again to continue")
        return _fail(fault, as_json, "Interrupted", code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        why = error.strerror or type(error).__name__
        return _fail(EnvironmentFault(f"the operating system refused: {why}"), as_json)
    except Exception as error:
        if (refusal := _refusal(error)) is not None:
            return _fail(refusal, as_json)
        return _fail(internal_fault(error), as_json, "InternalFault")


def _refusal(error: Exception) -> SisaError | None:
    """Return the verifier's `Refused` as an IntegrityError; None for other errors."""
    verifier = sys.modules.get("sisa.verifier.envelope")  # light commands do not load it
    if verifier is None or not isinstance(error, verifier.Refused):
        return None
    facts = {name: getattr(error, name) for name in ("where", "expected", "got", "next_step")}
    return IntegrityError(error.what, **facts)


def _refuse_bad_encoding(arguments: Sequence[str]) -> None:
    bad = [
        n for n, each in enumerate(arguments, start=1) if any("\ud800" <= c <= "\udfff" for c in each)
    ]
    if bad:
        problems = [Problem(f"argument {n}", "bytes that are not UTF-8") for n in bad]
        raise InvalidInput("the command line is not valid UTF-8", problems=problems)


def _fail(error: SisaError, as_json: bool, kind: str = "", code: int | None = None) -> int:
    kind, code = kind or type(error).__name__, error.exit_code if code is None else code
    if as_json:
        click.echo(json.dumps({"error": error.to_json() | {"type": kind}}, indent=2))
    json_log = open_log()
    if json_log is None:
        click.echo(f"error: {printable(str(error))}", err=True)
    else:
        # A usage error may quote an id from the command line: log its type alone.
        message = "" if kind == "UsageError" else printable(error.what)
        json_log.write("run_failed", "error", error=kind, exit_code=code, message=message)
    return code


# The signals that ended this process: click and Ray replace our KeyboardInterrupt by their own.
_ended_by: list[signal.Signals] = []


def _end(number: int, _frame: object) -> None:
    """Interrupt the program as Ctrl-C does; write nothing more to a terminal that was closed."""
    if number == signal.SIGHUP:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    _ended_by.append(signal.Signals(number))
    raise KeyboardInterrupt


def main() -> None:
    """Run the console script. SIGTERM or a closed terminal ends it as Ctrl-C does."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(each, _end)
    sys.exit(run(sys.argv[1:]))
