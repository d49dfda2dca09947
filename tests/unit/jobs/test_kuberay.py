"""Manifests for KubeRay: what they say, against the fields that KubeRay and Kubernetes know.

SISA_CRDS=DIRECTORY checks them against the CRDs of a release, too (`ray.io_rayjobs.yaml`,
`ray.io_rayclusters.yaml` and `ray.io_rayservices.yaml`, from `ray-operator/config/crd/bases` in
KubeRay's source).
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cli.cli import run
from cluster.jobs.kuberay import IMAGE, KINDS, Kind, manifest
from sisa.core.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads(Path(__file__).with_name("kuberay_v1.json").read_text())
CRDS = Path(os.environ.get("SISA_CRDS", "no-crds"))
CLUSTERS: tuple[Kind, ...] = ("rayjob", "raycluster", "rayservice")
VARIANTS: list[tuple[Kind, bool]] = [(kind, gpu) for kind in CLUSTERS for gpu in (False, True)]


def parsed(kind: Kind, gpu: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        manifest(kind, gpu=gpu, image="registry/sisa:1", instance_type="m7i.4xlarge")
    )
    return found


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = found["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head's pod, then those of the workers."""
    spec = cluster_of(found)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize(("kind", "gpu"), [*VARIANTS, ("volume", False)])
def test_every_manifest_fits_the_schema(kind: Kind, gpu: bool) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(parsed(kind, gpu), SCHEMA)


def strict(schema: Any) -> Any:
    """Return a CRD's schema as `kubectl --validate=strict` applies it: unknown fields are refused."""
    if not isinstance(schema, dict):
        return schema
    kept = {name: part for name, part in schema.items() if name not in ("properties", "format")}
    kept = {name: strict(part) for name, part in kept.items()}
    if "properties" in schema:
        kept["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    return kept


def served(crd: dict[str, Any], version: str) -> Any:
    (found,) = [each for each in crd["spec"]["versions"] if each["name"] == version]
    return strict(found["schema"]["openAPIV3Schema"])


@pytest.mark.skipif(not CRDS.is_dir(), reason="no CRDs of KubeRay: set SISA_CRDS to their directory")
@pytest.mark.parametrize(("kind", "gpu"), VARIANTS)
def test_every_manifest_fits_the_crds(kind: Kind, gpu: bool) -> None:
    crd = yaml.safe_load((CRDS / f"ray.io_{kind}s.yaml").read_text())
    jsonschema.validate(parsed(kind, gpu), served(crd, "v1"))


def test_every_file_is_one_of_them() -> None:
    files = {path.stem for path in (ROOT / "cluster" / "jobs" / "manifests").iterdir()}
    assert files == {*KINDS, *(f"{kind}-gpu" for kind in CLUSTERS)}


CHANGES: list[Any] = [
    lambda spec: spec.update(rayClusterSpecs={}),
    lambda spec: spec.update(backoffLimit="3"),
    lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
    lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
    lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(image="x"),
    lambda spec: pods({"spec": spec})[0]["containers"][0].pop("name"),
    lambda spec: pods({"spec": spec})[1]["containers"][0]["env"].append({"name": "A", "value": 1}),
    lambda spec: pods({"spec": spec})[1]["containers"][0]["resources"]["limits"].update(cpu="4 cores"),
    lambda spec: pods({"spec": spec})[1]["volumes"][0].update(hostPath={"path": "/"}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_schema_refuses_a_slip(change: Any) -> None:
    slipped = copy.deepcopy(parsed("rayjob"))
    change(slipped["spec"])
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(slipped)


@pytest.mark.parametrize(("kind", "gpu"), VARIANTS)
def test_what_each_cluster_needs(kind: Kind, gpu: bool) -> None:
    found = parsed(kind, gpu)
    claim = parsed("volume")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert cluster_of(found)["authOptions"] == {"mode": "token"}
    assert cluster_of(found)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for place, pod in enumerate(pods(found)):
        (container,) = pod["containers"]
        assert container["image"] == "registry/sisa:1"
        assert pod["volumes"] == [
            {"name": "shared", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        ]
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        # the driver's bits are promised: all nodes are alike, the head's too
        assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "m7i.4xlarge"}
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"].get("nvidia.com/gpu") == ("1" if gpu and place else None)
        assert not any("TOKEN" in each["name"] for each in container["env"])


@pytest.mark.parametrize("gpu", [False, True])
def test_a_job_and_a_cluster_are_the_same_but_for_the_job(gpu: bool) -> None:
    job, cluster = parsed("rayjob", gpu), parsed("raycluster", gpu)
    assert cluster_of(job) == cluster_of(cluster)
    assert job["spec"]["entrypoint"] == "sisa train /shared/run.yaml --address auto"
    assert job["spec"]["backoffLimit"] > 0  # a lost driver is followed by another


@pytest.mark.parametrize("gpu", [False, True])
def test_a_service_is_a_cluster_with_an_application_of_ours(gpu: bool) -> None:
    service, cluster = parsed("rayservice", gpu), cluster_of(parsed("raycluster", gpu))
    for place, pod in enumerate(pods(service)):
        (container,) = pod["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        container["ports"] = [each for each in container["ports"] if each["name"] != "serve"]
        if place:
            del container["ports"]
    (group,) = cluster_of(service)["workerGroupSpecs"]
    assert group.pop("minReplicas") == 1  # somebody answers
    assert cluster["workerGroupSpecs"][0].pop("minReplicas") == 0
    assert cluster_of(service) == cluster


@pytest.mark.torch
def test_ray_accepts_the_config_of_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load(parsed("rayservice")["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(document)
    assert (
        config.model_dump(exclude_unset=True, mode="json") == document
    )  # unknown keys would be dropped
    (application,) = config.applications
    assert application.args == {"model": "/shared/model"}
    module, _, name = str(application.import_path).partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_versions_are_those_of_this_project() -> None:
    oldest = cluster_of(parsed("raycluster"))["rayVersion"].removesuffix(".0")
    assert f'"ray[default,serve]>={oldest},' in (ROOT / "pyproject.toml").read_text()
    assert IMAGE.endswith(f":{importlib.metadata.version('deletion-ready-model')}")


@pytest.mark.parametrize("bad", [{"image": "a b"}, {"image": "x\n  y"}, {"instance_type": "a: b"}])
def test_what_can_not_be_filled_in(bad: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        manifest("rayjob", **bad)  # type: ignore[arg-type]


def test_the_command_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cluster", "manifest", "rayjob", "--gpu", "--image", "a/b:1"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["kind"] == "RayJob"
    assert "image: a/b:1" in text
    assert run(["cluster", "manifest", "volume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "volume"
