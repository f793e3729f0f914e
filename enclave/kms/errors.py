"""Why KMS released nothing. Every failure of a call to it is a :class:`KmsError`, and no text in one is secret."""

from __future__ import annotations

from typing import Final

from attestation.errors import StrongroomError

KMS_CODES: Final = frozenset(
    (
        "kms_unreachable",
        "kms_timeout",
        "kms_throttled",
        "kms_failed",
        "kms_tls",
        "kms_no_credentials",
        "kms_expired_credentials",
        "kms_denied",
        "kms_unusable_key",
        "kms_wrong_context",
        "kms_refused",
        "kms_plaintext",
        "kms_wrong_key",
        "kms_malformed",
    )
)
"""Every code of a :class:`KmsError` but ``overloaded``, which is nothing that KMS said."""


class KmsError(StrongroomError):
    """KMS released nothing. Codes:

    - ``kms_unreachable``, ``kms_timeout``: no connection, one that broke, or no answer in time
    - ``kms_throttled``, ``overloaded``: too many calls, by KMS's measure or by the enclave's and the parent's
    - ``kms_failed``: an error on KMS's side
    - ``kms_tls``: whoever answers cannot show to be KMS
    - ``kms_no_credentials``, ``kms_expired_credentials``: the parent gives none that KMS takes
    - ``kms_denied``: by the key's policy or grants
    - ``kms_unusable_key``: it does not exist, is not enabled, or is of another kind
    - ``kms_wrong_context``: the wrapped key is not of this key and encryption context
    - ``kms_refused``: KMS does not take the request, for another reason
    - ``kms_plaintext``: the answer is not encrypted to this enclave
    - ``kms_wrong_key``: another key than the one asked for has answered
    - ``kms_malformed``: the answer cannot be read
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        passing: bool = False,
    ) -> None:
        super().__init__(code, message, expected=expected, got=got)
        self.passing = passing
        """It may be gone in a moment: worth another attempt, with a fresh document."""
