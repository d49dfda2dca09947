"""Test the contract of the port `Jobs` over the fake.

`tests/integration/ray/test_cluster_jobs.py` runs it over a real cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.job_promises import PROMISES, Ground, submit_three
from tests.fakes.jobs import FakeJobs, Play


@pytest.mark.parametrize("promise", PROMISES)
def test_the_fake_keeps_its_promises(promise: Callable[[Ground], None], tmp_path: Path) -> None:
    plays = {"5": Play(exit_code=5), "endless": Play(endless=True)}
    promise(submit_three(FakeJobs(plays), tmp_path / "folder"))
