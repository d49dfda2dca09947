"""Fake what a service demands: tokens of given callers, who may call as often as they like, and TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.serve.tokens import Caller, Tokens
from sisa.config.config import Tls


class KnownTokens(Tokens):
    def __init__(self, **known: Caller) -> None:
        super().__init__(Path("nowhere"))
        self._known = known

    def demanded(self) -> bool:
        return True

    def caller(self, bearer: str) -> Caller | None:
        return self._known.get(bearer)

    def check_rate(self, caller: Caller) -> None:
        """Refuse nobody."""

    def fail(self, address: str) -> None:
        """Note nothing."""


def certified(folder: Path, *options: str) -> Tls:
    made = Tls(cert=folder / "cert.pem", key=folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(made.key), "-out", str(made.cert), *(options or ("-nodes",))]
    subprocess.run(command, check=True, capture_output=True)
    made.key.chmod(0o600)
    return made
