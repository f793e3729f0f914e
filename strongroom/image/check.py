"""What ``image verify`` asks of an enclave image, one question after the other, and all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

import click

from attestation.appraisal import registers_text
from attestation.eif import Architecture, ImageError
from attestation.errors import StrongroomError
from attestation.image_diff import ImageContents, ListedEntry
from attestation.image_files import (
    CONFIGURATION_PATH,
    ROOT_FILE_SYSTEM,
    ImageFileError,
    read_configuration,
)
from attestation.measure import EnclaveImage
from attestation.policy import AppraisalPolicy
from attestation.ramdisk import Kind, RamdiskError
from attestation.reference import PCR_SIGNER, PcrSet, configuration_digest, digest_text
from attestation.release_heads import HeadMemory
from attestation.release_signing import PublicKey, ReleaseError
from attestation.releases import MAX_HISTORY, ReleasedImage, ReleaseHistory
from attestation.rules import Forbid, Ignore, Measures, Release, Require, SignedReleases
from strongroom import reference_options as reference
from strongroom.files import read_bounded
from strongroom.image.report import kernel_text, signature_text
from strongroom.options import load_policy, user_heads
from strongroom.policy_text import Remark

MOVABLE: Final = "these registers fit any boundary between kernel and command line"
"""Where no init compares: who starts the image may cut off the beginning of the command line, and nothing shows it."""
CMDLINE_COPY: Final = "cmdline"
"""In ramdisk 0: the command line as it was built, for an init of ours to compare."""
APPLICATION: Final = "cmd", "env", ROOT_FILE_SYSTEM
"""What a ramdisk of the application has at the top: what it starts, in which environment, and what becomes its root."""
BROKEN, NOT_EXPECTED = 3, 1


class BrokenImage(StrongroomError):
    """An image that ``verify`` calls broken, and that no reference values are taken from: ``broken_image``."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """The answer to one question."""

    name: str
    said: str
    exit_code: int = 0
    """0 where it passed, or could not be asked; else 1 or 3."""
    is_asked: bool = True

    @property
    def mark(self) -> str:
        return "FAILED" if self.exit_code else "ok" if self.is_asked else "n/a"

    @property
    def style(self) -> str:
        return "bold red" if self.exit_code else "green" if self.is_asked else "dim"

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return {"name": self.name, "status": self.mark.lower(), "text": self.said}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an image is held against: at most one of a history, measurements, and a policy."""

    history: ReleaseHistory | None = None
    measurements: PcrSet | None = None
    policy: AppraisalPolicy | None = None

    @classmethod
    def of(
        cls,
        *,
        release: Path | None,
        key: PublicKey | None,
        product: str | None,
        measurements: Path | None,
        policy: Path | None,
    ) -> Wanted:
        """By the options. Raises click.UsageError; ReleaseError for a history that nothing vouches for; as reading a
        policy and measurements does.
        """
        if [release, measurements, policy].count(None) < 2:
            raise click.UsageError("name one of --release, --measurements and --policy")
        if (release is None) != (key is None) or (release is None) != (product is None):
            raise click.UsageError("--release, --key and --product go together")
        if release is not None and key is not None and product is not None:
            with user_heads() as heads:
                return cls(history=_history(release, key, product, heads))
        if measurements is not None:
            return cls(measurements=reference.measurements(measurements))
        if policy is None:
            return cls()
        accepted = load_policy(policy)
        if isinstance(accepted.releases, SignedReleases):
            leeway = timedelta(seconds=accepted.leeway_seconds)
            accepted.releases.history.require_in_force(datetime.now(UTC), leeway=leeway)
        return cls(policy=accepted)


def _history(path: Path, key: PublicKey, product: str, heads: HeadMemory) -> ReleaseHistory:
    data = read_bounded(path, MAX_HISTORY)
    try:
        head = heads.recall(key, product)
        verified = ReleaseHistory.verify(data, key=key, name=product, minimum_sequence=1, head=head)
        heads.remember(verified)
        verified.require_current(datetime.now(UTC))
    except ReleaseError as error:
        raise error.of(str(path)) from error
    return verified


