"""KMS for the enclave: keys and randomness that are released to this measured image and to nothing else.

Each request carries a fresh document of the NSM that names an RSA key of this boot. KMS encrypts its answer to that
key, so that neither the parent nor whoever holds its credentials can read it. The document's own time, and no clock of
the host's, is what requests are signed at and certificates are compared with.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ParamSpec, TypeVar

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation import cbor
from attestation.commitment import Purpose, UserData
from attestation.cose import COSE_SIGN1_TAG, CoseSign1
from attestation.document import AttestationDocument
from attestation.envelope import DATA_KEY_SIZE, MAX_WRAPPED
from attestation.errors import EvidenceError
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from attestation.verifier import NONCE_SIZE
from enclave.config import KmsSettings
from enclave.kms.anchors import amazon_roots
from enclave.kms.client import KmsClient
from enclave.kms.cms import RSA_BITS, CmsError, open_enveloped
from enclave.kms.errors import KmsError
from enclave.kms.https import Attempt, Credentials, KmsPool, timed_out
from enclave.kms.release import AT_KMS
from enclave.kms.tunnel import Tunnel, TunnelStream
from enclave.nsm import Nsm
from vsockrpc.transport import ConnectionLost, Fault

__all__ = ["Kms", "KmsError", "Patience"]

THREADS = AT_KMS
"""Requests that wait for KMS at once: as many as prompts may ask; a boot asks before there are any."""
ABANDONED = 32
"""Pieces of work beside those, which somebody began who waits no more; what is more is refused. It is no queue: who
waits for a turn is bounded in :class:`~enclave.kms.release.GuardedKms`."""
MAX_RANDOM = 1024
"""Bytes of randomness in one request."""
MAX_CREDENTIALS = 16_384
"""Bytes of the parent's answer with its credentials."""
MARGIN = timedelta(minutes=2)
"""Credentials that end sooner are used, but not kept."""
LAST_TIMESTAMP = 253_402_300_799_999
"""Milliseconds: the end of the year 9999."""
KEPT_FOR = timedelta(minutes=5)
"""How long credentials without an end are kept, before the parent is asked whether they are still the same."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")
"""Printable, without a space: what may stand in a header."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long KMS is waited for, and how often it is asked."""

    total_seconds: float = 30.0
    """For a call with all its attempts."""
    attempt_seconds: float = 10.0
    """From the document to the answer."""
    attempts: int = 4
    first_pause_seconds: float = 0.2
    """Before the second attempt; each further pause is twice as long, and every one of them varies."""
    throttled_pause_seconds: float = 0.8
    """The same, when KMS is asked too often."""


