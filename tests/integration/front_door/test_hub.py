"""Names on a model hub: the real client libraries fetch models, records and benchmarks over HTTP.

The hub is a server in this process that speaks the part of the protocol that these clients use
(https://huggingface.co/docs/hub/api). `HF_ENDPOINT` names it, as it would name a company's mirror.
Clients read that variable once, so commands run in processes of their own.
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

import pytest

from sisa.core.digest import sha256_hex
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.data.samples import make_people
from tests.fakes.benchmarks import MADE_UP, made_up, write_made_up
from tests.models.tiny_base import make_tiny_embedder
from tests.models.tiny_model import write_rows

pytestmark = pytest.mark.torch

COMMIT = "c" * 40
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
for name in sys.argv[2:]:
    for ask in (stereotypes.stereotype_pairs, resolve_base):
        try:
            ask(f"public/{name}")
        except InvalidInput as error:
            found[f"{name}, {ask.__name__}"] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Serve directories `models/OWNER/NAME` and `datasets/OWNER/NAME` of `root` as repositories."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self.describe(self.root.joinpath(*parts[1:4]), parts[4:])
            return
        if parts[0] != "datasets":
            parts = ["models", *parts]
        self.send_file(self.root.joinpath(*parts[:3]), "/".join(parts[5:]))  # .../resolve/REVISION/FILE

    do_HEAD = do_GET

    def describe(self, folder: Path, asked: list[str]) -> None:
        """Answer what a repository is, or (`tree/REVISION/...`) which files it has."""
        if self.missing(folder):
            return
        if asked[:1] != ["tree"]:
            self.answer({"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "siblings": []})
            return
        entries = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size,
             "oid": sha256_hex(path.read_bytes())}
            for path in sorted(folder.joinpath(*asked[2:]).rglob("*"))
            if path.is_file()
        ]  # fmt: skip
        self.answer(entries) if entries else self.refuse("EntryNotFound")

    def send_file(self, folder: Path, name: str) -> None:
        """Answer a file's bytes."""
        if self.missing(folder):
            return
        if (path := folder / name).is_file():
            self.answer(path.read_bytes(), ETag=f'"{sha256_hex(path.read_bytes())}"')
        else:
            self.refuse("EntryNotFound")

    def missing(self, folder: Path) -> bool:
        """Refuse a repository that is not there, or that its owner opens to some alone."""
        if (folder / "gated").exists():
            self.refuse("GatedRepo", 403)
        elif not folder.is_dir():
            self.refuse("RepoNotFound", 401)
        else:
            return False
        return True

    def refuse(self, error: str, status: int = 404) -> None:
        self.answer({}, status, **{"X-Error-Code": error})

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        about = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        for name, value in (about | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


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
    for name in SETS:
        number, equal = found[name]
        assert (number > 0, equal) == (True, True), name
    assert "not on the hub" in found["absent, stereotype_pairs"]
    assert "not on the hub" in found["closed, stereotype_pairs"]
    assert "code of its own" in found["code, stereotype_pairs"]
    for name in UNFIT:
        assert "the hub does not have this model, or does not give you" in found[f"{name}, resolve_base"]
