"""What a model directory holds, as one digest: the manifest's `fileListDigest`, the claim `models[].weights`.

digest = SHA-256 of JCS (RFC 8785) `[[path, size, sha256], …]`, sorted by path; paths relative with `/`, sizes in
bytes, digests in lower-case hex. Runs in the enclave before the engine reads a byte, and wherever a release manifest
is written. It trusts nobody: the disk may be the host's, so links, devices and absurd counts are refused.

Holding the digest proves what the files were while they were read. On a writable disk they can change afterwards:
production mounts weights read-only under dm-verity (`verity-sha256:`), where that cannot happen.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

import rfc8785

from attestation.errors import InputError

__all__ = ["file_list", "file_list_digest"]

MAX_FILES: Final = 4096
MAX_DEPTH: Final = 8
MAX_BYTES: Final = 4 * 1024**4  # no model is larger; a sparse file of the host's must not keep the boot busy for ever

_CHUNK: Final = 1 << 20


def file_list_digest(directory: Path) -> str:
    """`sha256:<hex>` of *directory*. Raises `InputError` for what `file_list` refuses."""
    return f"sha256:{hashlib.sha256(rfc8785.dumps(file_list(directory))).hexdigest()}"


def file_list(directory: Path) -> list[list[str | int]]:
    """`[[path, size, sha256 hex], …]` of *directory*, sorted by path (code points).

    Raises `InputError` for a missing directory, a symbolic link, anything but plain files and directories, a name
    that is not UTF-8, an empty directory, and more than `MAX_FILES` files."""
    if not directory.is_dir():
        raise _refuse(directory, "is not a directory")
    rows: list[list[str | int]] = []
    total = 0
    for path in _walk(directory, directory, 0, []):
        size, digest = _hash(path)
        total += size
        if total > MAX_BYTES:
            raise _refuse(directory, f"holds more than {MAX_BYTES} bytes")
        rows.append([path.relative_to(directory).as_posix(), size, digest])
    if not rows:
        raise _refuse(directory, "holds no file")
    return sorted(rows, key=lambda row: str(row[0]))


def _walk(root: Path, folder: Path, depth: int, found: list[Path]) -> list[Path]:
    if depth > MAX_DEPTH:
        raise _refuse(root, f"is deeper than {MAX_DEPTH} folders")
    for entry in sorted(folder.iterdir()):
        try:
            str(entry).encode("utf-8")
        except UnicodeEncodeError:
            raise _refuse(root, "holds a name that is not UTF-8") from None
        mode = entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            _walk(root, entry, depth + 1, found)
        elif stat.S_ISREG(mode):
            found.append(entry)
        else:
            raise _refuse(entry, "is neither a plain file nor a directory", "copy links into place: cp -rL")
        if len(found) > MAX_FILES:
            raise _refuse(root, f"holds more than {MAX_FILES} files")
    return found


def _hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a plain file; the size is what was read, not what the directory said."""
    try:
        # O_NOFOLLOW: the file may have become a link since it was listed.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise _refuse(path, f"cannot be read: {err.strerror}") from err
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _refuse(path, "is not a plain file any more")
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _refuse(path: Path, reason: str, hint: str = "") -> InputError:
    return InputError("INPUT_WEIGHTS", f"{path} {reason}", hint=hint)
