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
    from sisa.flows.answers.ask import Answer
    from sisa.flows.deletion import ForgetOutcome, ForgetPlan
    from sisa.flows.requests import Terms
    from sisa.flows.status import Status
    from sisa.flows.wiring.executors import OnCluster
    from sisa.model import Model, open_model
    from sisa.train import train_model

__all__ = ["Model", "OnCluster", "RunConfig", "Terms", "load_run_file", "open_model", "train_model"]
__all__ += ["Answer", "ForgetOutcome", "ForgetPlan", "Part", "Record", "Status"]
__all__ += ["Busy", "ConfigConflict", "EnvironmentFault", "IntegrityError", "InvalidInput"]
__all__ += ["RejectedRequest", "SisaError", "TransientError", "UnknownRecord"]

_HOMES = (  # of these names, in the order in which modules import each other
    *("sisa.core.domain", "sisa.core.errors", "sisa.config.config", "sisa.config.runfile"),
    *("sisa.flows.answers.ask", "sisa.flows.deletion", "sisa.flows.requests", "sisa.flows.status"),
    *("sisa.flows.wiring.executors", "sisa.model", "sisa.train"),
)

if not TYPE_CHECKING:  # a type checker sees the names themselves

    def __getattr__(name: str) -> Any:
        for module in map(import_module, _HOMES if name in __all__ else ()):
            if hasattr(module, name):
                globals()[name] = found = getattr(module, name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
