"""The enclave's own image for benchmarks: from the root file system that ``Dockerfile.enclave`` makes, by the real
commands, which have a home of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attestation.eif import Architecture
from attestation.errors import StrongroomError
from bench import Row
from bench.house import model_file
from parent.image.blobs import OWN, BlobChoice, find_blobs
from parent.launch.qemu import Tools

LAYOUT: Final = "STRONGROOM_BOOT_LAYOUT"
"""The environment variable with the folder of the root file system's OCI layout, as for tests/boot."""
BLOBS: Final = BlobChoice(folder=OWN)
CONTEXT, THREADS = 256, 2


def lacking(*, machine: bool) -> str | None:
    """What is not there of all that an image takes, and an emulated ``machine`` for it; None where everything is."""
    layout = os.environ.get(LAYOUT)
    if not layout:
        made = "scripts/test-boot, as root on Debian, makes one in build/boot/layout"
        return f"{LAYOUT} names no root file system: {made}"
    if not (Path(layout) / "oci-layout").is_file():
        return f"{LAYOUT} is no OCI layout: scripts/test-boot makes one"
    try:
        find_blobs(BLOBS, Architecture.X86_64)
        if machine:
            Tools.find()
    except StrongroomError as error:
        return str(error)
    return None


def not_measured(what: str, reason: str) -> Row:
    return Row(what, "not measured", reason, bar="for the record")


@dataclass(frozen=True, slots=True)
class Home:
    """Where commands keep what is theirs. A short path: Unix sockets allow 107 bytes."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"STRONGROOM_HOME": str(self.folder)}

    def run(self, *arguments: str) -> Any:
        """What a strongroom command prints as JSON."""
        command = [sys.executable, "-m", "strongroom.cli", *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self.environment, check=True)
        return json.loads(done.stdout)

    def prepare(self, target: str) -> Path:
        """A folder with the ``enclave.toml`` of an enclave that runs in ``target``."""
        files = self.folder / target
        settings = ["--context", str(CONTEXT), "--threads", str(THREADS)]
        self.run("init", "--target", target, "--model", str(model_file()), "--directory", str(files), *settings)
        return files

    def build(self, files: Path) -> Path:
        """The image of a folder's configuration, in that folder."""
        image = files / "enclave.eif"
        configuration = ["--config", str(files / "enclave.toml")]
        self.run("image", "build", "--oci", os.environ[LAYOUT], "--blobs", OWN, *configuration, "--out", str(image))
        return image
