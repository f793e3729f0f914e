"""``strongroom`` and ``python -m strongroom``: whether the front door can be opened at all, and then the front door."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from strongroom.extras import MissingExtra, require


def main() -> NoReturn:
    """Runs :func:`strongroom.cli.main`; without the ``cli`` extra it says so in one line and exits with 2."""
    try:
        require("the strongroom command", ["cli"])
    except MissingExtra as error:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": error.as_json()}))
        else:
            print(f"strongroom: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    from strongroom import cli  # it imports click

    cli.main()


if __name__ == "__main__":
    main()
