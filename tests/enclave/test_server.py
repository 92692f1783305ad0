"""Where the enclave listens: its own place, or one clear line."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from attestation.errors import InputError
from enclave.server import address, bind
from enclave.settings import Listen


def unix(path: Path) -> Listen:
    return Listen("unix", path=path)


def test_socket_lies_in_a_private_directory(tmp_path: Path) -> None:
    with bind(unix(tmp_path / "s" / "e.sock")) as sock:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "s" / "e.sock").stat().st_mode) == 0o600
        assert address(unix(tmp_path / "s" / "e.sock"), sock) == f"unix:{tmp_path}/s/e.sock"


def test_open_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o755)
    with pytest.raises(InputError, match="INPUT_LISTEN_DIRECTORY") as refused:
        bind(unix(tmp_path / "s" / "e.sock"))
    assert "chmod 700" in refused.value.hint


def test_stale_socket_is_replaced_a_living_one_and_a_file_are_not(tmp_path: Path) -> None:
    path = tmp_path / "s" / "e.sock"
    bind(unix(path)).close()
    assert path.exists()
    with bind(unix(path)), pytest.raises(InputError, match="INPUT_LISTEN_BUSY"):
        bind(unix(path))
    path.unlink()
    path.write_text("notes")
    with pytest.raises(InputError, match="is not a socket"):
        bind(unix(path))
    assert path.read_text() == "notes"


def test_port_in_use_is_one_line_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError) as refused:
            bind(Listen("tcp", host="127.0.0.1", port=port))
    assert refused.value.code == "INPUT_LISTEN_BUSY" and refused.value.hint and "\n" not in str(refused.value)


def test_port_that_the_kernel_picked_is_told() -> None:
    listen = Listen("tcp", host="127.0.0.1", port=0)
    with bind(listen) as sock:
        assert address(listen, sock) == f"tcp:127.0.0.1:{sock.getsockname()[1]}"


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match="INPUT_LISTEN"):
        bind(Listen("tcp", host="192.0.2.1", port=1))
