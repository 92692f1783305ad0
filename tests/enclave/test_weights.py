"""The digest of a model directory, and what a host may not put there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from attestation.errors import InputError
from enclave import weights
from enclave.weights import file_list, file_list_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "b").write_bytes(b"bb")
    (folder / "a").write_bytes(b"")
    (folder / "sub" / "ä").write_bytes(b"x" * 3_000_000)
    return folder


def test_digest_is_sha256_of_the_canonical_list(model: Path) -> None:
    rows = [[name, size, hashlib.sha256(data).hexdigest()] for name, size, data in
            (("a", 0, b""), ("b", 2, b"bb"), ("sub/ä", 3_000_000, b"x" * 3_000_000))]  # fmt: skip
    assert file_list(model) == rows
    written = "[" + ",".join(f'["{n}",{s},"{d}"]' for n, s, d in rows) + "]"  # JCS, by hand
    assert file_list_digest(model) == "sha256:" + hashlib.sha256(written.encode()).hexdigest()


@pytest.mark.parametrize("change", ["content", "name", "added", "removed"])
def test_any_change_changes_the_digest(model: Path, change: str) -> None:
    before = file_list_digest(model)
    match change:
        case "content":
            (model / "b").write_bytes(b"bc")
        case "name":
            (model / "b").rename(model / "c")
        case "added":
            (model / "z").touch()
        case "removed":
            (model / "a").unlink()
    assert file_list_digest(model) != before


@pytest.mark.parametrize("kind", ["link", "folder-link", "fifo", "missing", "empty", "deep", "name"])
def test_what_is_no_plain_file_is_refused(model: Path, kind: str) -> None:
    target = model
    match kind:
        case "link":
            (model / "l").symlink_to("b")
        case "folder-link":
            (model / "l").symlink_to("/etc")
        case "fifo":
            os.mkfifo(model / "pipe")
        case "missing":
            target = model / "nowhere"
        case "empty":
            target = model / "none"
            target.mkdir()
        case "deep":
            (model / "/".join("d" * 10)).mkdir(parents=True)
        case "name":
            Path(os.fsdecode(os.fsencode(model) + b"/\xff")).touch()
    with pytest.raises(InputError, match="INPUT_WEIGHTS"):
        file_list_digest(target)


def test_number_of_files_is_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_FILES", 2)
    with pytest.raises(InputError, match="more than 2 files"):
        file_list_digest(model)
