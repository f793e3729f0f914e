"""``image measure``, ``describe``, ``verify`` and ``diff``: what an enclave image file is, before anybody runs it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import click
from rich.text import Text

from attestation.eif import ImageError
from attestation.image_diff import ImageContents, compare, read_contents
from attestation.measure import EnclaveImage, measure_image
from attestation.release_signing import PublicKey
from strongroom.image.check import Wanted, check_image
from strongroom.image.report import difference_as_json, image_as_json, show_difference, show_image, show_registers
from strongroom.options import err, json_option, out
from strongroom.reference_options import ANY_FILE, PinnedKey, Product
from strongroom.render import hashing_bar, printable, shorten

STREAM = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
full_option = click.option("--full", is_flag=True, help="Print digests whole, and every file.")


class RefusedImage(ImageError):
    """An ImageError of a command that says what an image is worth: one that is broken is worth nothing."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image that was measured, and its file, from which the same can be read again."""

    image: EnclaveImage
    file: BinaryIO

    def contents(self) -> ImageContents:
        """With everything that its ramdisks hold. Raises ImageError, OSError."""
        with hashing_bar(err, "ramdisks") as progress:
            return read_contents(self.image, self.file, progress=progress)


@contextlib.contextmanager
def open_image(path: Path, *, digest_file: bool = False) -> Iterator[OpenImage]:
    """Measures the image at ``path`` and keeps it open. Raises ImageError, OSError."""
    with path.open("rb") as file:
        with hashing_bar(err, "image") as progress:
            image = measure_image(file, progress=progress, digest_file=digest_file)
        yield OpenImage(image, file)


@click.command()
@click.argument("file", type=STREAM)
@json_option
def measure(file: Path, as_json: bool) -> None:
    """Measure an enclave image: what a Nitro enclave started from it will have in its registers.

    FILE is read once, from beginning to end, and may be - for standard input. Every structure in it is held against the
    others, its CRC and its signature are verified. With --json the output is that of `nitro-cli build-enclave`.

    \b
    Examples:
      strongroom image measure enclave.eif
      strongroom image measure enclave.eif --json > measurements.json
      aws s3 cp s3://builds/enclave.eif - | strongroom image measure -

    Exit codes: 0 measured, 2 no image, or a broken one.
    """
    with contextlib.ExitStack() as stack:
        source = sys.stdin.buffer if str(file) == "-" else stack.enter_context(file.open("rb"))
        with hashing_bar(err, "image") as progress:
            image = measure_image(source, progress=progress)
    if as_json:
        click.echo(json.dumps(image.as_nitro_cli(), indent=2))
    else:
        show_registers(out, image)


@click.command()
@click.argument("file", type=ANY_FILE)
@full_option
@json_option
def describe(file: Path, full: bool, as_json: bool) -> None:
    """Say what is in an enclave image: header, sections, metadata, signature, and what its ramdisks hold.

    The signature is verified, and whether its certificate is valid now is said. Nothing vouches for what is marked as
    not measured: anybody can change it without changing a register.

    \b
    Examples:
      strongroom image describe enclave.eif
      strongroom image describe enclave.eif --json | jq .metadata

    Exit codes: 0 described, 2 no image, or a broken one.
    """
    now = datetime.now(UTC)
    with open_image(file) as opened:
        contents = opened.contents()
    if as_json:
        click.echo(json.dumps({"file": str(file), **image_as_json(contents, now)}))
    else:
        show_image(out, contents, now, whole=full)


@click.command()
@click.argument("file", type=ANY_FILE)
@click.option("--release", type=ANY_FILE, metavar="HISTORY", help="Hold it against a publisher's signed releases.")
@click.option("--key", type=PinnedKey(), help="With --release: the publisher's public key, ed25519:HEX.")
@click.option("--product", type=Product(), metavar="NAME", help="With --release: what the history is about.")
@click.option("--measurements", type=ANY_FILE, help="Hold it against what `nitro-cli build-enclave` printed, as JSON.")
@click.option("--policy", type=ANY_FILE, help="Hold it, and the configuration in it, against an appraisal policy.")
@json_option
def verify(
    file: Path,
    release: Path | None,
    key: PublicKey | None,
    product: str | None,
    measurements: Path | None,
    policy: Path | None,
    as_json: bool,
) -> int:
    """Verify an enclave image: that it is whole, and where a reference is given that it is the expected one.

    Asked is, in this order: structure and CRC; the signature, and that its certificate is valid now; that an x86_64
    kernel ends where its section does, so that nothing of the command line can stand behind it; that the command line
    is the copy that the init compares it with (n/a where there is none: the registers then fit any boundary before it);
    that all files in the ramdisks can be listed as Linux unpacks them, none of them twice, in no folder or behind a
    link; that the ramdisks of the application have cmd, env and rootfs alone, and nothing of what boots. Then the
    registers are held against a signed release history, measurements, or a policy.

    \b
    Examples:
      strongroom image verify enclave.eif
      strongroom image verify enclave.eif --release releases.jsonl --key ed25519:... --product assistant
      strongroom image verify enclave.eif --measurements measurements.json
      strongroom image verify enclave.eif --policy policy.toml --json

    Exit codes: 0 verified, 1 whole but not what was expected, 2 usage or a file that cannot be read, 3 broken, or a
    history that nothing vouches for.
    """
    wanted = Wanted.of(release=release, key=key, product=product, measurements=measurements, policy=policy)
    now = datetime.now(UTC)
    with _refused(), open_image(file, digest_file=release is not None) as opened:
        checks = check_image(opened.contents(), opened.file, wanted, now)
    image = opened.image
    code = max((check.exit_code for check in checks), default=0)
    if as_json:
        verdict = {0: "verified", 1: "not as expected", 3: "broken"}[code]
        body = {"file": str(file), "verdict": verdict, "checks": [check.as_json() for check in checks]}
        click.echo(json.dumps({**body, **image.as_nitro_cli()}))
        return code
    for check in checks:
        line = Text(f"{check.mark:<8}", check.style).append(
            f"{check.name}: {printable(shorten(check.said))}", "default"
        )
        out.print(line, soft_wrap=True)
    show_registers(out, image)
    title, style = {0: ("VERIFIED", "bold green"), 1: ("NOT AS EXPECTED", "bold red"), 3: ("BROKEN", "bold red")}[code]
    out.print(Text(title, style), soft_wrap=True)
    return code


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        offset = error.offset
        refused = RefusedImage(error.code, error.said, offset=offset, expected=error.expected, got=error.got)
        raise refused from error


@click.command()
@click.argument("before", type=ANY_FILE)
@click.argument("after", type=ANY_FILE)
@full_option
@json_option
def diff(before: Path, after: Path, full: bool, as_json: bool) -> int:
    """Say what differs in two enclave images, and so why their registers do.

    Section by section, and in each ramdisk file by file: added, removed, or changed in content, kind, mode, owner,
    time; and whether the same files come in another order, or are packed otherwise.

    \b
    Examples:
      strongroom image diff published.eif mine.eif
      strongroom image diff published.eif mine.eif --full --json

    Exit codes: 0 the same, 1 different, 2 no image, or a broken one.
    """
    found = compare(_contents(before), _contents(after))
    if as_json:
        click.echo(json.dumps({"before": str(before), "after": str(after), **difference_as_json(found)}))
    else:
        show_difference(out, found, whole=full)
    return 0 if found.is_empty else 1


def _contents(path: Path) -> ImageContents:
    try:
        with open_image(path) as opened:
            return opened.contents()
    except ImageError as error:
        raise error.of(str(path)) from error
