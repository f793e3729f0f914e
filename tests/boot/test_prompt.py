"""One prompt's whole way, as a person types it: an image is built and measured, boots in the emulated machine, fetches
its weights over vsock, and answers who has verified it against the policy that was written from the image. A changed
byte in the image makes the same policy refuse.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import enclave.log
from attestation.eif import CRC_SIZE, HEADER
from tests.end_to_end.conftest import Home

MEMORY_GIB = "1.5"
CONTEXT = "256"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the operator and the client have before anything runs."""

    home: Home
    model: Path
    files: Path

    @property
    def configuration(self) -> Path:
        return self.files / "enclave.toml"

    @property
    def policy(self) -> Path:
        return self.files / "policy.toml"

    def start(self, image: Path, name: str) -> str:
        """Boots ``image`` until it serves; the address of a proxy before it."""
        options = ["--image", str(image), "--model", str(self.model), "--memory-gib", MEMORY_GIB, "--cpus", "2"]
        self.home.run("start", "--launcher", "qemu", "--name", name, *options)
        _, url = self.home.proxy(name)
        return url


@pytest.fixture(scope="module")
def prepared(home: Home, model: Path) -> Prepared:
    files = home.folder / "q"
    options = ["--model", str(model), "--directory", str(files), "--context", CONTEXT, "--threads", "2"]
    home.run("init", "--target", "qemu", *options)
    return Prepared(home, model, files)


@pytest.fixture(scope="module")
def image(prepared: Prepared, layout: Path, blobs: Sequence[str]) -> Path:
    image = prepared.files / "enclave.eif"
    built = prepared.home.json(
        *("image", "build", "--oci", str(layout), "--config", str(prepared.configuration), "--out", str(image)), *blobs
    )
    assert prepared.home.json("image", "measure", str(image)) == built
    prepared.home.run("image", "policy", str(image), "--output", str(prepared.policy))
    return image


def test_sixteen_tokens_from_a_machine_that_was_verified(prepared: Prepared, image: Path) -> None:
    home = prepared.home
    url = prepared.start(image, "boot")
    state = home.state("boot")
    assert (state["launcher"], state["network"], state["restarts"]) == ("qemu", "none", 0)
    verdict = home.json("verify", "--url", url, "--policy", str(prepared.policy))
    assert verdict["verdict"] == "accepted"
    asked = ["ask", "Name one planet.", "--url", url, "--policy", str(prepared.policy)]
    answer = home.json(*asked, "--max-tokens", "16", "--temperature", "0")
    assert (answer["usage"]["completion_tokens"], answer["finish_reason"]) == (16, "length")
    assert answer["text"].strip()
    events = [json.loads(line) for line in home.run("logs", "boot").stdout.splitlines()]
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases[-1] == "SERVING"
    home.run("stop", "boot")


def with_a_changed_byte(image: bytes) -> bytes:
    """``image`` with another letter in a comment of the enclave's code, and a CRC that says nothing of it."""
    assert enclave.log.__doc__ is not None
    changed = bytearray(image)
    changed[image.index(enclave.log.__doc__.encode())] ^= 0x20
    checked = HEADER.size - CRC_SIZE
    crc = zlib.crc32(changed[HEADER.size :], zlib.crc32(changed[:checked]))
    changed[checked : HEADER.size] = crc.to_bytes(CRC_SIZE, "big")
    return bytes(changed)


def test_a_changed_byte_in_the_image_is_refused(prepared: Prepared, image: Path) -> None:
    home = prepared.home
    changed = prepared.files / "changed.eif"
    changed.write_bytes(with_a_changed_byte(image.read_bytes()))
    url = prepared.start(changed, "changed")
    refused = home.json("verify", "--url", url, "--policy", str(prepared.policy), expect=1)
    assert refused["error"]["code"] == "wrong_image"
    home.run("stop", "changed")
