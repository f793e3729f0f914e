"""``wheels_digest.py FOLDER``: one digest over the wheels in a folder, of what an image can get of them.

SHA-256 over a line for each file in each wheel, as sha256sum writes them, sorted by the names of wheel and file. Left
out is what says in which temporary folder pip has built, and is in no image: ``RECORD`` and pkg-config's files. So
two compilations of the same have the same digest.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path


def digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith((".dist-info/RECORD", ".pc", "/")):
                    digest.update(f"{hashlib.sha256(archive.read(name)).hexdigest()}  {wheel.name}/{name}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    print(digest_of(Path(sys.argv[1])))
