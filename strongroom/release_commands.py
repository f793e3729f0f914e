"""``release``: a publisher signs reference values, and anybody checks them. PROTOCOL.md section 4.1."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.text import Text

from attestation.reference import DIGEST_SIZE, PcrSet
from attestation.release_heads import HeadMemory, MemoryHeads
from attestation.release_signing import LocalSigner, PublicKey, ReleaseError, Signer
from attestation.releases import (
    MAX_ENTRIES,
    MAX_HISTORY,
    MAX_VALIDITY,
    ReleasedImage,
    ReleaseHistory,
    Source,
    time_text,
)
from strongroom import reference_options as reference
from strongroom.files import read_bounded
from strongroom.image.check import require_sound
from strongroom.image.commands import open_image
from strongroom.options import Octets, json_option, out, user_heads
from strongroom.reference_options import ANY_FILE, DigestOrFile, PinnedKey, Product
from strongroom.release_file import Outcome, ReleaseFile, read_key, write_key
from strongroom.release_report import as_json_object, show_history

DEFAULT_VALIDITY_DAYS = 90
F = TypeVar("F", bound=Callable[..., Any])
REGISTER = Octets([DIGEST_SIZE])


product_option = click.option(
    "--product", required=True, type=Product(), metavar="NAME", help="What the history is about."
)
expires_option = click.option(
    "--expires",
    "days",
    metavar="DAYS",
    type=click.IntRange(1, MAX_VALIDITY.days),
    default=DEFAULT_VALIDITY_DAYS,
    show_default=True,
    help="Days until nothing counts any more, unless a later entry renews it.",
)


def signer_options(command: F) -> F:
    """``--key`` and ``--kms-key``, of which one is given."""
    kms = click.option("--kms-key", metavar="ARN", help="A KMS key of spec ECC_NIST_P384, by its full ARN.")
    return click.option("--key", type=ANY_FILE, help="A private key in PEM: Ed25519, or ECDSA on P-384.")(kms(command))


@click.group()
def release() -> None:
    """Sign reference values, or check those that somebody signed.

    A release history is a file of signed entries, to be published beside the images. Each entry says which releases
    count from then on, and until when; a client pins the key and remembers what it has seen.

    \b
    Example:
      strongroom release keygen publisher.pem
      strongroom release add releases.jsonl --key publisher.pem --product assistant --release 1.0 \\
        --from-eif enclave.eif --repository https://example.org/assistant.git --commit $(git rev-parse HEAD)
      strongroom release check releases.jsonl --key ed25519:... --product assistant
    """


# --- Keys ---------------------------------------------------------------------------------------------------------


@release.command()
@click.argument("file", type=ANY_FILE)
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make an Ed25519 key in FILE, for its owner's eyes only, and print what clients pin.

    \b
    Example:
      strongroom release keygen publisher.pem
    """
    signer = LocalSigner.generate()
    write_key(file, signer)
    _print_key(signer.public_key, as_json)


@release.command()
@signer_options
@json_option
def pin(key: Path | None, kms_key: str | None, as_json: bool) -> None:
    """Print what clients pin: the public key.

    \b
    Example:
      strongroom release pin --kms-key arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
    """
    with _signer(key, kms_key) as signer:
        _print_key(signer.public_key, as_json)


def _print_key(key: PublicKey, as_json: bool) -> None:
    click.echo(json.dumps({"key": str(key), "key_id": key.key_id}) if as_json else str(key))


@contextlib.contextmanager
def _signer(key: Path | None, kms_key: str | None) -> Iterator[Signer]:
    if key is not None and kms_key is None:
        yield read_key(key)
    elif kms_key is not None and key is None:
        from strongroom.kms.signer import KmsSigner

        with KmsSigner(kms_key) as signer:
            yield signer
    else:
        raise click.UsageError("name one of --key and --kms-key")


# --- Signing ------------------------------------------------------------------------------------------------------


