"""Device and dtype: invalid values, their names, and a worker's environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sisa.config.config import TRAINING_KEYS, RunConfig
from sisa.config.runfile import parse_run_file
from sisa.config.sources import DatasetSource
from sisa.core.domain import DEFAULT_PRECISION, Precision, SliceState
from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.lm.base import cuda_device
from sisa.lm.base.numerics import describe_fingerprint, fingerprint, worker_environment
from sisa.planning.plan import jobs

MINIMAL = "datasets: [{path: owner/people}]\noutput_dir: model\n"
CUDA, HALF = Precision("cuda"), Precision("cpu", "bfloat16")
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ("device: tpu", "line 3: device", "'cpu', 'cuda'"),
        ("dtype: float16", "line 3: dtype", "'float32', 'bfloat16'"),
        ("cluster: {num_gpus: 1}", "line 1", "device is cpu"),
        ("device: cpu\ncluster: {num_gpus: 0.5}", "line 1", "device is cpu"),
        ("device: cuda\ncluster: {num_gpus: 0}", "line 4: cluster.num_gpus", "from 0.001 to 64"),
        ("device: cuda\ncluster: {num_gpus: -1}", "line 4: cluster.num_gpus", "from 0.001 to 64"),
        ("device: cuda\ncluster: {num_gpus: 1.5}", "line 4: cluster.num_gpus", "whole GPUs"),
        ("device: cuda\ncluster: {num_gpus: '1'}", "line 4: cluster.num_gpus", "a number"),
    ],
)
def test_what_no_worker_could_be_given_is_refused(lines: str, where: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_run_file(f"{MINIMAL}{lines}\n", "run.yaml")
    (problem,) = caught.value.problems
    assert problem.where == where
    assert message in problem.what


@pytest.mark.parametrize("share", ["0.25", "1", "2.0", "null"])
def test_shares_and_whole_gpus_are_taken(share: str) -> None:
    config = parse_run_file(f"{MINIMAL}device: cuda\ncluster: {{num_gpus: {share}}}\n", "run.yaml")
    assert config.precision == CUDA
    assert config.cluster.num_gpus == (None if share == "null" else float(share))


def config_with(**changed: str) -> RunConfig:
    datasets = (DatasetSource(path="owner/people"),)
    return RunConfig.model_validate({"datasets": datasets, "output_dir": Path("model"), **changed})


def test_another_device_or_dtype_is_another_job_and_defaults_are_in_none() -> None:
    assert set(config_with().training()) == set(TRAINING_KEYS)
    slices = [SliceState(0, 0, "root", 3)]
    keys = [
        jobs(0, slices, config_with(**changed).recipe("base"), "fingerprint")[0].key
        for changed in ({}, {"device": "cuda"}, {"dtype": "bfloat16"})
    ]
    assert len(set(keys)) == 3


def test_a_job_says_for_which_it_is() -> None:
    for each in (DEFAULT_PRECISION, CUDA, HALF):
        training = {"lora_r": 8, **each.in_jobs()}
        assert Precision.of(training) == each


def test_a_dtype_is_part_of_the_fingerprint() -> None:
    assert fingerprint(1) == fingerprint(1, DEFAULT_PRECISION) != fingerprint(1, HALF)
    assert describe_fingerprint(1, HALF) == {**describe_fingerprint(1), "dtype": "bfloat16"}


def test_a_workers_environment_fixes_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_device.WORKSPACE, raising=False)
    assert cuda_device.WORKSPACE not in worker_environment(1)
    variables = worker_environment(2, CUDA)
    assert (variables[cuda_device.WORKSPACE], variables["OMP_NUM_THREADS"]) == (":4096:8", "2")
    monkeypatch.setenv(cuda_device.WORKSPACE, ":16:8")
    assert worker_environment(1, CUDA)[cuda_device.WORKSPACE] == ":16:8"


def test_a_process_takes_the_workspace_and_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_device.WORKSPACE, "before")
    for held, after in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.delenv(cuda_device.WORKSPACE)
        if held:
            monkeypatch.setenv(cuda_device.WORKSPACE, held)
        cuda_device.prepare_device()
        assert cuda_device.cuda_environment()[cuda_device.WORKSPACE] == after
    monkeypatch.setenv(cuda_device.WORKSPACE, ":0:0")
    with pytest.raises(EnvironmentFault, match="bit for bit"):
        cuda_device.prepare_device()


@pytest.mark.parametrize(("text", "version"), [(DRIVER, "550.54.15"), (OPEN, "570.86.10"), ("", None)])
def test_the_drivers_version_is_read(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert cuda_device.driver_version(tmp_path / "version") == version
    assert cuda_device.driver_version(tmp_path / "none") is None


def test_the_usual_fingerprint_needs_no_torch() -> None:
    code = (
        "import sys; from sisa.lm.base.numerics import fingerprint; "
        "from sisa.core.domain import Precision; fingerprint(1, Precision('cpu', 'bfloat16')); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
