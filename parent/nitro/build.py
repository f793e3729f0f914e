"""An image by docker and nitro-cli, measured a second time by us: two readers of one file must agree on it."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from attestation.eif import measurements_from_nitro_cli
from attestation.measure import EnclaveImage, read_image
from attestation.reference import PcrSet
from parent.image.dockerfile import NO_BUILDKIT
from parent.nitro.cli import BUILD_SECONDS, NitroCli, last_of, to_stderr
from parent.nitro.errors import NitroError

MEASUREMENTS_SUFFIX: Final = ".measurements.json"
"""Appended to the image's name: what nitro-cli printed, in its own shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is built of what. Raises NitroError ``bad_request``."""

    dockerfile: Path
    context: Path
    output: Path
    tag: str = "strongroom-enclave"
    """Of the container image in docker."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Of the Dockerfile."""
    certificate: Path | None = None
    private_key: str | None = None
    """A file, or the ARN of a KMS key, which signs the image; with ``certificate``."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise NitroError("bad_request", "--sign and --certificate go together")

    def docker(self) -> list[str]:
        """The command that makes the container image."""
        given = [word for name, value in self.arguments.items() for word in ("--build-arg", f"{name}={value}")]
        return ["docker", "build", "--file", str(self.dockerfile), "--tag", self.tag, *given, str(self.context)]

    def nitro_cli(self, output: Path) -> list[str]:
        """The arguments of ``nitro-cli build-enclave``."""
        given = ["--docker-uri", self.tag, "--output-file", str(output)]
        if self.certificate is not None and self.private_key is not None:
            given += ["--signing-certificate", str(self.certificate), "--private-key", self.private_key]
        return given


async def build(wanted: Build, cli: NitroCli) -> EnclaveImage:
    """The image, at ``wanted.output``, with nitro-cli's measurements beside it. What was there stays until both are
    done.

    Raises NitroError, ``measurements_differ`` when nitro-cli says other registers than the file has; ImageError when
    one of both cannot be read.
    """
    await _docker(wanted.docker())
    output = wanted.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    # A folder that nobody else can write to: what is renamed is what was measured.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        made, measurements = Path(folder, "image"), Path(folder, "measurements")
        said = await cli.build(wanted.nitro_cli(made))
        claimed = measurements_from_nitro_cli(said)
        image = read_image(made)
        require_equal(claimed, image.measurements)
        measurements.write_text(json.dumps(image.as_nitro_cli(), indent=2) + "\n")
        made.replace(output)
        # Behind the image: where this is cut off, the old measurements do not fit it, and whoever compares says so.
        measurements.replace(output.with_name(output.name + MEASUREMENTS_SUFFIX))
    return image


def require_equal(claimed: PcrSet, measured: PcrSet) -> None:
    """Raises NitroError ``measurements_differ`` when nitro-cli claims other registers than the file has."""
    said, ours = claimed.as_registers(), measured.as_registers()
    for index in sorted(said.keys() | ours.keys()):
        if said.get(index) != ours.get(index):
            one, other = (each[index].hex() if index in each else "none" for each in (ours, said))
            raise NitroError(
                "measurements_differ",
                "nitro-cli measured another image than it wrote: believe neither, and build anew",
                expected=f"PCR{index} {one}, which is the file's",
                got=other,
            )


async def _docker(command: Sequence[str]) -> None:
    """What docker says goes to standard error, both of its outputs: standard output is for results."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=null, stdout=2, stderr=pipe, env=environment)
    except (FileNotFoundError, PermissionError) as error:
        raise NitroError(
            "docker_failed", "docker cannot be run here", expected="docker on PATH", got=error.strerror
        ) from error
    assert process.stderr is not None
    try:
        async with asyncio.timeout(BUILD_SECONDS):
            said = await last_of(process.stderr, to_stderr)
            status = await process.wait()
    except TimeoutError:
        expected = f"<= {BUILD_SECONDS:g} s"
        raise NitroError("docker_failed", "docker did not end in time and was ended", expected=expected) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status and any(words in said for words in NO_BUILDKIT):
        message = "docker has no BuildKit here: install its buildx, or build with `strongroom image build`"
        raise NitroError("docker_failed", message, expected="docker with BuildKit", got="without")
    if status:
        raise NitroError("docker_failed", "docker could not build the image; it says why above", got=f"exit {status}")
