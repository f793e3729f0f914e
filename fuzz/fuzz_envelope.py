"""An envelope as an enclave meets it: its header, what would be its terms, and records from somebody who has the data
key or has not."""

from __future__ import annotations

from attestation.envelope import EnvelopeError, EnvelopeHeader, EnvelopePurpose, Terms
from attestation.envelope_records import Opener, Sealer
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret

DATA_KEY = Secret(bytes(32))
MODEL, CONFIGURATION = bytes(48), b"c" * 48
KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")


def one_input(data: bytes) -> None:
    """The first byte chooses what the rest is: an envelope, or terms."""
    kind, rest = data[:1], data[1:]
    try:
        if kind == b"t":
            terms, at = Terms.split(rest)
            assert terms.encode() == rest[:at], "two encodings of the same terms"
            return
        header, at = EnvelopeHeader.split(rest)
        assert header.encode() == rest[:at], "two encodings of one header"
        opener = Opener(header, DATA_KEY, model=MODEL, configuration=CONFIGURATION)
        for start in range(at, len(rest), 997):
            opener.feed(rest[start : start + 997])
        opener.finish()
    except EnvelopeError:
        return


def seeds() -> list[bytes]:
    found = []
    for purpose, size in ((EnvelopePurpose.MODEL, 5000), (EnvelopePurpose.PROMPT, 40)):
        header = EnvelopeHeader(purpose, KEY, "production", 3, b"wrapped", 4096, bytes(32))
        terms = Terms(purpose, (MODEL,), (CONFIGURATION,))
        sealer = Sealer(header, terms, DATA_KEY)
        found += [b"e" + b"".join([*sealer.seal(bytes(size)), sealer.finish()]), b"t" + terms.encode()]
    return found
