"""The record beside an image: what it was made from, by their digests, and how.

An in-toto Statement (version 1) with SLSA's provenance (version 1) as its predicate. It holds no time but
SOURCE_DATE_EPOCH, no path of this machine and no name of a person: the same inputs give the same record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from attestation.reference import PcrSet
from attestation.strict_json import Json
from parent.image.source import Material

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:strongroom:image-build:v1"
"""What the parameters mean: they are those of ``strongroom image build``, as its ``--help`` explains them."""
BUILDER: Final = "urn:strongroom:builder:local"
"""Whoever ran the command: nothing vouches for this record but who hands it on."""
SUFFIX: Final = ".provenance.json"
"""Behind the image's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecord:
    """One build."""

    name: str
    """Of the image's file."""
    digests: Mapping[str, str]
    """Of the image's file, hexadecimal by algorithm."""
    measurements: PcrSet
    parameters: Mapping[str, Json]
    """What the caller chose."""
    materials: Iterable[Material]
    """All that went in."""
    root: Material
    """The root file system that came of them."""
    tool_version: str

    def encode(self) -> bytes:
        """The statement as JSON, for people as well: indented, with a line feed at its end."""
        registers = {f"PCR{index}": value.hex() for index, value in self.measurements.as_registers().items()}
        subject: dict[str, Json] = {"name": self.name, "digest": dict(self.digests), "annotations": dict(registers)}
        statement: dict[str, Json] = {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": dict(self.parameters),
                    "resolvedDependencies": [_descriptor(material) for material in self.materials],
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": {"strongroom": self.tool_version}},
                    "byproducts": [_descriptor(self.root)],
                },
            },
        }
        return json.dumps(statement, indent=2, ensure_ascii=True).encode("ascii") + b"\n"


def _descriptor(material: Material) -> dict[str, Json]:
    """in-toto's ResourceDescriptor (version 1)."""
    descriptor: dict[str, Json] = {"name": material.name, "digest": dict(material.digest)}
    if material.annotations:
        descriptor["annotations"] = dict(material.annotations)
    return descriptor
