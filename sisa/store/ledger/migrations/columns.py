"""Define the columns of revisions, in the types of either database.

>>> position("shard").primary_key, text("kind").nullable
(True, False)
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


def text(name: str, **options: Any) -> sa.Column[Any]:
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, **{"nullable": False, **options})


def key_text(name: str, **options: Any) -> sa.Column[Any]:
    return text(name, primary_key=True, **options)


def number(name: str, **options: Any) -> sa.Column[Any]:
    kind = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
    return sa.Column(name, kind, **{"nullable": False, "autoincrement": False, **options})


def position(name: str) -> sa.Column[Any]:
    return number(name, primary_key=True)
