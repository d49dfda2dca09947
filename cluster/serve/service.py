"""Start, stop and find the service of a model, and ask it in place of loading the model.

    with started(directory, model.config, "127.0.0.1", 8808, num_replicas=2) as running:
        print(running.url)          # until the block ends

    running = find_service(directory)     # None: no service of this model runs here
    answers = running.generate_all(["Who is it?"], max_new_tokens=48)

`MODEL/service.json` (mode 0600) holds the address of a model's service, its process, and a token that
allows everything. A file whose process has ended is ignored. Nothing here loads torch; only `started`
loads Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import ssl
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sisa.core.digest import sha256_hex
from sisa.core.domain import Kind
from sisa.core.errors import Busy, EnvironmentFault, InvalidInput
from sisa.flows.wiring.upper_houses import SERVICE
from sisa.store.blobs import files

if TYPE_CHECKING:
    from sisa.config.config import RunConfig, Tls
    from sisa.flows.answers.ask import Answer, Prompt
    from sisa.flows.candidates import Candidate

APP = "sisa-"  # the prefix of our applications' names in Ray Serve
CALLS_AT_ONCE = 64  # more than a replica answers at once; the others wait there
LOOK_S, STOP_S = 2.0, 60.0
CLOCK_TOLERANCE_S = 1.0  # between two readings of a process's start


@dataclass(frozen=True)
class Running:
    """A running service, and calls to it in place of those to a `Model`."""

    url: str
    pid: int
    began: float  # when the process started, in seconds since the epoch
    token: str  # the owner's
    certificate: str | None = None  # of HTTPS

    def call(self, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """Return the JSON answer of a path to a JSON body. Raise OSError or ValueError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - our own URL
        try:
            with self._opener().open(request, timeout=timeout_s) as response:
                return json.loads(response.read())
        except HTTPException as error:  # the process ended meanwhile, or another one has the port
            raise ConnectionError(type(error).__name__) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        """Return an opener that uses no proxy and trusts this service's certificate alone."""
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.certificate is not None:
            context = ssl.create_default_context(cafile=self.certificate)
            context.check_hostname = False  # it has the name that other machines use
            handlers.append(urllib.request.HTTPSHandler(context=context))
        return urllib.request.build_opener(*handlers)

    def process(self) -> psutil.Process | None:
        """Return the service's process, if it runs on this machine."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.began) < CLOCK_TOLERANCE_S:
                return found
        return None

    def generate_all(
        self, prompts: Sequence[Prompt], max_new_tokens: int, kind: Kind | None = None
    ) -> list[Answer]:
        """Answer as `Model.generate_all`. Raise EnvironmentFault if the service fails or refuses."""
        from sisa.flows.answers.ask import Answer

        with self._answering():
            model = self.call("/v1/models", timeout_s=LOOK_S)["data"][0]["id"]
            body = {"model": model, "max_tokens": max_new_tokens}

            def ask(prompt: Prompt) -> Answer:
                if isinstance(prompt, str):
                    found = self.call("/v1/completions", {**body, "prompt": prompt, "form": kind})
                    text = found["choices"][0]["text"]
                else:
                    found = self.call("/v1/chat/completions", {**body, "messages": list(prompt)})
                    text = found["choices"][0]["message"]["content"]
                return Answer(text.strip(), tuple(found["choices"][0]["shards"]))

            with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
                return list(pool.map(ask, prompts))

    def find(self, text: str, top_k: int) -> list[Candidate]:
        """Find records as `Model.find`. Raise EnvironmentFault if the service fails or refuses."""
        from sisa.flows.candidates import Candidate

        with self._answering():
            found = self.call("/find", {"text": text, "top": top_k})["candidates"]
            return [Candidate(**each) for each in found]

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Raise EnvironmentFault if the service does not answer as it should."""
        try:
            yield
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EnvironmentFault(
                "the running service did not answer", where=self.url, got=type(error).__name__
            ) from None


def find_service(directory: Path) -> Running | None:
    """Return the running service of the model in a directory, if there is one on this machine."""
    try:
        found = Running(**json.loads((directory / SERVICE).read_bytes()))
        if found.process() is not None and found.call("/healthz", timeout_s=LOOK_S):
            return found
    except (OSError, ValueError, TypeError):  # none, an ended one, or somebody else's file
        pass
    return None


def stop_service(directory: Path) -> Running | None:
    """End the running service of a model, and return where it was. Raise Busy if it does not end."""
    found = find_service(directory)
    process = None if found is None else found.process()
    if process is None:
        return None
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        what = "the service did not end"
        raise Busy(what, where=str(directory), next_step=f"end process {process.pid}") from None
    return found


@contextlib.contextmanager
def started(
    directory: Path, config: RunConfig, host: str, port: int, num_replicas: int
) -> Iterator[Running]:
    """Run the service of a model on Ray Serve until the block ends.

    Raise Busy if one runs already, ConfigConflict for an address that needs tokens, EnvironmentFault if
    Ray or the replicas can't be started.
    """
    from cluster.serve.tokens import Tokens

    if (held := find_service(directory)) is not None:
        step = f"stop it: `sisa serve --stop -m {directory}`"
        raise Busy("a service of this model runs already", where=held.url, next_step=step)
    Tokens(directory).check_listening(host)
    http: dict[str, Any] = {"host": host, "port": port, **tls_files(config.service.tls)}
    if config.cluster.address is None:  # else `_deployed` does: a Ray Serve may hold the port for us
        _check_port(host, port)
    token = secrets.token_urlsafe(32)
    owner = sha256_hex(token.encode())
    with _deployed(directory, config, http, num_replicas, owner):
        me = psutil.Process()
        running = Running(_url(http), me.pid, me.create_time(), token, http.get("ssl_certfile"))
        _check_answers(running)
        path = directory / SERVICE
        files.write_atomic(path, json.dumps(asdict(running)).encode())
        try:
            yield running
        finally:
            path.unlink(missing_ok=True)


