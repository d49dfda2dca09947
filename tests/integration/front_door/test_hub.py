"""Names on a model hub: the real client libraries fetch models, records and benchmarks over HTTP.

The hub is a server in this process that speaks the part of the hub's protocol that these clients use.
`HF_ENDPOINT` names it, as it would name a company's mirror. Clients read that variable once, so commands
run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from approx.benchmarks.stereotypes import BIASES
from sisa.core.digest import sha256_hex
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.data.samples import make_people
from tests.fakes.benchmarks import MADE_UP, made_up, write_made_up
from tests.models.tiny_base import make_tiny_embedder
from tests.models.tiny_model import write_rows

pytestmark = pytest.mark.torch

CONVERTED = "refs/convert/parquet"  # the revision in which the hub keeps its conversions
PEOPLE = make_people(4, 2)
SETS = {**MADE_UP, "tofu": made_up}
ON_THE_HUB = {  # the names that RWKU's own repository gives to these sets
    **{"forget_mia": "mia_forget", "retain_mia": "mia_retain", "utility_mmlu": "utility_general"},
    **{"utility_retain_bbh": "utility_reason", "utility_truthful": "utility_truthfulness"},
    "utility_triviaqa": "utility_factuality",
}
SPLITS = {"rwku": "test", "wmdp": "test", "stereotypes": "test"}  # the others have `train`
UNFIT = ("absent", "closed", "code")
READ_BENCHMARKS = """
import json, sys
from approx.benchmarks import muse, rwku, stereotypes, tofu, whp, wmdp
from sisa.core.errors import InvalidInput
from sisa.lm.base.weights import resolve_base

made = (muse.MUSE, rwku.RWKU, stereotypes.STEREOTYPES, whp.WHP, wmdp.WMDP)
read = {each.name: each.read for each in made}
read["tofu"] = lambda place: tofu.evaluation_sets(place, "forget01")
found = {}
for name, questions_of in read.items():
    questions = questions_of(f"{sys.argv[1]}/{name}")
    found[name] = len(questions), questions == questions_of(f"public/{name}")
pairs = stereotypes.stereotype_pairs
questions = pairs("public/scripted")
found["scripted"] = len(questions), questions == pairs("public/stereotypes")
for name in sys.argv[2:]:
    for ask in (pairs, resolve_base):
        try:
            ask(f"public/{name}")
        except InvalidInput as error:
            found[f"{name}, {ask.__name__}"] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Serve directories `models/OWNER/NAME` and `datasets/OWNER/NAME` of `root` as repositories.

    Each has one revision, and may have a second one beside it, NAME.converted.
    """

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        parts = [unquote(each) for each in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            del parts[0]
        elif parts[0] != "datasets":
            parts.insert(0, "models")
        folder = self.root.joinpath(*parts[:3])
        what, revision, *path = parts[3:] or ["revision", "main"]
        if revision in (CONVERTED, commit_of(converted(folder))):
            folder = converted(folder)
        if (folder / "gated").exists():
            self.refuse("GatedRepo", 403)
        elif not folder.is_dir():
            self.refuse("RevisionNotFound" if revision == CONVERTED else "RepoNotFound")
        elif what == "revision":
            self.answer({"id": "/".join(parts[1:3]), "sha": commit_of(folder), "siblings": []})
        elif what == "tree":
            self.list_files(folder, folder.joinpath(*path))
        elif (file := folder.joinpath(*path)).is_file():
            content = file.read_bytes()
            about = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{sha256_hex(content)}"'}
            self.answer(content, about)
        else:
            self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def list_files(self, folder: Path, within: Path) -> None:
        """Answer what a folder of a repository holds."""
        recursive = "recursive=true" in self.path
        entries = []
        for path in sorted(within.rglob("*") if recursive else within.glob("*")):
            content = path.read_bytes() if path.is_file() else b""
            kind = "file" if path.is_file() else "directory"
            where, name = str(path.relative_to(folder)), sha256_hex(content)
            entries.append({"type": kind, "path": where, "size": len(content), "oid": name})
        self.answer(entries) if entries else self.refuse("EntryNotFound")

    def refuse(self, error: str, status: int = 404) -> None:
        self.answer({}, {"X-Error-Code": error}, status)

    def answer(self, body: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


def converted(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.converted")


def commit_of(folder: Path) -> str:
    return sha256_hex(folder.name.encode())[:40]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Return a directory of repositories: a base, an embedder, records, benchmarks, and unfit ones."""
    root = tmp_path_factory.mktemp("hub")
    (models := root / "models" / "public").mkdir(parents=True)
    (models / "base").symlink_to(tiny_base)
    make_tiny_embedder(models / "embedder")
    data = root / "datasets" / "public"
    for folder in (data / "people", data / "closed", data / "code", models / "closed"):
        folder.mkdir(parents=True)
    write_rows(data / "people" / "train.jsonl", PEOPLE)
    (data / "closed" / "gated").touch()
    (models / "closed" / "gated").touch()
    (data / "code" / "code.py").touch()
    (data / "scripted").mkdir()
    (data / "scripted" / "scripted.py").touch()
    test = converted(data / "scripted") / "crows_pairs" / "test"
    test.mkdir(parents=True)
    rows = [
        {**row, "bias_type": BIASES.index(row["bias_type"])}
        if isinstance(row["bias_type"], str) else row
        for row in MADE_UP["stereotypes"]()["crows_pairs"]
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), test / "0000.parquet")
    for name, sets in SETS.items():
        publish(data / name, sets(), SPLITS.get(name, "train"))
    return root


