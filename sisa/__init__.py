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
from sisa.flows.lifecycle import Terms
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
