"""Train as a job on a remote cluster: `sisa cluster submit`, `status`, `logs`, `stop` and `manifest`."""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import command, command_group, run_file_argument
from cluster.jobs.jobs import Job, check_name
from cluster.jobs.kuberay import IMAGE, INSTANCE_TYPE, KINDS, manifest
from cluster.render.result import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, Result, printable

if TYPE_CHECKING:
    from cluster.jobs.jobs import Jobs

group = command_group("cluster", "Train as a job on a remote Ray cluster.")
address_option = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    metavar="URL",
    help="The cluster's dashboard, such as http://127.0.0.1:8265, or set RAY_API_SERVER_ADDRESS.",
)


@command("submit", "run.yaml --address http://127.0.0.1:8265", group=group)
@run_file_argument
@address_option
@click.option("--job", "name", metavar="NAME", help="Name of the job, new to the cluster.")
@click.option("--detach", is_flag=True, help="Do not follow the job.")
@click.option("--reconfigure", is_flag=True, help="As `sisa train --reconfigure`.")
@click.option("--allow-deleted", is_flag=True, help="As `sisa train --allow-deleted`.")
def submit_job(
    run_file: Path, address: str, name: str | None, detach: bool, reconfigure: bool, allow_deleted: bool
) -> Result:
    """Submit a training to the cluster.

    If a job is lost, submit it again: it continues from what is stored.
    """
    from cluster.jobs.job_flow import submit_training

    given = {"--reconfigure": reconfigure, "--allow-deleted": allow_deleted}
    fresh = f"sisa-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"  # accepted only once
    name = check_name(name) if name else fresh
    jobs = _open_jobs(address)
    job = submit_training(jobs, run_file, name, [flag for flag, wanted in given.items() if wanted])
    submitted = f"job {name} submitted"
    if detach:
        return Result(described(job) | {"detached": True}, [submitted, _how_to_follow(name, address)])
    print(submitted, file=sys.stderr, flush=True)
    return _followed(jobs, name, address)


@command("status", "--address http://127.0.0.1:8265", group=group)
@click.argument("job", required=False)
@address_option
def job_status(job: str | None, address: str) -> Result:
    """Show a job, or all jobs that this program submitted."""
    jobs = _open_jobs(address)
    if job is not None:
        found = jobs.get(check_name(job))
        return Result(described(found), [line(found)])
    ours = [each for each in jobs.all() if each.model is not None]
    lines = [line(each) for each in ours] or ["no job was submitted to this cluster"]
    return Result({"jobs": [described(each) for each in ours]}, lines)


@command("logs", "sisa-20260102-030405-9f --follow --address http://127.0.0.1:8265", group=group)
@click.argument("job")
@address_option
@click.option("-f", "--follow", "to_the_end", is_flag=True, help="Follow the log until the job ends.")
def logs(job: str, address: str, to_the_end: bool) -> Result:
    """Print a job's log. --follow ends with the job's exit code."""
    jobs = _open_jobs(address)
    if to_the_end:
        return _followed(jobs, check_name(job), address)
    log = printable(jobs.log(check_name(job)))
    return Result({"job": job, "log": log}, [log.rstrip("\n")])


@command("stop", "sisa-20260102-030405-9f --address http://127.0.0.1:8265", group=group)
@click.argument("job")
@address_option
def stop_job(job: str, address: str) -> Result:
    """Stop a job. The next job continues from what it stored."""
    from cluster.jobs.job_flow import stop as end

    found, was_running = end(_open_jobs(address), check_name(job))
    return Result(described(found) | {"was_running": was_running}, [line(found)])


@command("manifest", "rayjob --image registry/sisa:1", group=group)
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--gpu", is_flag=True, help="Give each worker a GPU.")
@click.option("--image", default=IMAGE, help="Image that holds this program.")
@click.option("--instance-type", default=INSTANCE_TYPE, help="Instance type of all nodes.")
def print_manifest(kind: Any, gpu: bool, image: str, instance_type: str) -> Result:
    """Print a manifest for KubeRay, the volume that its pods share, or a Grafana dashboard."""
    text = manifest(kind, gpu=gpu, image=image, instance_type=instance_type)
    return Result({"kind": kind, "gpu": gpu, "manifest": text}, [text.rstrip("\n")])


def _open_jobs(address: str) -> Jobs:
    from cluster.jobs.ray_jobs import RayJobs

    return RayJobs(address)


def _followed(jobs: Jobs, job: str, address: str) -> Result:
    from cluster.jobs.job_flow import follow

    try:
        found = follow(jobs, job, _show)
    except KeyboardInterrupt:
        lines = [f"detached from job {job}, which continues", _how_to_follow(job, address)]
        return Result({"job": job, "detached": True}, lines, EXIT_INTERRUPTED)
    return Result(described(found), [line(found)], exit_code(found))


def _show(piece: str) -> None:
    print(printable(piece), end="", file=sys.stderr, flush=True)


def _how_to_follow(job: str, address: str) -> str:
    return f"follow it: sisa cluster logs {job} --follow --address {address}"


def exit_code(job: Job) -> int:
    """Return the exit code of following a job that has ended."""
    if job.state == "STOPPED":
        return EXIT_INTERRUPTED
    if job.exit_code is None or job.exit_code < 0:
        return 0 if job.state == "SUCCEEDED" else EXIT_ENVIRONMENT
    return job.exit_code


def described(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "state": job.state,
        "exit_code": job.exit_code,
        "fault": job.fault,
        "started_at": _moment(job.started_s),
        "ended_at": _moment(job.ended_s),
    }


def line(job: Job) -> str:
    """Return a job in one line that says how to continue a lost one.

    >>> line(Job("sisa-a", "FAILED", exit_code=-9))
    'job sisa-a FAILED, ended by signal 9: submit the run file again to continue'
    """
    started = _moment(job.started_s)
    facts = [f"job {job.id} {job.state}", *([f"started {started}"] if started else [])]
    if job.exit_code:
        code = job.exit_code
        facts.append(f"exit code {code}" if code > 0 else f"ended by signal {-code}")
    elif job.state == "FAILED":
        facts.append(f"ended by the cluster ({job.fault or 'no reason given'})")
    lost = job.ended and exit_code(job) in (EXIT_ENVIRONMENT, EXIT_INTERRUPTED)
    return ", ".join(facts) + (": submit the run file again to continue" if lost else "")


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