def publish(folder: Path, sets: dict[str, list[dict[str, Any]]], split: str) -> None:
    """Write sets as configurations of one dataset, as a card declares them; a set may name its split."""
    configs: dict[str, list[dict[str, str]]] = {}
    write_made_up(folder, sets)
    for each in sets:
        config, _, own = ON_THE_HUB.get(each, each).partition("/")
        configs.setdefault(config, []).append({"split": own or split, "path": f"{each}.jsonl"})
    card = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n")


@pytest.fixture(scope="module")
def environment(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run the hub; return an environment that names it, with an empty home."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Running", (Hub,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield plain | {"HOME": str(tmp_path_factory.mktemp("home")), "HF_ENDPOINT": endpoint}
    server.shutdown()
    server.server_close()


def sisa(environment: dict[str, str], *arguments: object) -> dict[str, Any]:
    """Return the JSON of a command, which runs in a process of its own."""
    program = [sys.executable, "-m", "sisa", *map(str, arguments), "--json"]
    done = subprocess.run(program, env=environment, capture_output=True, check=False, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_all_that_a_run_file_names_is_on_the_hub(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"shards": 2, "slices": 2, "embedder": "public/embedder"}
    run = {"base_model": "public/base@v1", "datasets": [{"path": "public/people"}], "sisa": settings}
    (tmp_path / "run.yaml").write_text(json.dumps({**run, "num_epochs": 1, "output_dir": "model"}))
    home = tmp_path / "home"  # of its own: that of other tests holds a benchmark of the same texts
    online = environment | {"HOME": str(home)}
    trained = sisa(online, "train", tmp_path / "run.yaml", "--executor", "serial")
    assert trained["records"] == len(PEOPLE)
    model = ("-m", tmp_path / "model", "--executor", "serial")
    offline = online | {"HF_HUB_OFFLINE": "1"}  # the base and the embedder are in the user's cache
    assert sisa(offline, "forget", *model, "--subject", "p001")["records"] == 2
    assert sisa(offline, "verify", *model, "--replay", "all")["ok"]
    texts = [row["completion"].encode() for row in PEOPLE]
    cached = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in cached)
    assert not [path for path in cached if any(text in path.read_bytes() for text in texts)]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("absent", "no such dataset on the hub"),
        ("closed", "one that this user can't read"),
        ("code", "code of its own"),
    ],
)
def test_records_that_the_hub_refuses(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    for variable in ("HOME", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, environment[variable])
    with pytest.raises(InvalidInput) as raised:
        read_records([f"public/{name}"])
    ((where, found),) = [(each.where, each.what) for each in raised.value.problems]
    assert where == f"public/{name}"
    assert what in found


def test_benchmarks_and_bases_by_name(environment: dict[str, str], root: Path) -> None:
    folder = str(root / "datasets" / "public")
    program = [sys.executable, "-c", READ_BENCHMARKS, folder, *UNFIT]
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    for name in (*SETS, "scripted"):
        number, equal = found[name]
        assert (number > 0, equal) == (True, True), name
    assert "not on the hub" in found["absent, stereotype_pairs"]
    assert "not on the hub" in found["closed, stereotype_pairs"]
    assert "code of its own" in found["code, stereotype_pairs"]
    for name in UNFIT:
        assert "the hub does not have this model, or does not give you" in found[f"{name}, resolve_base"]
