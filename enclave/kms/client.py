"""boto3's own client for KMS, botocore's, without anything that it would find by itself.

What it needs is handed to it: a session whose settings are constants, so that no environment, file, profile, proxy or
metadata service is asked; no credentials, for each request is signed here, at the attestation document's time; and
:class:`enclave.kms.https.KmsPool` to send by, so that it never opens a socket. It does not try again, and it logs
nowhere: its debug log has requests with their tokens in it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import botocore.session
from botocore import UNSIGNED
from botocore.auth import SIGV4_TIMESTAMP, SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.config import Config
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES, ConfigValueStore, ConstantProvider
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader
from botocore.tokens import TokenProviderChain

from attestation import strict_json
from attestation.errors import EvidenceError
from enclave.kms.errors import KmsError
from enclave.kms.https import ATTEMPT, Attempt, Credentials, KmsPool
from vsockrpc.address import TcpAddress

SERVICE: Final = "kms"
MAX_DEPTH: Final = 8
"""Of an answer's JSON."""

_THROTTLED: Final = frozenset(
    ("ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException")
)
_EXPIRED: Final = frozenset(("ExpiredTokenException", "ExpiredToken", "TokenRefreshRequired"))
_UNKNOWN_CREDENTIALS: Final = frozenset(
    (
        "UnrecognizedClientException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "SignatureDoesNotMatch",
        "IncompleteSignature",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
    )
)
_UNUSABLE_KEY: Final = frozenset(
    (
        "NotFoundException",
        "DisabledException",
        "KMSInvalidStateException",
        "InvalidKeyUsageException",
        "InvalidArnException",
    )
)
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")
_LONGEST_WORDS: Final = 400
"""Characters of KMS's own words that are told."""


