"""The command line of `vouchsafe-host`: two lines for every mistake, the right exit status, never a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from host.cli import main
from tests.host.harness import Backend, RelayProcess, dial, receive
from tests.host.hellos import hello

GOOD = ["relay", "--listen", "tcp:127.0.0.1:0", "--default", "unix:/run/x.sock"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit status and the error line of a command that must fail in exactly two lines."""
    status = main(list(argv))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return status, lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        [], ["agent"], ["launch"], ["relay"], ["relay", "--listen", "tcp:127.0.0.1:0"],
        [*GOOD, "--unknown"], [*GOOD, "extra"],
        [*GOOD, "--listen", "127.0.0.1:1"], [*GOOD, "--route", "a.test"], [*GOOD, "--route", "a.test=x:y"],
        [*GOOD, "--default", "tcp:h:0"], [*GOOD, "--hello-timeout", "soon"], [*GOOD, "--hello-timeout", "-1"],
        [*GOOD, "--max-connections", "0"], [*GOOD, "--max-per-source", "0"], [*GOOD, "--quie"],
        [*GOOD, "--route", "a.test=unix:/a", "--route", "a.test=unix:/b"],
    ],
)  # fmt: skip
def test_command_line_that_means_nothing_is_status_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert refused(capsys, *argv)[0] == 2


def test_port_in_use_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with Backend("tcp:127.0.0.1:0") as taken:
        status, line = refused(capsys, "relay", "--listen", taken.address, "--default", "unix:/run/x.sock")
    assert (status, "address in use" in line) == (1, True)


def test_missing_directory_is_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/none/l.sock"
    status, line = refused(capsys, "relay", "--listen", listen, "--default", "unix:/run/x.sock")
    assert (status, "no directory" in line) == (1, True)


def test_address_of_another_machine_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refused(capsys, "relay", "--listen", "tcp:192.0.2.1:0", "--default", "unix:/run/x.sock")
    assert (status, "no such address" in line) == (1, True)


def test_backend_that_has_no_address_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["relay", "--listen", "tcp:127.0.0.1:0", "--default", "tcp:no-such-host.invalid:1"]
    assert refused(capsys, *argv) == (1, "error: tcp:no-such-host.invalid:1: no such host")


def test_more_connections_than_descriptors_is_status_1() -> None:
    command = f"ulimit -n 1024; exec {sys.executable} -m host.cli {' '.join(GOOD)} --max-connections 1000"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: 1000 connections need 2576 descriptors, the limit is 1024")
    assert len(done.stderr.splitlines()) == 2


def test_listening_socket_of_a_live_program_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Backend(f"unix:{tmp_path}/l.sock") as live:
        status, line = refused(capsys, "relay", "--listen", live.address, "--default", "unix:/run/x.sock")
        assert (status, "another program is listening" in line) == (1, True)
        dial(live.address).close()


def test_file_that_is_no_socket_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "l.sock").write_text("precious")
    listen = f"unix:{tmp_path}/l.sock"
    status, _ = refused(capsys, "relay", "--listen", listen, "--default", "unix:/run/x.sock")
    assert (status, (tmp_path / "l.sock").read_text()) == (1, "precious")


def test_first_listener_is_given_back_when_the_second_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--listen", f"unix:{tmp_path}/l.sock", "--listen", f"unix:{tmp_path}/none/l.sock"]
    assert refused(capsys, "relay", *argv, "--default", "unix:/run/x.sock")[0] == 1
    assert not (tmp_path / "l.sock").exists()


def test_stale_socket_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "l.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with RelayProcess(tmp_path, "--default", "unix:/run/x.sock", listen=f"unix:{path}") as relay:
        dial(relay.address).close()
        assert relay.stop() == 0
    assert not path.exists()


def test_socket_that_somebody_else_put_there_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "l.sock"
    with RelayProcess(tmp_path, "--default", "unix:/run/x.sock", listen=f"unix:{path}") as relay:
        path.unlink()
        with Backend(f"unix:{path}"):
            assert relay.stop() == 0
            assert path.exists()


def test_relay_listens_on_several_addresses(tmp_path: Path) -> None:
    with Backend("tcp:127.0.0.1:0") as backend:
        options = ["--default", backend.address, "--listen", f"unix:{tmp_path}/l.sock"]
        with RelayProcess(tmp_path, *options) as relay:
            for address in (relay.address, f"unix:{tmp_path}/l.sock"):
                with dial(address) as client:
                    client.sendall(hello())
                    with backend.accept() as server:
                        server.sendall(b"x")
                        assert receive(client, 1) == b"x"


def test_help_needs_no_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["relay", "--help"])
    assert left.value.code == 0
    assert "--route" in capsys.readouterr().out


def test_relay_process_loads_no_tls_no_cryptography_and_no_other_zone() -> None:
    """In a fresh process that has really relayed: nothing it could open a stream with is in its memory."""
    program = """
import os, socket, sys, threading
from host.cli import main
def client():
    import time
    for _ in range(500):
        try:
            with socket.socket(socket.AF_UNIX) as c:
                c.connect(sys.argv[1]); c.sendall(b"GET /"); c.recv(1)
            break
        except OSError:
            time.sleep(0.01)
    os.kill(os.getpid(), 15)
threading.Thread(target=client).start()
status = main(["relay", "--listen", "unix:" + sys.argv[1], "--default", "unix:/nobody"])
print(status, *sorted(sys.modules))
"""
    path = f"/tmp/vouchsafe-test-{os.getpid()}.sock"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, path], capture_output=True, text=True, timeout=30, check=True
    )
    status, *modules = done.stdout.splitlines()[-1].split()
    assert status == "0"
    assert "reason=not-tls" in done.stderr
    assert "host.relay" in modules  # the list is the relay's
    forbidden = {
        "ssl",
        "_ssl",
        "hashlib",
        "_hashlib",
        "asyncio",
        "cryptography",
        "OpenSSL",
        "grpc",
        "attestation",
        "enclave",
    }
    assert forbidden.isdisjoint({m.partition(".")[0] for m in modules}), sorted(modules)


def test_closed_standard_streams_do_not_become_connections(tmp_path: Path) -> None:
    with Backend("tcp:127.0.0.1:0") as backend:
        command = [sys.executable, "-m", "host.cli", "relay", "--default", backend.address]
        listen = f"unix:{tmp_path}/l.sock"
        process = subprocess.Popen(["bash", "-c", 'exec "$@" 0>&- 1>&- 2>&-', "-", *command, "--listen", listen])
        try:
            for _ in range(500):
                if (tmp_path / "l.sock").exists():
                    break
                assert process.poll() is None
                time.sleep(0.01)
            targets = [str(Path(f"/proc/{process.pid}/fd/{fd}").readlink()) for fd in range(3)]
            assert targets == ["/dev/null"] * 3
        finally:
            process.kill()
            process.wait()
