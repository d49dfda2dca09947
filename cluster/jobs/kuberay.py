"""Read the manifests in `manifests/`: RayJob, RayCluster, RayService, their volume, Grafana's dashboard.

A manifest is printed as written, with the image and the instance type of the nodes filled in. Nothing is
applied, and no manifest contains a secret: KubeRay makes the tokens (`authOptions`).

>>> manifest("volume").splitlines()[-1]
'      storage: 100Gi'
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Literal

from sisa.core.errors import InvalidInput, Problem

Kind = Literal["rayjob", "raycluster", "rayservice", "volume", "grafana"]
KINDS: tuple[Kind, ...] = ("rayjob", "raycluster", "rayservice", "volume", "grafana")
FILES = {"volume": "volume.yaml", "grafana": "grafana.json"}  # alike with and without a GPU
IMAGE = "deletion-ready-model:0.1.0"
INSTANCE_TYPE = "INSTANCE-TYPE"  # a placeholder: no instance type exists on every cluster
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def manifest(
    kind: Kind, *, gpu: bool = False, image: str = IMAGE, instance_type: str = INSTANCE_TYPE
) -> str:
    """Return the text of a manifest. Raise InvalidInput if the image or the instance type is invalid."""
    problems = []
    if not _IMAGE.fullmatch(image):
        problems.append(Problem("--image", "expected the name of an image: REGISTRY/NAME:TAG"))
    if not _LABEL.fullmatch(instance_type):
        problems.append(Problem("--instance-type", "expected the value of a node's label"))
    if problems:
        raise InvalidInput(
            "the manifest can't be filled in", problems=problems, next_step="correct them"
        )
    name = FILES.get(kind, f"{kind}-gpu.yaml" if gpu else f"{kind}.yaml")
    text = files("cluster.jobs").joinpath("manifests", name).read_text(encoding="utf-8")
    return text.replace(IMAGE, image).replace(INSTANCE_TYPE, instance_type)