def check_image(contents: ImageContents, file: BinaryIO, wanted: Wanted, at: datetime) -> list[ImageCheck]:
    """Every answer. ``contents`` is of ``file``, which was measured: of its structure nothing is left to ask.

    Raises ImageError ``changed_image``, OSError.
    """
    image = contents.image
    checks = _own_word(contents, at)
    if wanted.history is not None:
        checks.append(_by_history(image, wanted.history))
    if wanted.measurements is not None:
        checks.append(_by_registers(image, [Release("the measurements", wanted.measurements)]))
    if wanted.policy is not None:
        checks += _by_policy(image, file, wanted.policy)
    return checks


def require_sound(contents: ImageContents, at: datetime) -> list[Remark]:
    """That ``verify`` would not call the image broken: its registers would vouch for what nobody saw in it.

    Returns what to know of its registers all the same. Raises BrokenImage with all the answers that say so.
    """
    broken = [f"{check.name}: {check.said}" for check in _own_word(contents, at) if check.exit_code]
    if broken:
        message = f"the image is broken, and vouches for nothing: {'; '.join(broken)}"
        raise BrokenImage("broken_image", message, expected="an image that `strongroom image verify` accepts")
    if _copy(contents) is not None:
        return []
    return [Remark("movable_boundary", f"the image has no copy of its command line for the init: {MOVABLE}")]


def _own_word(contents: ImageContents, at: datetime) -> list[ImageCheck]:
    """The answers for which nothing but the image is needed."""
    image = contents.image
    return [
        ImageCheck("structure", f"EIF version {image.version}, {len(image.sections)} sections, the CRC is right"),
        _signature(image, at),
        _kernel(image),
        _cmdline(contents),
        _files(contents),
        _layout(contents),
    ]


def _signature(image: EnclaveImage, at: datetime) -> ImageCheck:
    signer = image.signer
    if signer is None:
        return ImageCheck("signature", "the image is not signed", is_asked=False)
    is_valid = signer.not_before <= at <= signer.not_after
    return ImageCheck("signature", signature_text(image, at), 0 if is_valid else BROKEN)


def _kernel(image: EnclaveImage) -> ImageCheck:
    try:
        image.require_boundary()
    except ImageError:
        return ImageCheck("kernel", kernel_text(image), BROKEN)
    return ImageCheck("kernel", kernel_text(image), is_asked=image.architecture is Architecture.X86_64)


def _cmdline(contents: ImageContents) -> ImageCheck:
    """Printable it is, since it was measured. An init of ours halts unless the copy in its ramdisk is the beginning."""
    text = contents.image.cmdline
    copy = _copy(contents)
    if copy is None:
        said = f"{len(text)} printable characters, and no copy for the init; {MOVABLE}: {text}"
        return ImageCheck("command line", said, is_asked=False)
    if copy.entry.kind is not Kind.FILE or copy.entry.links > 1:
        said = f"its copy in ramdisk0 is no file of its own, at which the init would halt: {text}"
        return ImageCheck("command line", said, BROKEN)
    if copy.sha384 != hashlib.sha384(text.encode()).digest():
        said = f"not the copy that is in ramdisk0 for the init, which would halt: {text}"
        return ImageCheck("command line", said, BROKEN)
    return ImageCheck("command line", f"{len(text)} printable characters, as the init will ask: {text}")


def _copy(contents: ImageContents) -> ListedEntry | None:
    return next((each for each in contents.ramdisks[0].entries if each.entry.path == CMDLINE_COPY), None)


def _files(contents: ImageContents) -> ImageCheck:
    for index, disk in enumerate(contents.ramdisks):
        if disk.problem is not None:
            return ImageCheck("files", f"ramdisk{index} cannot be listed: {disk.problem}", BROKEN)
    count = sum(len(disk.entries) for disk in contents.ramdisks)
    return ImageCheck("files", f"{count} entries in {len(contents.ramdisks)} ramdisks")


