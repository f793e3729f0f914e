"""The emulated KMS at an HTTPS endpoint that any AWS SDK talks to, and the whole of it for tests: :func:`kms_emulator`.

Every request is signed by a principal of the emulator's directory, or refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from attestation import strict_json
from attestation.chain import Anchor
from attestation.errors import EvidenceError
from emulator.https import Cut, HttpAnswer, HttpRequest, HttpsServer
from emulator.kms import DEFAULT_ACCOUNT, DEFAULT_REGION, SoftwareKms
from emulator.kms_faults import Alter, Delay, Fault, Faults, Refuse
from emulator.kms_keys import ENCRYPT_DECRYPT, SYMMETRIC
from emulator.kms_request import KmsFault
from emulator.sigv4 import Directory, Principal, authenticate
from emulator.tls import LOCAL_NAMES, TlsAuthority

TARGET: Final = "TrentService."
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
MAX_DEPTH: Final = 8
"""Of a request's JSON."""
SESSION: Final = timedelta(hours=1)
"""How long a role's credentials last, unless somebody says otherwise."""


class KmsEmulator:
    """A running KMS. Stop it with :meth:`close`, or use :func:`kms_emulator`."""

    def __init__(
        self,
        kms: SoftwareKms,
        authority: TlsAuthority,
        root_file: Path,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        names: Sequence[str] = (),
    ) -> None:
        """Listens at once. ``root_file`` is a PEM file with ``authority``'s certificate; ``names`` are names that the
        endpoint's certificate has beside those of this machine. Raises OSError when it cannot listen.
        """
        host, _ = listen
        self.kms = kms
        self.root_file = root_file
        """What ``AWS_CA_BUNDLE`` names."""
        self.root_der = authority.root_der
        self.faults = Faults()
        self.skew = timedelta(0)
        """How far the service's clock is ahead of this machine's."""
        self.directory = Directory()
        self._closing = threading.Event()
        self._clock = kms.clock
        kms.clock = self.now
        wildcard = host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound
        shown = "localhost" if wildcard else host
        context = authority.server_context([*LOCAL_NAMES, *({shown, *names} - set(LOCAL_NAMES))], self._clock())
        self._server = HttpsServer(listen, context, self._answer)
        self.port = self._server.port
        self.endpoint = f"https://{f'[{shown}]' if ':' in shown else shown}:{self.port}"
        """For ``AWS_ENDPOINT_URL_KMS``."""

    def now(self) -> datetime:
        """By the service's clock."""
        return self._clock() + self.skew

    def principal(self, resource: str, *, lifetime: timedelta | None = None) -> Principal:
        """Credentials for ``root``, ``user/NAME`` or ``assumed-role/ROLE/SESSION`` of the account, or for any ARN.

        Those of a role last ``lifetime``, an hour if None; one may be negative. Raises ValueError.
        """
        arn = resource
        if not resource.startswith("arn:"):
            service = "sts" if resource.startswith("assumed-role/") else "iam"
            arn = f"arn:aws:{service}::{self.kms.account}:{resource}"
        if lifetime is None and ":assumed-role/" in arn:
            lifetime = SESSION
        return self.directory.add(arn, expires=None if lifetime is None else self.now() + lifetime)

    def create_key(
        self,
        policy: str | None = None,
        *,
        usage: str = ENCRYPT_DECRYPT,
        spec: str = SYMMETRIC,
        multi_region: bool = False,
        alias: str | None = None,
    ) -> str:
        """As :meth:`emulator.kms.SoftwareKms.create_key`: a new key's ARN."""
        return self.kms.create_key(policy, usage=usage, spec=spec, multi_region=multi_region, alias=alias)

    def client_settings(self, principal: Principal) -> dict[str, Any]:
        """Arguments of ``boto3.client("kms", ...)``, or of botocore's, that make it ``principal``'s client."""
        return {
            "region_name": self.kms.region,
            "endpoint_url": self.endpoint,
            "verify": str(self.root_file),
            "aws_access_key_id": principal.access_key,
            "aws_secret_access_key": principal.secret.expose().decode("ascii"),
            "aws_session_token": None if principal.token is None else principal.token.expose().decode("ascii"),
        }

    def environment(self, principal: Principal) -> dict[str, str]:
        """What makes every AWS SDK ``principal``'s client of this KMS, and of nothing that a person has configured.

        For tests: a secret in an environment is everybody's who can read it.
        """
        settings = self.client_settings(principal)
        token = settings["aws_session_token"]
        return {
            "AWS_ENDPOINT_URL_KMS": self.endpoint,
            "AWS_CA_BUNDLE": str(self.root_file),
            "AWS_REGION": self.kms.region,
            "AWS_DEFAULT_REGION": self.kms.region,
            "AWS_ACCESS_KEY_ID": settings["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": settings["aws_secret_access_key"],
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "*",
        } | ({} if token is None else {"AWS_SESSION_TOKEN": token})

    def close(self) -> None:
        """Ends every connection and thread. Raises the first defect that a request has met, if one has."""
        self._closing.set()
        self._server.close()

    def _answer(self, request: HttpRequest) -> HttpAnswer:
        headers = {
            "Date": format_datetime(self.now().astimezone(UTC), usegmt=True),
            "Content-Type": CONTENT_TYPE,
            "x-amzn-RequestId": str(uuid.uuid4()),
        }
        cut: Cut | None = None
        try:
            operation = _operation(request)
            faults = self.faults.due(operation)
            for fault in faults:
                match fault:
                    case Delay(seconds):
                        self._closing.wait(seconds)
                    case Refuse():
                        raise fault.fault()
                    case Cut():
                        cut = fault
            caller = authenticate(request, self.directory, regions=self.kms.keys.regions, now=self.now())
            answer = _altered(self.kms.call(operation, _body(request.body), caller), faults)
            return HttpAnswer(HTTPStatus.OK, headers, json.dumps(answer).encode("ascii"), cut)
        except KmsFault as refusal:
            said = json.dumps({"__type": refusal.code, "message": refusal.message}).encode("ascii")
            return HttpAnswer(HTTPStatus(refusal.status), headers, said, cut)


@contextlib.contextmanager
def kms_emulator(
    *,
    anchor: Anchor | None = None,
    region: str = DEFAULT_REGION,
    account: str = DEFAULT_ACCOUNT,
    names: Sequence[str] = (),
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Iterator[KmsEmulator]:
    """A KMS of its own on a free port of this machine, under a TLS root of its own, for the length of the block.

    ``anchor`` is that under which attestation documents are believed.
    """
    authority = TlsAuthority.generate(clock())
    with tempfile.TemporaryDirectory(prefix="strongroom-kms-") as directory:
        root_file = Path(directory) / "root.pem"
        root_file.write_bytes(authority.root_pem)
        kms = SoftwareKms(anchor=anchor, region=region, account=account, clock=clock)
        emulator = KmsEmulator(kms, authority, root_file, names=names)
        try:
            yield emulator
        finally:
            emulator.close()


def _operation(request: HttpRequest) -> str:
    target = request.header("x-amz-target") or ""
    if request.target != "/" or not target.startswith(TARGET):
        raise KmsFault("UnknownOperationException", "not an operation of TrentService")
    return target.removeprefix(TARGET)


def _body(body: bytes) -> object:
    try:
        return strict_json.decode_foreign(body, code="malformed", max_depth=MAX_DEPTH)
    except EvidenceError as error:
        raise KmsFault("SerializationException", error.message) from error


def _altered(answer: Mapping[str, Any], faults: Sequence[Fault]) -> Mapping[str, Any]:
    for fault in faults:
        if isinstance(fault, Alter):
            answer = fault.change(answer)
    return answer