class Kms:
    """The three operations, each for many callers at once. Made on a thread, used and closed on the loop."""

    def __init__(self, settings: KmsSettings, nsm: Nsm, *, patience: Patience | None = None) -> None:
        """Blocks while it makes this boot's RSA key, for which the kernel's generator must be seeded.

        Raises StrongroomError ``bad_anchor`` when the configured authority is no certificate.
        """
        self._settings = settings
        self._nsm = nsm
        self._patience = patience or Patience()
        self._key = rsa.generate_private_key(65537, RSA_BITS)
        self._recipient = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._binding = UserData(Purpose.KMS, hashlib.sha384(self._recipient).digest()).encode()
        endpoint = settings.endpoint
        pool = KmsPool(endpoint.host, endpoint.port, _authorities(settings), self._dial, kept=THREADS)
        self._client = KmsClient(settings.region, endpoint, pool)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kms")
        self._queued = 0
        self._closed = False
        self._tunnel: Tunnel | None = None
        self._credentials = _CredentialStore(self._ask_parent)

    def __repr__(self) -> str:
        return f"Kms({self._settings.endpoint}, key=<redacted>)"

    async def close(self) -> None:
        """Ends what is under way."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._tunnel is not None:
            await self._tunnel.close()
        await asyncio.to_thread(self._threads.shutdown)  # at once: nothing is left to block on
        self._client.close()

    # --- Operations ---------------------------------------------------------------------------------------------------

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        """The plaintext of ``wrapped``, 1 to 6,144 bytes that ``key`` made under the encryption context ``context``.

        Raises KmsError; NsmError or EvidenceError when the module gives no document.
        """
        _require_range("the wrapped key's bytes", len(wrapped), MAX_WRAPPED)
        parameters = {"CiphertextBlob": wrapped, **_named(key, context)}
        plaintext, _ = await self._call("decrypt", parameters, key)
        return plaintext

    async def generate_data_key(self, key: KeyArn, context: Mapping[str, str]) -> tuple[Secret, bytes]:
        """A fresh key of 32 bytes, and it wrapped by ``key`` under ``context``. Raises as :meth:`decrypt`."""
        parameters = {"KeySpec": "AES_256", **_named(key, context)}
        plaintext, answer = await self._call("generate_data_key", parameters, key)
        wrapped = answer.get("CiphertextBlob")
        if len(plaintext) != DATA_KEY_SIZE or not isinstance(wrapped, bytes) or not 1 <= len(wrapped) <= MAX_WRAPPED:
            raise KmsError("kms_malformed", "KMS's data key is not as asked for")
        return plaintext, wrapped

    async def generate_random(self, count: int) -> Secret:
        """1 to 1,024 bytes of KMS's randomness. Raises as :meth:`decrypt`."""
        _require_range("random bytes", count, MAX_RANDOM)
        plaintext, _ = await self._call("generate_random", {"NumberOfBytes": count}, None)
        if len(plaintext) != count:
            raise KmsError("kms_malformed", "KMS's randomness is of another size", expected=count, got=len(plaintext))
        return plaintext

    # --- A call and its attempts --------------------------------------------------------------------------------------

    async def _call(
        self, operation: str, parameters: Mapping[str, object], key: KeyArn | None
    ) -> tuple[Secret, Mapping[str, Any]]:
        patience, failed = self._patience, 0
        last = timed_out()
        try:
            async with asyncio.timeout(patience.total_seconds):
                while True:
                    try:
                        return await self._attempt(operation, parameters, key)
                    except KmsError as error:
                        last, failed = error, failed + 1
                        if not error.passing or failed == patience.attempts:
                            raise
                    await asyncio.sleep(self._pause(last, failed))
        except TimeoutError:
            raise last from None

    def _pause(self, error: KmsError, failed: int) -> float:
        busy = error.code in ("kms_throttled", "overloaded")
        first = self._patience.throttled_pause_seconds if busy else self._patience.first_pause_seconds
        return first * 2.0 ** (failed - 1) * random.uniform(0.5, 1.0)  # noqa: S311  only to spread them

    async def _attempt(
        self, operation: str, parameters: Mapping[str, object], key: KeyArn | None
    ) -> tuple[Secret, Mapping[str, Any]]:
        document = await self._on_thread(self._attest)
        credentials = await self._credentials.at(document.claims.timestamp)
        seconds = self._patience.attempt_seconds
        attempt = Attempt(document.claims.timestamp, credentials, seconds=seconds)
        timer = asyncio.get_running_loop().call_later(seconds, attempt.expire)
        try:
            return await self._on_thread(self._ask, operation, attempt, document, parameters, key)
        except KmsError as error:
            if error.code in ("kms_expired_credentials", "kms_no_credentials"):
                self._credentials.drop(credentials)
            raise
        finally:
            timer.cancel()
            attempt.expire()

    def _attest(self) -> _Document:
        """On a thread: a fresh document that names this boot's key."""
        document = self._nsm.attestation(
            user_data=self._binding, nonce=secrets.token_bytes(NONCE_SIZE), public_key=self._recipient
        )
        return _Document(document, _claims(document))

    def _ask(
        self,
        operation: str,
        attempt: Attempt,
        document: _Document,
        parameters: Mapping[str, object],
        key: KeyArn | None,
    ) -> tuple[Secret, Mapping[str, Any]]:
        """On a thread: one request, and what is in its answer."""
        recipient = {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document.encoded}
        try:
            answer = self._client.call(operation, attempt, {**parameters, "Recipient": recipient})
        except KmsError as error:
            if error.code != "kms_denied":
                raise
            raise KmsError(
                error.code,
                f"{error.message}; compare the key's policy with this encryption context and these registers",
                expected=parameters.get("EncryptionContext"),
                got=_told(document.claims),
            ) from None
        if answer.get("Plaintext"):
            raise KmsError("kms_plaintext", "KMS's answer is not encrypted to this enclave")
        if key is not None and answer.get("KeyId") != key.text:
            got = ascii(answer.get("KeyId"))[:200]
            raise KmsError("kms_wrong_key", "another key has answered", expected=key.text, got=got)
        enveloped = answer.get("CiphertextForRecipient")
        if not isinstance(enveloped, bytes):
            raise KmsError("kms_malformed", "KMS's answer has nothing for this enclave")
        try:
            return open_enveloped(enveloped, self._key), answer
        except CmsError as error:
            raise KmsError("kms_malformed", error.message, expected=error.expected, got=error.got) from None

    async def _on_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work whose caller has left is done all the same, and keeps its place until then. Raises KmsError
        ``overloaded``."""
        if self._closed:
            raise _closing()
        if self._queued >= THREADS + ABANDONED:
            raise KmsError("overloaded", "too many requests to KMS at once")
        self._queued += 1
        future = asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))
        future.add_done_callback(self._leave)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.cancelled():  # not the caller, but work that has not begun
                raise _closing() from None
            raise

    def _leave(self, future: asyncio.Future[T]) -> None:
        self._queued -= 1
        if not future.cancelled():
            future.exception()  # retrieved: nobody need be waiting

    # --- The parent ---------------------------------------------------------------------------------------------------

    def _dial(self, seconds: float) -> TunnelStream:
        assert self._tunnel is not None, "credentials came through it"
        return self._tunnel.open(self._settings.endpoint.host, self._settings.endpoint.port, seconds=seconds)

    async def _ask_parent(self) -> bytes:
        """The parent's answer with its credentials. Raises KmsError."""
        if self._tunnel is None:
            self._tunnel = Tunnel(self._settings.egress)
        try:
            return await self._tunnel.ask(
                "credentials.get", {}, longest=MAX_CREDENTIALS, seconds=self._patience.attempt_seconds
            )
        except (Fault, ConnectionLost) as error:
            if error.code == "no_credentials":
                raise KmsError("kms_no_credentials", f"the parent has no credentials: {error.message}") from None
            raise KmsError(
                "kms_unreachable", f"the parent's egress does not answer: {error.message}", got=error.code, passing=True
            ) from None


