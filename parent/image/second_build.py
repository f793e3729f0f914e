"""The second build of ``image reproduce``: ``python -P -m parent.image.second_build USER:GROUP OPTIONS...``.

It becomes the other user only when it has imported all that it needs: an installation may be for its owner's eyes
alone, as the one is that ``scripts/setup`` makes. Nothing of it is read after that.
"""

from __future__ import annotations

import atexit  # noqa: F401  # tempfile imports it late
import json
import os
import sys
from collections.abc import Sequence

from attestation.errors import StrongroomError
from parent.image.build import build_image, tool_version
from parent.image.commands import build, take_plan
from parent.image.reproduce import SAME_USER
from parent.image.tree import ImageBuildError


def main(user: str, options: Sequence[str]) -> int:
    """Builds what ``options`` of ``image build`` say as ``user``, ``UID:GID`` or :data:`SAME_USER`. An error is printed
    as JSON; its exit code is returned.
    """
    given = dict(build.make_context("build", list(options)).params)
    plan, out = take_plan(given), given["out"]
    tool_version()
    if user != SAME_USER:
        become(*map(int, user.split(":")))
    try:
        build_image(plan, out, progress=lambda *_: None)
    except OSError as error:
        return _said(ImageBuildError("second_build_failed", str(error)))
    except StrongroomError as error:
        return _said(error)
    return 0


def become(user: int, group: int) -> None:
    """Root's rights are gone for good, with its groups."""
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def _said(error: StrongroomError) -> int:
    sys.stdout.write(json.dumps(error.as_json()))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
