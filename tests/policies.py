"""Policies for properties: whatever can be built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.rules import ChannelBinding, DocumentBinding, Forbid, Ignore, Measures, Release, Released, Require
from tests.pki import forge

REGISTERS = st.binary(min_size=48, max_size=48).filter(any)
TEXTS = st.text(st.characters(min_codepoint=33, exclude_categories=("C", "Z")), min_size=1, max_size=40)
REASONS = st.builds(Ignore, TEXTS)
DIGESTS = st.builds(Require, st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=3).map(tuple))
RULES = REASONS | DIGESTS | st.just(Forbid()) | st.builds(Measures, st.lists(TEXTS, min_size=1, max_size=2).map(tuple))
FIELDS = (
    REASONS
    | st.just(Forbid())
    | st.builds(Require, st.lists(st.binary(min_size=1, max_size=1024), min_size=1, max_size=2).map(tuple))
)
NAMED = st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=2).map(tuple)
BINDINGS = st.just(ChannelBinding()) | st.builds(DocumentBinding, FIELDS, FIELDS)
PCR_SETS = st.builds(PcrSet, REGISTERS, REGISTERS, REGISTERS, st.none() | REGISTERS)


@st.composite
def policies(draw: st.DrawFn) -> AppraisalPolicy:
    """Any policy that names no file but its root, ``root.der``, which is the forged one."""
    names = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    images = [draw(PCR_SETS) for _ in names]
    images = [image for number, image in enumerate(images) if not any(map(image.is_ambiguous_beside, images[:number]))]
    signer = [8] if any(image.pcr8 is None for image in images) else []
    rules: Mapping[int, Any] = {
        **draw(st.dictionaries(st.sampled_from([5, 9, 18, 31]), RULES)),
        **{index: draw(RULES) for index in (3, 4, *signer)},
    }
    model, configuration = (draw(REASONS | DIGESTS | st.just(Released())) for _ in range(2))
    models, configurations = (draw(NAMED) if isinstance(rule, Released) else () for rule in (model, configuration))
    return AppraisalPolicy(
        anchor=draw(st.sampled_from([AWS_NITRO_G1, Anchor.emulated(forge.ROOT_DER)])),
        max_age_seconds=draw(st.integers(1, 86400)),
        leeway_seconds=draw(st.integers(0, 600)),
        accept_debug=draw(st.none() | TEXTS),
        binding=draw(BINDINGS),
        releases=tuple(
            Release(name, image, models, configurations) for name, image in zip(names, images, strict=False)
        ),
        model=model,
        configuration=configuration,
        pcrs=rules,
        module_id=draw(REASONS | st.builds(Require, st.lists(TEXTS, min_size=1, max_size=2).map(tuple))),
    )