def _url(http: Mapping[str, Any]) -> str:
    """Return where this machine reaches a service.

    >>> _url({"host": "::", "port": 8808}), _url({"host": "127.0.0.1", "port": 80, "ssl_keyfile": "k"})
    ('http://[::1]:8808', 'https://127.0.0.1:80')
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http["host"], http["host"])  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if "ssl_keyfile" in http else "http"
    return f"{scheme}://{shown}:{http['port']}"


def _check_answers(running: Running) -> None:
    """Raise EnvironmentFault if the address does not answer: a cluster's Ray Serve may have another one.

    Ray Serve's proxy may learn of the replicas some seconds after they are ready.
    """
    until, got = time.monotonic() + LOOK_S * 5, ""
    while time.monotonic() < until:
        try:
            running.call("/healthz", timeout_s=LOOK_S)
            return
        except (OSError, ValueError) as error:
            got = type(error).__name__
            time.sleep(0.1)
    raise EnvironmentFault(
        "the service does not answer at its address",
        where=running.url,
        got=got,
        next_step="on a cluster whose Ray Serve listens elsewhere, choose its port, or end it there by "
        "`serve shutdown`",
    )


def _check_port(host: str, port: int) -> None:
    """Raise EnvironmentFault if a port can't be listened on: Ray Serve would try for minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentFault(
                "the service can't listen on this address",
                where=f"{host}:{port}",
                got=error.strerror or "",
                next_step="choose another one with --host and --port",
            ) from None


def tls_files(tls: Tls | None) -> dict[str, str]:
    """Return uvicorn's options for TLS, which are Ray Serve's as well; none without TLS.

    Raise InvalidInput unless the certificate fits the key, and the key is its owner's alone.
    """
    if tls is None:
        return {}
    try:
        found = tls.key.stat()
        others = stat.S_IMODE(found.st_mode) & 0o077
        if others or found.st_uid not in (os.getuid(), 0):
            raise _unusable(tls, f"a key that others can read (mode {stat.S_IMODE(found.st_mode):o})")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.cert, tls.key, password=_refuse_password)
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise _unusable(tls, reason) from None
    return {"ssl_certfile": str(tls.cert.absolute()), "ssl_keyfile": str(tls.key.absolute())}


def _refuse_password() -> str:
    raise OSError("the key is sealed by a password")


def _unusable(tls: Tls, got: str) -> InvalidInput:
    return InvalidInput(
        "TLS can't be used",
        where=f"service.tls: {tls.cert}, {tls.key}",
        expected="a certificate in PEM and its key, unsealed, of mode 0600",
        got=got,
        next_step="correct the paths, or `chmod 600` the key",
    )


@contextlib.contextmanager
def _deployed(
    directory: Path, config: RunConfig, http: Mapping[str, Any], num_replicas: int, owner: str
) -> Iterator[None]:
    """Deploy the replicas on Ray Serve, and take them down at the end.

    On a cluster Ray Serve outlives a command that was killed, and keeps its port; the next command
    replaces the application of that one, by its name. Raise Busy if another model's service runs there.
    """
    from ray import serve

    from cluster.ray.session import connect, disconnect, first_line
    from cluster.serve.replica import QUIET, replica

    threads, address = config.sisa.threads_per_shard, config.cluster.address
    cpus_to_train = max(os.cpu_count() or 1, (config.cluster.num_workers or 1) * threads)
    connect(address, cpus_to_train + num_replicas * threads)  # a deletion trains beside the replicas
    name = f"{APP}{sha256_hex(str(directory.resolve()).encode())[:16]}"
    is_ours = False  # whether this command started Ray Serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its notices call HTTPS "http://"
    try:
        known = serve.status()
        if not known.proxies:
            if address is not None:
                _check_port(http["host"], http["port"])
            is_ours = True
        if any(each.startswith(APP) and each != name for each in known.applications):
            raise Busy(
                "another model's service runs on this cluster",
                where=str(address),
                next_step="stop it: `sisa serve --stop`, or `serve shutdown` if it was killed",
            )
        serve.start(proxy_location="HeadOnly", http_options={**http}, logging_config=QUIET)
        app = replica(directory, config, num_replicas, owner)
        serve.run(app, name=name, logging_config=QUIET)
        yield
    except RuntimeError as error:
        raise EnvironmentFault(
            "the service can't be started", got=first_line(error), next_step="see Ray's logs"
        ) from error
    finally:
        with contextlib.suppress(Exception):  # Ray may be gone
            serve.delete(name)
            if is_ours and not serve.status().applications:
                serve.shutdown()
        disconnect()


def wait_until_ended() -> None:
    """Wait for Ctrl-C or SIGTERM. Raise EnvironmentFault if Ray Serve is gone."""
    from ray import serve

    ended = threading.Event()
    former = {
        each: signal.signal(each, lambda *_: ended.set()) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not ended.wait(LOOK_S):
            try:
                serve.status()
            except Exception as error:
                raise EnvironmentFault("Ray Serve is gone", got=type(error).__name__) from None
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
