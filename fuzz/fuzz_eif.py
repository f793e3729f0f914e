"""An image of any content is measured, or is an ImageError; what is measured is what stands in the file."""

from __future__ import annotations

import hashlib
import io
import json
import zlib

from attestation.eif import (
    CRC_SIZE,
    HEADER,
    SECTION_HEADER,
    ImageError,
    SectionType,
    measurements_from_nitro_cli,
)
from attestation.measure import EnclaveImage, measure_image
from attestation.reference import once_extended
from tests.eif_files import Signer, image
from tests.pki.forge import NOW


def one_input(data: bytes) -> None:
    _measure(data)
    _measure(_with_its_crc(data))  # else no change would get past the CRC
    refused = ""
    try:
        measurements_from_nitro_cli(data)
    except ImageError as error:
        refused = str(error)
    assert refused.isprintable(), "an error that can move a terminal's cursor"


def _measure(data: bytes) -> None:
    try:
        image = measure_image(io.BytesIO(data), at=NOW)
    except ImageError as error:
        refused = str(error)
    else:
        refused = ""
        _hold(image, data)
    assert refused.isprintable(), "an error that can move a terminal's cursor"


def _hold(image: EnclaveImage, data: bytes) -> None:
    measured: dict[SectionType, list[bytes]] = {kind: [] for kind in SectionType}
    end = HEADER.size
    for section in image.sections:
        assert section.offset == end, "sections with something between"
        end += SECTION_HEADER.size + section.size
        measured[section.type].append(data[end - section.size : end])
    assert end == len(data), "bytes that belong to no section"
    [kernel], [cmdline], [first, *others] = (measured[kind] for kind in list(SectionType)[:3])
    boot, application = kernel + cmdline + first, b"".join(others)
    registers = image.measurements
    for value, content in ((registers.pcr0, boot + application), (registers.pcr1, boot), (registers.pcr2, application)):
        assert value == once_extended(hashlib.sha384(content).digest()), "a register over something else"
    assert image.cmdline.encode() == cmdline
    assert (image.signer is None) == (registers.pcr8 is None) == (not measured[SectionType.SIGNATURE])
    json.dumps(None if image.metadata is None else dict(image.metadata), ensure_ascii=False).encode()


def _with_its_crc(data: bytes) -> bytes:
    covered, body = data[: HEADER.size - CRC_SIZE], data[HEADER.size :]
    return covered + zlib.crc32(covered + body).to_bytes(CRC_SIZE, "big") + body


def seeds() -> list[bytes]:
    one, two = image(ramdisks=[b"all"]), image(ramdisks=[b"boot", b"rest"])
    images = [one, two, image(version=3), one.signed(), two.signed(Signer(name="x")), image(version=3).signed()]
    files = [made.encode() for made in images]
    return files + [json.dumps(measure_image(io.BytesIO(file)).as_nitro_cli()).encode() for file in files[2:4]]
