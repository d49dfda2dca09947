"""Sign with a key outside this project's files: in an agent, a token or a service.

Signers are those of securesystemslib, by their URI: `hsm:` (PKCS#11), `awskms:`, `azurekms:`, `gcpkms:`,
`hv:` (HashiCorp Vault), `tkey:` and `file2:`, each with the packages that it needs. `ssh-agent:` is
added here: the agent (ssh-agent, gpg-agent and others) listens at the socket that `$SSH_AUTH_SOCK`
names, or `$VARIABLE` for `ssh-agent:VARIABLE`. A signer that asks for a PIN gets `$SISA_SIGNER_PIN`.

Source: draft-ietf-sshm-ssh-agent, section 3.6; RFC 8709, section 6; RFC 5656, section 3.1.2.
"""

from __future__ import annotations

import base64
import os
import socket
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    Key,
    SecretsHandler,
    Signature,
    Signer,
    SSlibKey,
)

from sisa.core.errors import EnvironmentFault, SisaError
from sisa.verifier.envelope import ECDSA_P256, StatementKey

PIN = "SISA_SIGNER_PIN"
SIGN_REQUEST, SIGN_RESPONSE = b"\x0d", b"\x0e"
MAX_REPLY_BYTES = 4096
AGENT_PATIENCE_S = 120.0  # somebody may have to touch a token


def signature_by(uri: str, key: StatementKey, message: bytes) -> bytes:
    """Return the signature of the signer that a URI names. Raise EnvironmentFault."""
    public: Any = load_der_public_key(key.public)
    try:
        known = SSlibKey.from_crypto(public, key.keyid, key.scheme)
        signer = Signer.from_priv_key_uri(uri, known, partial(_secret, uri))
        return bytes.fromhex(signer.sign(message).signature)
    except SisaError:
        raise
    except Exception as error:  # each signer has its own errors, and their texts may hold secrets
        plain = isinstance(error, UnsupportedLibraryError | OSError)
        raise failed_signer(uri, str(error) if plain else type(error).__name__) from None


def failed_signer(uri: str, got: str) -> EnvironmentFault:
    """Return the error for a signer that did not sign."""
    return EnvironmentFault(
        "the signer of certificates failed",
        where=uri.partition(":")[0] + ":",
        got=got,
        next_step="repair it, or name another by `signing.signer` in the run file; the next command "
        "signs what was not signed",
    )


def _secret(uri: str, name: str) -> str:
    if found := os.environ.get(PIN):
        return found
    raise failed_signer(uri, f"it asks for its {name}, and ${PIN} is not set")


class AgentSigner(Signer):
    """Sign with a key that an SSH agent holds."""

    SCHEME = "ssh-agent"

    def __init__(self, socket_path: str, public_key: SSlibKey) -> None:
        self._socket_path, self._public_key = socket_path, public_key

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,
        public_key: Key,
        secrets_handler: SecretsHandler | None = None,  # noqa: ARG003
    ) -> AgentSigner:
        """Return the signer of `ssh-agent:` or `ssh-agent:VARIABLE`."""
        variable = priv_key_uri.partition(":")[2] or "SSH_AUTH_SOCK"
        if not isinstance(public_key, SSlibKey) or not (path := os.environ.get(variable)):
            raise failed_signer(priv_key_uri, f"${variable} does not name the socket of an agent")
        return cls(path, public_key)

    @property
    def public_key(self) -> SSlibKey:
        """Return the public key of what signs."""
        return self._public_key

    def sign(self, payload: bytes) -> Signature:
        """Return the agent's signature in the form that securesystemslib gives it."""
        public: Any = self.public_key._crypto_key()
        blob = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
        request = SIGN_REQUEST + _string(base64.b64decode(blob)) + _string(payload) + bytes(4)
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(AGENT_PATIENCE_S)
            agent.connect(self._socket_path)
            agent.sendall(_string(request))
            with agent.makefile("rb") as answer:
                reply = _read(answer)
        if reply[:1] != SIGN_RESPONSE:
            raise OSError("the agent does not sign with this key")
        _, made = _strings(_strings(reply[1:])[0])
        if self.public_key.scheme == ECDSA_P256:
            r, s = _strings(made)
            made = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
        return Signature(self.public_key.keyid, made.hex())


SIGNER_FOR_URI_SCHEME[AgentSigner.SCHEME] = AgentSigner


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data


def _read(answer: Any) -> bytes:
    """Return one message of an agent."""
    size = int.from_bytes(answer.read(4))
    data: bytes = answer.read(min(size, MAX_REPLY_BYTES))
    if not 0 < size == len(data):
        raise OSError("the agent gave no whole answer")
    return data


def _strings(data: bytes) -> list[bytes]:
    """Split data into its strings; the length of each precedes it."""
    found = []
    while data:
        size = int.from_bytes(data[:4])
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found