class KmsClient:
    """The operations of KMS by name. Safe to use from several threads, each at one attempt."""

    def __init__(self, region: str, endpoint: TcpAddress, pool: KmsPool) -> None:
        self._region = region
        self._pool = pool
        self._client: Any = _session().create_client(
            SERVICE,
            region_name=region,
            endpoint_url=f"https://{endpoint.host}:{endpoint.port}",
            verify=True,
            config=Config(
                signature_version=UNSIGNED,
                retries={"total_max_attempts": 1, "mode": "standard"},
                proxies={},
                ignore_configured_endpoint_urls=True,
                user_agent="strongroom",
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self._client.meta.events.register(f"request-created.{SERVICE}", self._sign)
        self._client.meta.events.register(f"before-send.{SERVICE}", self._send)

    def close(self) -> None:
        self._client.close()
        self._pool.close()

    def call(self, operation: str, attempt: Attempt, parameters: Mapping[str, object]) -> Mapping[str, Any]:
        """The answer's members, with byte strings decoded. Raises KmsError, without a cause: botocore's exceptions may
        repeat a request's token.
        """
        before = ATTEMPT.set(attempt)
        try:
            answer: Mapping[str, Any] = getattr(self._client, operation)(**parameters)
        except ClientError as error:
            raise _refused(operation, error) from None
        except (BotoCoreError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise KmsError("kms_malformed", "KMS's answer cannot be read", got=type(error).__name__) from None
        finally:
            ATTEMPT.reset(before)
        return answer

    def _sign(self, request: AWSRequest, **_: object) -> None:
        attempt = ATTEMPT.get()
        _SignedAt(attempt.credentials, self._region, attempt.at).add_auth(request)

    def _send(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        headers = {name: value if isinstance(value, str) else value.decode() for name, value in request.headers.items()}
        status, answered, body = self._pool.post("/", request.body, headers)
        return AWSResponse(request.url, status, answered, _Body(_checked(status, body)))


class _Body:
    """A body that is there, as botocore reads one."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def stream(self) -> Iterator[bytes]:
        yield self._content


class _SignedAt(SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signature Version 4 at a given time, where botocore's own looks at the clock."""

    def __init__(self, credentials: Credentials, region: str, at: datetime) -> None:
        token = credentials.token
        exposed = ReadOnlyCredentials(
            credentials.access_key,
            credentials.secret.expose().decode("ascii"),
            None if token is None else token.expose().decode("ascii"),
        )
        super().__init__(exposed, SERVICE, region)
        self._at = at

    def add_auth(self, request: AWSRequest) -> None:
        request.context["timestamp"] = self._at.strftime(SIGV4_TIMESTAMP)
        self._modify_request_before_signing(request)
        signed = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(signed, request))


def _session() -> Any:
    """A session that knows nothing but botocore's own data and defaults."""
    constants = {name: ConstantProvider(default) for name, (_, _, default, _) in _SETTINGS.items()}
    session = botocore.session.Session()
    session.register_component("config_store", ConfigValueStore(constants))
    session.register_component("data_loader", _LOADER)
    session.register_component("token_provider", TokenProviderChain([]))
    return session


_LOADER: Final = Loader([Loader.BUILTIN_DATA_PATH], include_default_search_paths=False)
"""Of descriptions of AWS's services: those that are measured with botocore, and none from a home folder."""
_SETTINGS: Final = {
    **BOTOCORE_DEFAUT_SESSION_VARIABLES,
    "config_file": (None, None, None, None),
    "credentials_file": (None, None, None, None),
    "ignore_configured_endpoint_urls": (None, None, True, None),
}
"""By name: where botocore would look, and the default, which is all that counts here. The files have none."""


def _silence(name: str) -> None:
    """Nothing of this logger or of those below it reaches a handler, whatever a program configures."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    logger.addHandler(logging.NullHandler())


for _library in ("botocore", "urllib3"):
    _silence(_library)


# --- What went wrong --------------------------------------------------------------------------------------------------


def _checked(status: int, body: bytes) -> bytes:
    """The body, when it is one JSON object: botocore parses with less care. Of an error that is none, its status
    remains."""
    try:
        answer = strict_json.decode_foreign(body, code="kms_malformed", max_depth=MAX_DEPTH)
    except EvidenceError:
        answer = None
    if isinstance(answer, dict):
        return body
    if status == 200:
        raise KmsError("kms_malformed", "KMS's answer is no JSON object")
    return b"{}"


def _refused(operation: str, error: ClientError) -> KmsError:
    code = _UNPRINTABLE.sub("?", str(error.response.get("Error", {}).get("Code", "")))[:100]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _THROTTLED or status == 429:
        return KmsError("kms_throttled", "KMS is asked too often", got=code, passing=True)
    if status >= 500:
        return KmsError("kms_failed", "KMS failed", got=f"{status} {code}", passing=True)
    if code in _EXPIRED:
        return KmsError("kms_expired_credentials", "the parent's credentials have expired", got=code, passing=True)
    if code in _UNKNOWN_CREDENTIALS:
        return KmsError(
            "kms_no_credentials",
            "KMS does not take the parent's credentials, or what is signed with them at the NSM's time",
            got=code,
        )
    if code in ("AccessDeniedException", "AccessDenied"):
        return KmsError("kms_denied", f"KMS denies {operation} to this enclave: {_words(error)}", got=code)
    if code in _UNUSABLE_KEY:
        return KmsError("kms_unusable_key", f"the key cannot be used: {_words(error)}", got=code)
    if code == "InvalidCiphertextException":
        return KmsError("kms_wrong_context", "the wrapped key is not of this key and encryption context", got=code)
    if code == "IncorrectKeyException":
        return KmsError("kms_wrong_key", "the wrapped key is of another key", got=code)
    return KmsError("kms_refused", f"KMS does not take the request for {operation}", got=code)


def _words(error: ClientError) -> str:
    """KMS's own, of refusals that name principals, keys and conditions. Those of a bad signature repeat the request,
    its token included, and are never told."""
    return _UNPRINTABLE.sub("?", str(error.response.get("Error", {}).get("Message", "")))[:_LONGEST_WORDS]
