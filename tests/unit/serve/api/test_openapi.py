"""The service keeps what its OpenAPI document promises, whatever it is sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.routing import compile_path

from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import LOCAL
from sisa.config.config import ServiceBlock
from sisa.model import open_model
from tests.examples import num_examples
from tests.fakes.answers import FakeAnswers
from tests.fakes.tokens import KnownTokens
from tests.models.confessing import use_fake_resources

NUM_CALLS = num_examples(1_200)
BEYOND: list[Any] = [positive_data_acceptance]  # a schema does not say that a due date has not passed
HEADERS = {"Authorization": "Bearer known"}


@pytest.fixture(scope="module")
def app(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """Return the application over one copy of a model: its state is whatever was called before."""
    with pytest.MonkeyPatch.context() as patch:
        use_fake_resources(patch)
        directory = Path(shutil.copytree(trained, tmp_path_factory.mktemp("served") / "model"))
        block = ServiceBlock(host="testserver")
        return build_app(Service(open_model(directory), FakeAnswers(), KnownTokens(known=LOCAL), block))


@pytest.fixture(scope="module")
def document(app: FastAPI) -> BaseSchema:
    refused = [400, 401, 403, 404, 409, 413, 422, 429]  # a body may be too large, too
    rule = {"checks": {"negative_data_rejection": {"expected-statuses": refused}}}
    config = schemathesis.Config.from_dict(rule)
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda each: each.name.lower())
def test_the_service_keeps_its_document(
    document: BaseSchema, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer has a documented status, type and schema; none is a fault of the server."""
    use_fake_resources(monkeypatch)
    operations: list[Any] = [each.ok() for each in document.get_all_operations()]  # type: ignore[union-attr]
    calls = st.one_of([each.as_strategy(generation_mode=mode) for each in operations])

    @settings(
        max_examples=NUM_CALLS // 2,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls)
    def check(case: Any) -> None:
        case.call_and_validate(headers=HEADERS, excluded_checks=BEYOND)

    check()


def test_no_endpoint_is_shadowed_by_one_before_it(app: FastAPI) -> None:
    """Of `/requests/{id}` and `/requests/due`, the first that was added gets what both match."""
    added: list[tuple[str, set[str]]] = []
    for route in iter_route_contexts(app.routes):
        path, methods = str(route.path), route.methods or {"GET"}
        for earlier, others in added:
            assert not (methods & others and compile_path(earlier)[0].match(path)), (earlier, path)
        added.append((path, methods))
    assert "/console/{name}" in dict(added)  # those that the document leaves out, too


def test_every_operation_is_described(document: BaseSchema) -> None:
    for path, operations in document.raw_schema["paths"].items():
        for operation in operations.values():
            assert operation.get("summary"), path
            assert operation.get("description") or operation["summary"], path
            assert set(operation["responses"]) - {"422"}, path
