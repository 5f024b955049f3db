"""Folders that are whole or not there, and whose damage is noticed: a manifest with the hash of every file.

A folder is made beside its place under a hidden name, flushed to the disk
and renamed, so that neither a kill nor a power cut leaves half of it under its own name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A folder that is not as it was published; the message is one line that names the file."""


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into, which becomes `folder` when the block ends without an exception.

    Leftovers of a kill are removed. Raises FileExistsError if there is something at `folder`.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        yield hidden
        seal(hidden)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    os.replace(hidden, folder)
    _flush(folder.parent)


def seal(folder: Path) -> None:
    """Write the manifest of a folder and flush all of it to the disk."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    entries = {}
    for name, path in files.items():
        entries[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n")
    _flush(manifest)
    for path in sorted({folder, *(path.parent for path in files.values())}):
        _flush(path)


def check(folder: Path) -> None:
    """Read every file of a published folder. Raises Damaged for one that is missing, changed or not readable."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / MANIFEST} is missing or not readable") from error
    for name, entry in entries.items():
        path = folder / name
        try:
            size, digest = path.stat().st_size, _digest(path)
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes, {entry['bytes']} were written")
        if digest != entry["sha256"]:
            raise Damaged(f"{path} is not what was written: its sha256 differs")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
