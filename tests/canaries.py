"""Searching for what must not be there: texts in any usual encoding, in memory too."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from pathlib import Path

MAX_REGION = 1 << 30


def encodings(text: str) -> dict[str, bytes]:
    """``text`` as it might lie in memory, on a wire or in a log."""
    plain = text.encode()
    found = {
        "utf-8": plain,
        "utf-16-le": text.encode("utf-16-le"),
        "utf-16-be": text.encode("utf-16-be"),
        "utf-32-le": text.encode("utf-32-le"),
        "latin-1": text.encode("latin-1", "ignore"),
        "hex": plain.hex().encode(),
        "HEX": plain.hex().upper().encode(),
        "json": json.dumps(text)[1:-1].encode(),
        "url": urllib.parse.quote(text).encode(),
        "form": urllib.parse.quote_plus(text).encode(),
        "reversed": plain[::-1],
    }
    for shift in range(3):
        # Within a longer text, base64 groups begin at any of three offsets; the first and last group mix with
        # neighbours.
        for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
            found[f"{name}+{shift}"] = encode(b"\0" * shift + plain)[4 : -4 or None].rstrip(b"=")
    return found


def where(texts: list[str], haystack: bytes) -> list[str]:
    return [f"{name} of {text!r}" for text in texts for name, needle in encodings(text).items() if needle in haystack]


def memory_of(pid: int) -> bytes:
    """What a core dump of the process would hold: every readable page. The kernel's own pages (vvar) are not readable
    and not the process's.
    """
    pages = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if match is None or line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            start, end = (int(bound, 16) for bound in match.groups())
            memory.seek(start)
            while start < end:
                data = memory.read(min(end - start, MAX_REGION))
                assert data, f"a readable page of {pid} could not be read"
                pages.append(data)
                start += len(data)
    return b"".join(pages)
