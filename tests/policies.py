"""Policies for properties: whatever can be built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor
from attestation.envelope import MAX_VERSION, EnvelopePurpose
from attestation.keypolicy.document import KeyArn
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.rules import (
    ChannelBinding,
    DocumentBinding,
    Forbid,
    Ignore,
    KeyRule,
    Measures,
    Release,
    Released,
    Require,
    WrappedKeyFile,
)
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
KEYS = st.builds(
    KeyArn,
    st.sampled_from(["aws", "aws-cn", "aws-us-gov"]),
    st.sampled_from(["us-east-1", "us-gov-west-1", "ap-southeast-2"]),
    st.from_regex(r"[0-9]{12}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9-]{1,128}", fullmatch=True),
)
PRINCIPALS = st.from_regex(
    r"arn:aws(-cn)?:(iam|sts)::[0-9]{12}:(role|user|assumed-role)/[!-)+->@-~]{1,40}", fullmatch=True
)
ABSENT_FILES = st.from_regex(r"absent-[a-z]{1,20}", fullmatch=True).map(lambda name: WrappedKeyFile(name, None))


def key_rules(key: KeyArn, purpose: EnvelopePurpose) -> st.SearchStrategy[KeyRule]:
    """Any rule for this key; a model's wrapped key is ignored, or not there yet."""
    return st.builds(
        KeyRule,
        st.just(key),
        st.from_regex(r"[a-z0-9._-]{1,64}", fullmatch=True),
        st.integers(1, MAX_VERSION),
        st.lists(PRINCIPALS, max_size=3, unique=True).map(tuple),
        REASONS | ABSENT_FILES if purpose is EnvelopePurpose.MODEL else st.none(),
    )


@st.composite
def policies(draw: st.DrawFn) -> AppraisalPolicy:
    """Any policy that names no file but its root, ``root.der``, which is the forged one; its wrapped key may be named
    and absent.
    """
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
    binding = draw(BINDINGS)
    kms: dict[EnvelopePurpose, KeyRule] = {}
    if isinstance(binding, ChannelBinding) and not isinstance(model, Ignore) and not isinstance(configuration, Ignore):
        purposes = draw(st.lists(st.sampled_from(EnvelopePurpose), unique=True))
        keys = draw(st.lists(KEYS, min_size=len(purposes), max_size=len(purposes), unique=True))
        kms = {purpose: draw(key_rules(key, purpose)) for purpose, key in zip(purposes, keys, strict=True)}
    return AppraisalPolicy(
        anchor=draw(st.sampled_from([AWS_NITRO_G1, Anchor.emulated(forge.ROOT_DER)])),
        max_age_seconds=draw(st.integers(1, 86400)),
        leeway_seconds=draw(st.integers(0, 600)),
        accept_debug=draw(st.none() | TEXTS),
        binding=binding,
        releases=tuple(
            Release(name, image, models, configurations) for name, image in zip(names, images, strict=False)
        ),
        model=model,
        configuration=configuration,
        pcrs=rules,
        module_id=draw(REASONS | st.builds(Require, st.lists(TEXTS, min_size=1, max_size=2).map(tuple))),
        kms=kms,
    )
