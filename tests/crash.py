"""Crash a process of the tests at one of its effects, as a power cut would.

    with crashing((fake.ledger, "commit"), after=True):
        forget(fake)                       # the block ends where the process dies

    for fuse in fuses(more_than=3):        # at each effect in turn
        with fuse.on((fake.ledger, "commit"), (files, "erase")):
            forget(fake)
        reconcile(fake)                    # as the next command does

Who lists the effects of all ports is `property/histories.py`. Real processes die in `endurance/`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest


class Crash(BaseException):
    """A process that dies: nothing may catch it."""


def crash(*_: object, **__: object) -> NoReturn:
    """Die in place of an effect or a call-back, whatever it is given."""
    raise Crash


class Fuse:
    """Count effects, and die at the chosen one (from 1), before or after it happened."""

    def __init__(self, at: int, after: bool = False) -> None:
        self.left = at
        self.after = after
        self.blown = False

    def guard(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.blown:
                self.blown = True
                if self.after:
                    effect(*args, **options)
                raise Crash
            return effect(*args, **options)

        return guarded

    @contextlib.contextmanager
    def on(self, *effects: tuple[object, str]) -> Iterator[None]:
        """Guard effects, each an owner's method, during a block; end the block where it dies."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in effects:
                patch.setattr(owner, name, self.guard(getattr(owner, name)))
            with contextlib.suppress(Crash):
                yield


@contextlib.contextmanager
def crashing(*effects: tuple[object, str], at: int = 1, after: bool = False) -> Iterator[None]:
    """Die within a block at the chosen one of these effects; fail if the block outlives them."""
    fuse = Fuse(at, after)
    with fuse.on(*effects):
        yield
    assert fuse.blown, "nothing died"


def fuses(*, after: bool = False, more_than: int) -> Iterator[Fuse]:
    """Yield a fuse for each effect in turn, until one is left whole by all of them.

    There must be `more_than` so many effects, else something was not guarded.
    """
    for at in itertools.count(1):
        fuse = Fuse(at, after)
        yield fuse
        if not fuse.blown:
            assert at > more_than
            return
