"""``image extract``: the parts of an enclave image as files, or one file of its root file system."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

import click
from rich.text import Text

from attestation.image_files import copy_file
from attestation.ramdisk import MAX_UNPACKED
from strongroom.image.commands import OpenImage, open_image
from strongroom.image.files import Unpacked, new_folder, unpack, write_section
from strongroom.options import err, json_option, out
from strongroom.reference_options import ANY_FILE
from strongroom.render import printable

FILES: Final = "files"
IN_MEMORY: Final = 8 << 20
"""Bytes of a file that is held until it may be printed; of a larger one the rest is on disk."""
SUFFIXES: Final = {"metadata": ".json", "signature": ".cbor", "cmdline": ".txt"}


@click.command()
@click.argument("file", type=ANY_FILE)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="DIR", help="The folder, which must not be there yet."
)
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="NAME",
    help="kernel, cmdline, ramdisk0 and on, metadata, signature, or files: what the ramdisks hold; repeatable.  "
    "[default: all but files]",
)
@click.option("--file", "path", metavar="PATH", help="In place of a folder: print this file of the root file system.")
@click.option(
    "--max-size",
    type=click.IntRange(1, MAX_UNPACKED >> 30),
    default=16,
    show_default=True,
    metavar="GIB",
    help="Of all unpacked files together, or of the one that is printed.",
)
@click.option("--as-root", is_flag=True, help="Unpack devices, owners and set-user-id bits too; for root alone.")
@json_option
def extract(
    file: Path,
    output: Path | None,
    sections: tuple[str, ...],
    path: str | None,
    max_size: int,
    as_root: bool,
    as_json: bool,
) -> None:
    """Take an enclave image apart.

    The image is measured first, and what leaves it is what was measured. Nothing that is there is overwritten, and no
    path leads out of DIR, whatever the image's links say; devices are left out unless --as-root asks for them, which
    leaves DIR to root alone. DIR appears when everything is in it, or not at all.

    \b
    Examples:
      strongroom image extract enclave.eif --output parts
      strongroom image extract enclave.eif --output rootfs --section files
      strongroom image extract enclave.eif --file /etc/strongroom/enclave.toml

    Exit codes: 0 done, 2 no image, a broken one, or no such part.
    """
    if (output is None) == (path is None):
        raise click.UsageError("name one of --output and --file")
    if path is not None and (sections or as_root or as_json):
        raise click.UsageError("--file prints a file: --section, --as-root and --json are for --output")
    if as_root and os.geteuid() != 0:
        raise click.UsageError("--as-root is for root alone")
    with open_image(file) as opened:
        if path is not None:
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as content:  # until the ramdisks have been read to their end
                copy_file(opened.image, opened.file, path, content, limit=max_size << 30)
                content.seek(0)
                shutil.copyfileobj(content, sys.stdout.buffer)
            return
        assert output is not None  # as was asked above
        done = _extract(opened, output, _named(opened, sections), as_root=as_root, most=max_size << 30)
    if as_json:
        wrote = [str(each) for each in done.wrote]
        click.echo(json.dumps({"wrote": wrote, "entries": done.entries, "left_out": done.left_out}))
        return
    for each in done.wrote:
        out.print(Text(f"wrote {printable(str(each))}"), soft_wrap=True)
    if done.left_out:
        names = printable(", ".join(done.left_out[:5])) + (", ..." if len(done.left_out) > 5 else "")
        text = f"left out {len(done.left_out)} devices, pipes or sockets: {names}; root makes them with --as-root"
        err.print(Text(text, "yellow"), soft_wrap=True)


def _named(opened: OpenImage, sections: tuple[str, ...]) -> list[str]:
    there = [*opened.image.named_sections(), FILES]
    for name in sections:
        if name not in there:
            raise click.UsageError(f"this image has no {name}; it has {', '.join(there)}")
    return list(dict.fromkeys(sections)) or there[:-1]


def _extract(opened: OpenImage, output: Path, names: list[str], *, as_root: bool, most: int) -> Unpacked:
    done = Unpacked()
    is_private = as_root and FILES in names  # programs with set-user-id bits, and devices, are for nobody else
    with new_folder(output, mode=0o700 if is_private else 0o755) as folder:
        for name in names:
            if name != FILES:
                file_name = name + SUFFIXES.get(name, "")
                write_section(opened.file, opened.image.named_sections()[name], folder / file_name)
                done.wrote.append(output / file_name)
        if FILES in names:
            root = folder if names == [FILES] else folder / FILES
            root.mkdir(exist_ok=True)
            unpacked = unpack(opened.image, opened.file, root, as_root=as_root, most=most)
            done.entries, done.left_out = unpacked.entries, unpacked.left_out
            done.wrote.append(output if names == [FILES] else output / FILES)
    return done
