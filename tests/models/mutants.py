"""Mutate evidence as a forger or a bad disk would: bits, bytes, lines, and replays of other files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence


def mutants(data: bytes, num: int, *, seed: int, replays: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Yield the replays, then as many changed copies of `data` as are missing to `num`."""
    rnd = random.Random(seed)
    others = [each for each in replays if each != data]
    yield from others
    left = num - len(others)
    while left:
        made = rnd.choice(CHANGES)(rnd, data)
        if made != data:
            left -= 1
            yield made


def _flip(rnd: random.Random, data: bytes) -> bytes:
    at = rnd.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rnd.randrange(8)]) + data[at + 1 :]


def _cut(rnd: random.Random, data: bytes) -> bytes:
    return data[: rnd.randrange(len(data))]


def _insert(rnd: random.Random, data: bytes) -> bytes:
    at = rnd.randrange(len(data) + 1)
    return data[:at] + rnd.randbytes(rnd.randint(1, 40)) + data[at:]


def _remove(rnd: random.Random, data: bytes) -> bytes:
    at = rnd.randrange(len(data))
    return data[:at] + data[at + rnd.choice([1, 1, 4, 32, 64]) :]


def _swap(rnd: random.Random, data: bytes) -> bytes:
    width = min(rnd.choice([1, 8, 32]), len(data) // 4)
    one, other = sorted(rnd.sample(range(len(data) - width), 2))
    if other - one < width:
        return data
    middle = data[one + width : other]
    return (
        data[:one]
        + data[other : other + width]
        + middle
        + data[one : one + width]
        + data[other + width :]
    )


def _double(rnd: random.Random, data: bytes) -> bytes:
    at = rnd.randrange(len(data))
    part = data[at : at + rnd.choice([1, 32, 64])]
    return data[:at] + part + data[at:]


def _change_line(rnd: random.Random, data: bytes) -> bytes:
    """Drop, double or move a line, or put another in its place."""
    lines = data.split(b"\n")
    at, to = rnd.randrange(len(lines)), rnd.randrange(len(lines))
    match rnd.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines.insert(to, lines.pop(at))
        case _:
            lines[at] = lines[to]
    return b"\n".join(lines)


CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip, _flip, _cut, _insert, _remove, _swap, _double, _change_line, _change_line),
)