def _layout(contents: ImageContents) -> ImageCheck:
    """Linux unpacks the application's ramdisks over that of the boot: one that has an ``init`` would bring its own."""
    for index, disk in enumerate(contents.ramdisks[1:], 1):
        for path in (listed.entry.path for listed in disk.entries):
            if path and path.partition("/")[0] not in APPLICATION:
                outside = f"which takes effect outside of the application: {', '.join(APPLICATION)}"
                return ImageCheck("layout", f"ramdisk{index} has {ascii(path)[1:-1]}, {outside}", BROKEN)
    if any(disk.problem is not None for disk in contents.ramdisks):
        return ImageCheck("layout", "not judged: not everything can be listed", is_asked=False)
    return ImageCheck("layout", f"only {', '.join(APPLICATION)} over what ramdisk0 boots")


def _by_history(image: EnclaveImage, history: ReleaseHistory) -> ImageCheck:
    def is_meant(release: ReleasedImage) -> bool:
        return _has(image, release.pcrs) and release.image in (None, image.sha384)

    releases = history.current.releases
    for release in filter(is_meant, releases):
        return ImageCheck("release", f"{release.name}, signed by {history.key.key_id}")
    for release in releases:
        if _has(image, release.pcrs):
            assert release.image is not None  # else it would be meant
            stated = digest_text(release.image)
            said = f"the registers are those of {release.name}, and the file is another one than {stated}"
            return ImageCheck("release", said, NOT_EXPECTED)
    return _by_registers(image, [Release(release.name, release.pcrs) for release in releases])


def _by_registers(image: EnclaveImage, releases: list[Release]) -> ImageCheck:
    for release in releases:
        if _has(image, release.pcrs):
            return ImageCheck("release", release.name)
    expected = " or ".join(f"{each.name} ({registers_text(each.pcrs.as_registers())})" for each in releases)
    said = f"no release has these registers together; expected {expected or 'none, for all have been taken back'}"
    return ImageCheck("release", said, NOT_EXPECTED)


def _has(image: EnclaveImage, wanted: PcrSet) -> bool:
    registers = image.measurements.as_registers()
    return all(registers.get(index) == value for index, value in wanted.as_registers().items())


def _by_policy(image: EnclaveImage, file: BinaryIO, policy: AppraisalPolicy) -> Iterator[ImageCheck]:
    release = next((each for each in policy.accepted_releases if _has(image, each.pcrs)), None)
    yield _by_registers(image, list(policy.accepted_releases))
    if release is not None and release.pcrs.pcr8 is None:
        yield _by_signer(image, policy)
    try:
        digest = configuration_digest(read_configuration(image, file))
    except (ImageFileError, RamdiskError) as error:
        if error.code == "no_such_file":
            yield ImageCheck("configuration", f"not judged: {error.message} ({CONFIGURATION_PATH})", is_asked=False)
        else:
            yield ImageCheck("configuration", f"nobody can say what it will be: {error}", BROKEN)
        return
    if isinstance(policy.configuration, Ignore):
        yield ImageCheck("configuration", f"any is accepted: {policy.configuration.reason}", is_asked=False)
        return
    accepted = policy.accepted_configurations if release is None else policy.configurations_of(release)
    said = f"{digest_text(digest)}, {'accepted' if digest in accepted else 'which the policy does not accept'}"
    yield ImageCheck("configuration", said, 0 if digest in accepted else NOT_EXPECTED)


def _by_signer(image: EnclaveImage, policy: AppraisalPolicy) -> ImageCheck:
    """Where the release does not name PCR8, the policy's rule for it judges; without one it must be zero."""
    rule, pcr8 = policy.pcrs.get(PCR_SIGNER, Forbid()), image.measurements.pcr8
    match rule:
        case Ignore(reason=reason):
            return ImageCheck("signer", f"any is accepted: {reason}", is_asked=False)
        case Require() | Measures():
            is_meant, expected = pcr8 in rule.values, "PCR8 of the policy"
        case _:
            is_meant, expected = pcr8 is None, "an image that is not signed"
    got = "not signed" if pcr8 is None else f"PCR8 {pcr8.hex()}"
    return ImageCheck("signer", got if is_meant else f"{got}; expected {expected}", 0 if is_meant else NOT_EXPECTED)
