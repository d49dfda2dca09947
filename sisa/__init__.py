"""Train language models from which records can be deleted exactly.

    import sisa
    model, taken = sisa.train_model("run.yaml")
    model.where(["p001-q1"])
    model.forget(["p001-q1"])
    assert model.verify(replay="all").ok

Rules: this is the whole public API; everything else may change. Heavy libraries are imported by the
calls that need them.

Not covered: the command line (`cluster`), approximate unlearning (`approx`).
"""

from sisa.api import Model, open_model
from sisa.ask import Answer
from sisa.config import RunConfig
from sisa.domain import Part, Record
from sisa.errors import (
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
from sisa.lifecycle import Terms
from sisa.opening import OnCluster
from sisa.outcome import ForgetOutcome, ForgetPlan, Status
from sisa.runfile import load_run_file
from sisa.training import train_model

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
