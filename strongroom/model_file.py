"""The file of an encrypted model, from the file of a model: what ``strongroom model encrypt`` does on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Final

from attestation.envelope import EnvelopeHeader, EnvelopePurpose, Terms
from attestation.envelope_records import Sealer
from attestation.errors import StrongroomError
from attestation.gguf import ModelError
from attestation.manifest import ModelManifest, Progress
from attestation.secret import Secret
from strongroom.files import new_file

_PIECE: Final = 4 << 20


class ModelChanged(StrongroomError):
    """The model's file is not, or no longer, what its manifest describes (code ``model_changed``)."""

    exit_code = 2


def encrypt_model(
    source: Path,
    destination: Path,
    *,
    manifest: ModelManifest,
    header: EnvelopeHeader,
    configurations: Sequence[bytes],
    data_key: Secret,
    progress: Progress | None = None,
) -> None:
    """Writes ``destination``, which is not there yet: the GGUF file ``source`` in an envelope under ``data_key``, which
    ``header`` holds wrapped. The model of ``manifest`` may use it, under ``configurations`` (their digests).

    What is sealed is hashed on the way, and is the manifest's file or nothing. ``destination`` is written whole or
    not at all. ``progress`` is told how many bytes of ``source`` are done, and of how many.

    Raises ModelChanged, ModelError with ``unreadable_model``, EnvelopeError for a header or configurations that no
    envelope of a model can have, FileExistsError, OSError of ``destination``.
    """
    [weights] = manifest.files
    terms = Terms(EnvelopePurpose.MODEL, (manifest.digest(),), tuple(configurations))
    sealer = Sealer(header, terms, data_key)
    digest, done, piece = hashlib.sha384(), 0, memoryview(bytearray(_PIECE))
    with _opened(source) as file, new_file(destination) as target:
        # A file that grows is not read to its end, wherever that may be.
        while done <= weights.size and (count := _read(file, piece, source)):
            digest.update(piece[:count])
            done += count
            target.writelines(sealer.seal(piece[:count]))
            if progress is not None:
                progress(min(done, weights.size), weights.size)
        if (done, digest.digest()) != (weights.size, weights.sha384):
            raise ModelChanged(
                "model_changed",
                f"{source} is not what was hashed before: it changed meanwhile; nothing was written",
                expected=f"{weights.size} bytes, sha384:{weights.sha384.hex()}",
                got=f"{done} bytes, sha384:{digest.hexdigest()}" if done <= weights.size else "more bytes",
            )
        target.write(sealer.finish())


def _opened(source: Path) -> FileIO:
    try:
        return source.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(source, error) from error


def _read(file: FileIO, piece: memoryview, source: Path) -> int:
    """Bytes read into ``piece``; 0 at the end."""
    try:
        return file.readinto(piece)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Path, error: OSError) -> ModelError:
    return ModelError("unreadable_model", f"{source}: {error.strerror or type(error).__name__}")