@release.command()
@click.argument("history", type=ANY_FILE)
@signer_options
@product_option
@click.option("--release", "release_name", required=True, metavar="NAME", help="What this release is called.")
@click.option("--from-eif", type=ANY_FILE, help="Measure this image file, and state its digest.")
@click.option("--from-measurements", type=ANY_FILE, help="What nitro-cli build-enclave printed (JSON).")
@click.option("--pcr0", type=REGISTER, help="In place of a file: the image.")
@click.option("--pcr1", type=REGISTER, help="In place of a file: kernel and boot ramdisk.")
@click.option("--pcr2", type=REGISTER, help="In place of a file: the application.")
@click.option("--pcr8", type=REGISTER, help="In place of a file: the signing certificate, of a signed image.")
@click.option("--image", type=ANY_FILE, help="State the digest of this image file; it is not measured.")
@click.option("--repository", required=True, help="Where the source is.")
@click.option("--commit", required=True, type=Octets([20, 32]), help="The commit that the image was built from.")
@click.option(
    "--model",
    type=DigestOrFile(),
    multiple=True,
    help="A GGUF file, a manifest, or a manifest's digest; repeatable.",
)
@click.option(
    "--configuration",
    type=DigestOrFile(),
    multiple=True,
    help="An enclave.toml or its digest; repeatable.",
)
@expires_option
@json_option
def add(
    history: Path,
    key: Path | None,
    kms_key: str | None,
    product: str,
    release_name: str,
    from_eif: Path | None,
    from_measurements: Path | None,
    pcr0: bytes | None,
    pcr1: bytes | None,
    pcr2: bytes | None,
    pcr8: bytes | None,
    image: Path | None,
    repository: str,
    commit: bytes,
    model: tuple[bytes | Path, ...],
    configuration: tuple[bytes | Path, ...],
    days: int,
    as_json: bool,
) -> None:
    """Sign an entry of HISTORY with one more release; the others stay. Without the file a new history begins.

    Registers come from the image file, from nitro-cli's output, or one by one. Models and configurations are those that
    this release is vouched for with; without any it is vouched for with none, and clients must name their own.

    \b
    Example:
      strongroom release add releases.jsonl --key publisher.pem --product assistant --release 1.0 \\
        --from-measurements measurements.json --image enclave.eif --model model.gguf --configuration enclave.toml \\
        --repository https://example.org/assistant.git --commit $(git rev-parse HEAD)
    """
    registers = {"pcr0": pcr0, "pcr1": pcr1, "pcr2": pcr2, "pcr8": pcr8}
    if from_eif is not None and image is not None:
        raise click.UsageError("--from-eif states that file's digest already: leave --image out")
    measured, stated = _measure(from_eif, from_measurements, {name: each for name, each in registers.items() if each})
    if image is not None:
        stated = reference.image_file_digest(image)
    added = ReleasedImage(
        name=release_name,
        pcrs=measured,
        image=stated,
        source=Source(repository, commit.hex()),
        models=tuple(map(reference.model_digest, model)),
        configurations=tuple(map(reference.configuration, configuration)),
    )

    with _signer(key, kms_key) as signer, user_heads() as heads:
        file = ReleaseFile(history, signer, product, heads)
        _say(file.add(added, at=datetime.now(UTC), validity=timedelta(days=days)), history, as_json)


@release.command()
@click.argument("history", type=ANY_FILE)
@click.argument("release_name", metavar="NAME")
@signer_options
@product_option
@expires_option
@json_option
def withdraw(
    history: Path, release_name: str, key: Path | None, kms_key: str | None, product: str, days: int, as_json: bool
) -> None:
    """Sign an entry of HISTORY without the release NAME: clients that see it accept that release no more.

    \b
    Example:
      strongroom release withdraw releases.jsonl 1.0 --key publisher.pem --product assistant
    """
    with _signer(key, kms_key) as signer, user_heads() as heads:
        file = ReleaseFile(history, signer, product, heads)
        outcome = file.withdraw(release_name, at=datetime.now(UTC), validity=timedelta(days=days))
        _say(outcome, history, as_json)