@dataclass(frozen=True, slots=True)
class _Document:
    encoded: bytes
    claims: AttestationDocument


def _claims(document: bytes) -> AttestationDocument:
    """What this enclave's own module signed; KMS verifies it. Raises EvidenceError."""
    signed = CoseSign1.from_cbor(cbor.decode(document, optional_tag=COSE_SIGN1_TAG))
    return AttestationDocument.from_cbor(cbor.decode(signed.payload, indefinite_top_map=True))


def _told(claims: AttestationDocument) -> str:
    """Every register in use: a key's policy may have a condition on any."""
    return ", ".join(f"PCR{index} {value.hex()}" for index, value in sorted(claims.pcrs.items()) if any(value))


def _named(key: KeyArn, context: Mapping[str, str]) -> dict[str, object]:
    if not context:
        raise ValueError("an encryption context is not empty")
    return {"KeyId": key.text, "EncryptionContext": dict(context)}


def _require_range(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{what}: 1 to {most}, not {value}")


def _authorities(settings: KmsSettings) -> Sequence[bytes]:
    return amazon_roots() if settings.authority is None else (settings.authority,)


class _CredentialStore:
    """The parent's credentials, kept until shortly before their end. One question at a time serves all who wait."""

    def __init__(self, ask: Callable[[], Awaitable[bytes]]) -> None:
        self._ask = ask
        self._asking = asyncio.Lock()
        self._kept: tuple[Credentials, datetime] | None = None
        """And until when."""

    async def at(self, time: datetime) -> Credentials:
        """Raises KmsError."""
        async with self._asking:
            if self._kept is None or time >= self._kept[1]:
                self._kept = None
                credentials = _decoded(await self._ask())
                if credentials.expires is not None and credentials.expires <= time:
                    raise KmsError(
                        "kms_expired_credentials",
                        "the parent's credentials have expired",
                        expected=f"later than {time:%Y-%m-%dT%H:%M:%SZ}",
                        got=f"{credentials.expires:%Y-%m-%dT%H:%M:%SZ}",
                        passing=True,
                    )
                self._kept = credentials, (credentials.expires - MARGIN if credentials.expires else time + KEPT_FOR)
            return self._kept[0]

    def drop(self, credentials: Credentials) -> None:
        """KMS takes them no more."""
        if self._kept is not None and self._kept[0] is credentials:
            self._kept = None


def _decoded(data: bytes) -> Credentials:
    """PROTOCOL.md section 5.4. Raises KmsError ``kms_no_credentials``; no text has anything of ``data``."""
    try:
        match cbor.decode(data, deterministic=True):
            case {
                "access_key": str(access_key),
                "secret_key": str(secret),
                "token": str() | None as token,
                "expires": int() | None as expires,
                **rest,
            } if not rest:
                pass
            case _:
                raise _unreadable()
    except EvidenceError:
        raise _unreadable() from None
    if expires is not None and not 0 <= expires <= LAST_TIMESTAMP:
        raise _unreadable()
    if not all(_TOKEN.fullmatch(text) for text in (access_key, secret, token or "-")):
        raise _unreadable()
    return Credentials(
        access_key,
        Secret(secret.encode("ascii")),
        None if token is None else Secret(token.encode("ascii")),
        None if expires is None else _EPOCH + timedelta(milliseconds=expires),
    )


def _unreadable() -> KmsError:
    return KmsError("kms_no_credentials", "the parent's credentials cannot be read")


def _closing() -> KmsError:
    return KmsError("kms_unreachable", "the enclave is closing")
