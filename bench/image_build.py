"""The enclave's own image: how long it takes to build from a root folder, and how large its parts are.

Building lists and hashes the folder, packs it into the image, and reads that again as everybody else will. The peer is
what does less: GNU tar of the same folder, with times and owners set, put on disk, and a SHA-384 of it. Every run has
a process of its own; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Final

from attestation.dependencies import APPLICATION_PACKAGES
from attestation.eif import SectionType
from attestation.measure import SectionReader, measure_image
from attestation.ramdisk import RamdiskReader
from bench import Row
from bench.image_house import BLOBS, Home, lacking, not_measured
from parent.image.build import ImagePlan, RootFolder, build_image

MIB = 1 << 20
MAX_UNPACKED: Final = 300_000_000
"""Bytes that an image without weights may come to."""
COMMAND = ("/usr/bin/python3", "-I", "-B", "-m", "enclave", "--config", "/etc/strongroom/enclave.toml")

PARTS: Final = (
    "kernel", "init", "Python", "shared libraries", "numpy", "llama.cpp", "cryptography", "botocore", "other packages",
    "our code", "others",
)  # fmt: skip
_PACKAGES: Final = {
    "numpy": "numpy",
    "llama_cpp": "llama.cpp",
    "cryptography": "cryptography",
    "botocore": "botocore",
    **dict.fromkeys(APPLICATION_PACKAGES, "our code"),
}
"""By the beginning of the name that is installed: a package's libraries and metadata are its own."""
_PACKAGE: Final = re.compile(r"rootfs/usr/(?:local/)?lib(?:64)?/python3[^/]*/(?:dist|site)-packages/([^/]+)")
_PYTHON: Final = re.compile(r"rootfs/usr/(?:local/)?(?:bin|lib|lib64)/(?:[^/]+/)?(?:lib)?python3")
_LIBRARY: Final = re.compile(r"rootfs/(?:usr/)?(?:local/)?lib.*\.so(?:\.[^/]*)?")


def rows(runs: int = 5) -> list[Row]:
    """Medians of ``runs`` of each kind, and of the ratios, run by run (below 1 is faster); then the sizes."""
    what = "the enclave's own image, built from a root folder; its size by part"
    if (reason := lacking(machine=False)) is not None:
        return [not_measured(what, reason)]
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as temporary:
        home, folder = Home(Path(temporary)), Path(temporary)
        image = home.build(home.prepare("qemu"))
        home.run("image", "extract", str(image), "--section", "files", "--output", str(folder / "files"))
        root = folder / "files" / "rootfs"
        _run("peer", root, folder / "peer")  # the files are in the page cache from here on
        pairs = [(_run("ours", root, folder / "ours"), _run("peer", root, folder / "peer")) for _ in range(runs)]
        sizes, file = sizes_of(image), image.stat().st_size
    return [_built(pairs, sum(sizes.values())), *size_rows(sizes, file)]


def _built(pairs: list[tuple[float, float]], size: int) -> Row:
    ours, peer = (median(side) for side in zip(*pairs, strict=True))
    rate, peer_rate = (size / MIB / seconds for seconds in (ours, peer))
    return Row(
        f"{size / MIB:.0f} MiB of enclave image, built from a root folder, and read again",
        f"{ours:.2f} s, {rate:.0f} MiB/s",
        f"{peer:.2f} s, {peer_rate:.0f} MiB/s (tar of the same folder, put on disk, and its SHA-384)",
        f"{median(built / packed for built, packed in pairs):.2f}",
        "for the record",
    )


# --- Sizes ------------------------------------------------------------------------------------------------------------


def size_rows(sizes: Mapping[str, int], file: int) -> list[Row]:
    """``sizes`` are bytes by part, ``file`` those of the image's file."""
    unpacked = sum(sizes.values())
    return [
        Row(
            "size of the enclave's image, unpacked, without weights",
            f"{unpacked / MIB:.1f} MiB",
            f"{file / MIB:.1f} MiB (the image's file)",
            "",
            f"< {MAX_UNPACKED / MIB:.0f} MiB (300 MB)",
            unpacked < MAX_UNPACKED,
        ),
        Row(
            "the same by part, in MiB",
            ", ".join(f"{part} {sizes[part] / MIB:.2f}" for part in PARTS),
            "",
            "",
            "for the record",
        ),
    ]


def sizes_of(image: Path) -> dict[str, int]:
    """Bytes of each part of an image: its kernel as it stands there, its files as they are unpacked."""
    sizes = Counter(dict.fromkeys(PARTS, 0))
    with image.open("rb") as file:
        for section in measure_image(file).sections:
            if section.type is SectionType.KERNEL:
                sizes["kernel"] += section.size
            elif section.type is SectionType.RAMDISK:
                data = SectionReader(file, section)
                for entry in RamdiskReader(data, section.size, offset=section.data_offset):
                    sizes[part_of(entry.path)] += entry.size
    return dict(sizes)


def part_of(path: str) -> str:
    """Which part of an image the file at ``path`` of its ramdisks belongs to."""
    if not path.startswith("rootfs/"):
        return "init"
    if (installed := _PACKAGE.match(path)) is not None:
        name = installed[1]
        return next((part for prefix, part in _PACKAGES.items() if name.startswith(prefix)), "other packages")
    if _PYTHON.match(path):
        return "Python"
    return "shared libraries" if _LIBRARY.fullmatch(path) else "others"


# --- Building ---------------------------------------------------------------------------------------------------------


def _run(kind: str, root: Path, out: Path) -> float:
    command = [sys.executable, "-m", "bench.image_build", "--role", kind, "--root", str(root), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    out.unlink()
    seconds: float = json.loads(done.stdout)
    return seconds


def _ours(root: Path, out: Path) -> None:
    plan = ImagePlan(source=RootFolder(root), blobs=BLOBS, cmd=COMMAND)
    build_image(plan, out, progress=lambda what, done, total: None)


def _peer(root: Path, out: Path) -> None:
    fixed = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]
    for command in (
        ["tar", "--create", "--file", str(out), *fixed, "--directory", str(root), "."],
        ["sync", str(out)],
        ["sha384sum", str(out)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.image_build", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--role", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is None:
        for row in rows(options.runs):
            print(row)
        return
    build = _ours if options.role == "ours" else _peer
    begun = time.perf_counter()
    build(options.root, options.out)
    print(json.dumps(time.perf_counter() - begun))


if __name__ == "__main__":
    main()
