"""Train language models from which records can be deleted exactly.

    import sisa
    model, taken = sisa.train_model("run.yaml")
    model.where(["p001-q1"])
    model.forget(["p001-q1"])
    assert model.verify(replay="all").ok

This is the whole public API; everything else may change. A name is imported when it is first asked for,
so that `import sisa` takes no time. `cluster` holds the command line, `approx` approximate unlearning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sisa.config.config import RunConfig
    from sisa.config.runfile import load_run_file
    from sisa.core.domain import Part, Record
    from sisa.core.errors import (
        Busy,
        ConfigConflict,
        EnvironmentFault,
        IntegrityError,
        InvalidInput,
        RejectedRequest,
        SisaError,
        TransientError,
        UnknownRecord,
    )
    from sisa.flows.ask import Answer
    from sisa.flows.deletion import Terms
    from sisa.flows.wiring.results import ForgetOutcome, ForgetPlan, Status
    from sisa.flows.wiring.wiring import OnCluster
    from sisa.model import Model, open_model
    from sisa.train import train_model

__all__ = [
    "Answer",
    "Busy",
    "ConfigConflict",
    "EnvironmentFault",
    "ForgetOutcome",
    "ForgetPlan",
    "IntegrityError",
    "InvalidInput",
    "Model",
    "OnCluster",
    "Part",
    "Record",
    "RejectedRequest",
    "RunConfig",
    "SisaError",
    "Status",
    "Terms",
    "TransientError",
    "UnknownRecord",
    "load_run_file",
    "open_model",
    "train_model",
]

_HOMES = {
    "sisa.config.config": ("RunConfig",),
    "sisa.config.runfile": ("load_run_file",),
    "sisa.core.domain": ("Part", "Record"),
    "sisa.core.errors": (
        "Busy",
        "ConfigConflict",
        "EnvironmentFault",
        "IntegrityError",
        "InvalidInput",
        "RejectedRequest",
        "SisaError",
        "TransientError",
        "UnknownRecord",
    ),
    "sisa.flows.ask": ("Answer",),
    "sisa.flows.deletion": ("Terms",),
    "sisa.flows.wiring.wiring": ("OnCluster",),
    "sisa.flows.wiring.results": ("ForgetOutcome", "ForgetPlan", "Status"),
    "sisa.model": ("Model", "open_model"),
    "sisa.train": ("train_model",),
}

if not TYPE_CHECKING:  # a type checker sees the names themselves

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                globals()[name] = found = getattr(import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