@release.command()
@click.argument("history", type=ANY_FILE)
@signer_options
@product_option
@expires_option
@json_option
def refresh(history: Path, key: Path | None, kms_key: str | None, product: str, days: int, as_json: bool) -> None:
    """Sign an entry of HISTORY with the same releases and a new expiry.

    \b
    Example:
      strongroom release refresh releases.jsonl --key publisher.pem --product assistant --expires 90
    """
    with _signer(key, kms_key) as signer, user_heads() as heads:
        file = ReleaseFile(history, signer, product, heads)
        _say(file.refresh(at=datetime.now(UTC), validity=timedelta(days=days)), history, as_json)


def _say(outcome: Outcome, path: Path, as_json: bool) -> None:
    history, current = outcome.history, outcome.history.current
    if as_json:
        click.echo(json.dumps({"changed": outcome.is_changed, **as_json_object(history)}))
        return
    done = f"signed entry {current.sequence} of {path}" if outcome.is_changed else f"nothing to change in {path}"
    names = ", ".join(release.name for release in current.releases) or "no release"
    click.echo(f"{done}\nuntil {time_text(history.expires)} these count: {names}\nclients pin {history.key}")


def _measure(
    from_eif: Path | None, from_measurements: Path | None, registers: dict[str, bytes]
) -> tuple[PcrSet, bytes | None]:
    """The registers; and the digest of the image file, where they were measured from one: by the same reading of it."""
    given = [source for source in (from_eif, from_measurements, registers) if source]
    if len(given) != 1 or (registers and not {"pcr0", "pcr1", "pcr2"} <= registers.keys()):
        raise click.UsageError("name one of --from-eif, --from-measurements, and --pcr0, --pcr1 and --pcr2 together")
    if registers:
        return PcrSet(**registers), None
    if from_eif is not None:
        with open_image(from_eif, digest_file=True) as opened:
            require_sound(opened.contents(), datetime.now(UTC))
        return opened.image.measurements, opened.image.sha384
    assert from_measurements is not None
    return reference.measurements(from_measurements), None


# --- Checking -----------------------------------------------------------------------------------------------------


@release.command()
@click.argument("history", type=ANY_FILE)
@click.option("--key", required=True, type=PinnedKey(), help="The pinned key: ed25519:HEX or ecdsa-p384:HEX.")
@product_option
@click.option(
    "--minimum-sequence", type=click.IntRange(1, MAX_ENTRIES), default=1, show_default=True,
    help="Refuse a history with fewer entries.",
)  # fmt: skip
@click.option(
    "--no-memory", is_flag=True,
    help="Judge the file alone: not held to what was seen before, nor remembered.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Print digests whole.")
@json_option
def check(
    history: Path, key: PublicKey, product: str, minimum_sequence: int, no_memory: bool, full: bool, as_json: bool
) -> None:
    """Verify HISTORY against a pinned key, and show what counts now and what each entry changed.

    What was seen of a history is remembered, for this command and for every policy that names it: an older one, or
    another one, is refused from then on. The memory is in the folder that STRONGROOM_HOME names, or in
    ~/.local/state/strongroom.

    \b
    Example:
      strongroom release check releases.jsonl --key ed25519:... --product assistant

    Exit codes: 0 verified and current, 3 not signed by this key, broken, rolled back or expired.
    """
    data = read_bounded(history, MAX_HISTORY)
    memory = contextlib.nullcontext[HeadMemory](MemoryHeads()) if no_memory else user_heads()
    with memory as heads:
        try:
            verified = ReleaseHistory.verify(
                data, key=key, name=product, minimum_sequence=minimum_sequence, head=heads.recall(key, product)
            )
            heads.remember(verified)
        except ReleaseError as error:
            raise error.of(str(history)) from error
    if as_json:
        verified.require_current(datetime.now(UTC))
        click.echo(json.dumps(as_json_object(verified)))
        return
    show_history(out, verified, whole=full)
    verified.require_current(datetime.now(UTC))
    out.print(Text("\nVERIFIED", "bold green").append(f"  signed by {verified.key.key_id}", "default"))
