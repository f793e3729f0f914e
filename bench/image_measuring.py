"""Measuring an enclave image, against the hashes that measuring it takes and nothing else.

PCR0 and PCR2 have no prefix in common, so that two SHA-384 passes and a CRC-32 over all bytes are the limit. The peer
is just these, each on a thread of its own, over the same file in memory (mapped, and in the page cache), without
reading, parsing or building anything. Every run has a process of its own; the two take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from statistics import median
from typing import BinaryIO

from attestation.eif import CRC_AT, CRC_SIZE, HEADER, MAGIC, MAX_SECTIONS, SECTION_HEADER, SectionType
from attestation.measure import read_image
from bench import Row, peak_memory

MIB = 1 << 20
BLOCK = MIB
"""Bytes that the peer hashes at once."""
MIN_RATIO = 0.95
BUILD = ("BuildTime", "BuildTool", "BuildToolVersion", "OperatingSystem", "KernelVersion")
METADATA = {
    "ImageName": "bench",
    "ImageVersion": "1",
    "BuildMetadata": dict.fromkeys(BUILD, "bench"),
    "DockerInfo": {},
}


def rows(size: int = 512 * MIB, runs: int = 7) -> list[Row]:
    """Medians of ``runs`` of each kind over an image of about ``size`` bytes, and of the ratios, run by run (above 1 is
    faster).
    """
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as folder:
        path = Path(folder) / "bench.eif"
        with path.open("wb+") as file:
            _write(file, size)
        _run("peer", path)  # the file is in the page cache from here on
        pairs = [(_run("ours", path), _run("peer", path)) for _ in range(runs)]
        whole = path.stat().st_size / MIB
    ours, peer = (median(whole / result["seconds"] for result in kind) for kind in zip(*pairs, strict=True))
    ratio = median(bare["seconds"] / measured["seconds"] for measured, bare in pairs)
    peak, growth = (max(measured[name] for measured, _ in pairs) / MIB for name in ("peak", "growth"))
    return [
        Row(
            f"{whole:.0f} MiB of enclave image, measured",
            f"{ours:.0f} MiB/s; the process takes {peak:.0f} MiB, {growth:.0f} MiB more than before",
            f"{peer:.0f} MiB/s (two SHA-384 and a CRC-32 at once, over the same bytes)",
            f"{ratio:.2f}",
            f">= {MIN_RATIO}",
            ratio >= MIN_RATIO,
        )
    ]


def _write(file: BinaryIO, size: int) -> None:
    """An image as large as asked for, its ramdisks of a repeated block that no machine could compress."""
    block = os.urandom(MIB)
    application = size // MIB - 10
    parts = [
        (SectionType.KERNEL, [block] * 8),
        (SectionType.CMDLINE, [b"reboot=k panic=30 pci=off nomodules console=ttyS0"]),
        (SectionType.METADATA, [json.dumps(METADATA).encode()]),
        (SectionType.RAMDISK, [block]),
        (SectionType.RAMDISK, [block] * application),
    ]
    file.write(bytes(HEADER.size))
    offsets, sizes, crc = [0] * MAX_SECTIONS, [0] * MAX_SECTIONS, 0
    for index, (kind, pieces) in enumerate(parts):
        offsets[index], sizes[index] = file.tell(), sum(map(len, pieces))
        for piece in (SECTION_HEADER.pack(kind, 0, sizes[index]), *pieces):
            file.write(piece)
    header = HEADER.pack(MAGIC, 4, 0, 1 << 30, 2, 0, len(parts), *offsets, *sizes, 0, 0)[:CRC_AT]
    crc = zlib.crc32(header)
    file.seek(HEADER.size)
    while piece := file.read(MIB):
        crc = zlib.crc32(piece, crc)
    file.seek(0)
    file.write(header + crc.to_bytes(CRC_SIZE, "big"))


def _run(kind: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.image_measuring", "--role", kind, "--file", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _measure(kind: str, path: Path) -> dict[str, float]:
    before = peak_memory()
    begin = time.perf_counter()
    if kind == "ours":
        read_image(path)
    else:
        _hash(path)
    seconds, peak = time.perf_counter() - begin, peak_memory()
    return {"seconds": seconds, "peak": peak, "growth": peak - before}


def _hash(path: Path) -> None:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as view,
    ):

        def sha384() -> None:
            digest = hashlib.sha384()
            for start in range(0, len(view), BLOCK):
                digest.update(view[start : start + BLOCK])

        def crc32() -> None:
            crc = 0
            for start in range(0, len(view), BLOCK):
                crc = zlib.crc32(view[start : start + BLOCK], crc)

        threads = [threading.Thread(target=target) for target in (sha384, sha384, crc32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.image_measuring", description=__doc__)
    parser.add_argument("--size", type=int, default=512 * MIB, help="bytes of image, 11 MiB or more (default: 512 MiB)")
    parser.add_argument("--runs", type=int, default=7, help="runs of each kind (default: 7)")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is None:
        for row in rows(options.size, options.runs):
            print(row)
    else:
        print(json.dumps(_measure(options.role, options.file)))


if __name__ == "__main__":
    main()
