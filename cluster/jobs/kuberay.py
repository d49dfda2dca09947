"""Read the manifests for KubeRay in `manifests/`: RayJob, RayCluster, and the volume that both share.

A manifest is printed as it is written, with the image and the instance type of its nodes put in;
nothing is applied, and no secret is in it. Tokens are KubeRay's to make (`authOptions`).

>>> manifest("volume").splitlines()[-1]
'      storage: 100Gi'
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Literal

from sisa.core.errors import InvalidInput, Problem

Kind = Literal["rayjob", "raycluster", "volume"]
KINDS: tuple[Kind, ...] = ("rayjob", "raycluster", "volume")
IMAGE = "deletion-ready-model:0.1.0"
INSTANCE_TYPE = "INSTANCE-TYPE"  # to be chosen: there is none that every cluster has
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def manifest(
    kind: Kind, *, gpu: bool = False, image: str = IMAGE, instance_type: str = INSTANCE_TYPE
) -> str:
    """Return the text of a manifest. Raises InvalidInput for what can't be a name of its kind."""
    problems = []
    if not _IMAGE.fullmatch(image):
        problems.append(Problem("--image", "expected the name of an image: REGISTRY/NAME:TAG"))
    if not _LABEL.fullmatch(instance_type):
        problems.append(Problem("--instance-type", "expected the value of a node's label"))
    if problems:
        raise InvalidInput("the manifest can't be filled in", problems=problems, next_step="mend them")
    name = f"{kind}-gpu.yaml" if gpu and kind != "volume" else f"{kind}.yaml"
    text = files("cluster.jobs").joinpath("manifests", name).read_text(encoding="utf-8")
    return text.replace(IMAGE, image).replace(INSTANCE_TYPE, instance_type)
