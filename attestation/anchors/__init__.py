"""Trust anchors that ship with the package: AWS's, and no other.

An emulator's root is made per user and never shipped.
"""

from __future__ import annotations

from importlib.resources import files

from attestation.chain import Anchor, Trust

AWS_NITRO_G1 = Anchor(Trust.AWS_NITRO_G1, files(__name__).joinpath("aws-nitro-root-g1.der").read_bytes())
"""AWS Nitro Enclaves Root G1; ``Anchor`` holds it to its published fingerprint when this module is loaded."""
