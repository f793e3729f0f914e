"""``oci_layout.py ROOT.tar FOLDER``: an OCI image layout with that one layer, and the digest of its manifest on
standard output (https://github.com/opencontainers/image-spec, image-layout.md). The layer is moved, not copied."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
KIND = "application/vnd.oci.image"


def write_layout(tar: Path, folder: Path) -> str:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def descriptor(kind: str, digest: str, size: int) -> dict[str, object]:
        return {"mediaType": f"{KIND}.{kind}", "digest": f"sha256:{digest}", "size": size}

    def add(kind: str, value: object) -> dict[str, object]:
        data = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return descriptor(kind, digest, len(data))

    with tar.open("rb") as file:
        layer = hashlib.file_digest(file, "sha256").hexdigest()
    size = tar.stat().st_size
    os.link(tar, blobs / layer)
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{layer}"]}
    config = add("config.v1+json", {"architecture": MACHINES[platform.machine()], "os": "linux", "rootfs": rootfs})
    layers = [descriptor("layer.v1.tar", layer, size)]
    kind = "manifest.v1+json"
    manifest = add(kind, {"schemaVersion": 2, "mediaType": f"{KIND}.{kind}", "config": config, "layers": layers})
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return str(manifest["digest"])


if __name__ == "__main__":
    print(write_layout(Path(sys.argv[1]), Path(sys.argv[2])))
