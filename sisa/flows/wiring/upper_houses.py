"""Find what `cluster` and `approx` offer by its dotted name, since `sisa` imports neither.

Other packages and a user's own modules may have these names, so a name is loaded only after
`check_upper_houses` has found both packages beside `sisa`.

>>> sorted(EXECUTORS), sorted(PATCHERS), sorted(BASE_TRAINERS)
(['ray'], ['ray', 'serial'], ['auto', 'ray'])
>>> check_upper_houses()
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sisa.core.errors import EnvironmentFault

COMMAND = "cluster.cli.cli:main"
PROBE = "approx.evaluation.probe:open_probe"
EXECUTORS = MappingProxyType({"ray": "cluster.ray.executor:open_executor"})
PATCHERS = MappingProxyType(
    {"serial": "approx.patches.patch_maker:open_patcher", "ray": "cluster.ray.patch_tasks:RayPatcher"}
)
BASE_TRAINERS = MappingProxyType(
    dict.fromkeys(("auto", "ray"), "cluster.ray.scratch_tasks:train_on_ray")
)
EVIDENCE_HOOK = "sisa.evidence.hook:EvidenceHook"  # a room of `sisa` above the flows

# Files of `cluster.serve` in a model's directory.
SERVICE = "service.json"  # where it runs, while it does
TOKENS = "tokens.json"  # who may call it
SERVICE_STATE = "service.sqlite"  # what it must not forget

ROOT = Path(__file__).parents[3]  # the folder that holds `sisa`, `approx` and `cluster`
UPPER_HOUSES = ("approx", "cluster")
MARK = b"deletion-ready-model"  # a string in the `__init__.py` of both


def load(name: str) -> Any:
    """Return the object `package.module:attribute`. Raise EnvironmentFault if a package hides ours."""
    check_upper_houses()
    return pkgutil.resolve_name(name)


def check_upper_houses(search: Sequence[str] | None = None) -> None:
    """Raise EnvironmentFault if Python finds another `approx` or `cluster` than the one beside `sisa`.

    Nothing is imported. With `search`, check the folders of another process's search path; there it is
    no fault if neither is found.
    """
    for name in UPPER_HOUSES:
        spec = find_spec(name) if search is None else PathFinder.find_spec(name, search)
        if search is not None and (spec is None or spec.loader is None):
            continue
        ours = ROOT / name / "__init__.py"
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None:
            got, step = "none", "install it again: pip install --force-reinstall deletion-ready-model"
        elif found.resolve() != ours.resolve():
            got, step = str(found), "rename it, or run where neither folder nor PYTHONPATH has it"
        elif MARK not in ours.read_bytes():
            got = "the file of another distribution"
            step = f"pip uninstall {name}, then install this program again"
        else:
            continue
        raise EnvironmentFault(
            f"another package hides `{name}`, a part of this program",
            where=str(found or ours),
            expected=f"this program's package {ours.parent}",
            got=got,
            next_step=step,
        )
