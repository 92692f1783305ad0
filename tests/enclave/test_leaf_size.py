"""A certificate that some TLS stack could not take is never served: the boot stops at it, in words."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from attestation.ratls import MAX_LEAF
from tests.demo.provision import provision
from tests.devtee.gpu import GpuForm
from tests.devtee.machine import Behaviour, Machine
from tests.devtee.nvml import GpuSystem
from tests.devtee.tee import DevTee
from tests.enclave.machine import EnclaveProcess, model_directory
from tests.enclave.support import NAME

GPUS = 8


class Talkative(DevTee):
    """GPUs whose reports hold *extra* more bytes each that do not compress; signed, and correct in all else."""

    extra = 0

    def gpu_report(self, nonce: bytes, index: int = 0, form: GpuForm | None = None) -> tuple[bytes, bytes]:
        more = ((240, random.Random(index).randbytes(self.extra)),)
        return super().gpu_report(nonce, index, replace(form or GpuForm(), extra_opaque=more))


@contextmanager
def booting(folder: Path, extra: int) -> Iterator[EnclaveProcess]:
    """An enclave that starts on a machine with eight such GPUs."""
    state, path = folder / "tee", folder / "s" / "e.sock"
    tee = Talkative(DevTee.create(state, gpus=GPUS).pki)
    tee.extra = extra
    stopped = threading.Event()
    with Machine(state, tee, Behaviour(gpu=GpuSystem(gpus=GPUS))) as machine:
        thread = threading.Thread(target=machine.run, args=(stopped.is_set,))
        thread.start()
        try:
            made = provision(
                folder / "made", state, model_directory(folder / "model"), None, "parrot", f"unix:{path}", NAME,
                gpus=GPUS,
            )  # fmt: skip
            with EnclaveProcess(made.config, state) as enclave:
                yield enclave
        finally:
            stopped.set()
            thread.join()


def test_boot_stops_above_thirty_kib_and_says_the_sizes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("z")
    with booting(folder, 3900) as enclave:
        assert enclave.wait(60) == 1, enclave.text
        (failed,) = [line for line in enclave.console if "FAILED" in line]
        assert failed.startswith("boot 9/12 certificate: FAILED: FORMAT_LEAF")
        assert f"at most {MAX_LEAF} bytes" in failed
    assert not (folder / "s" / "e.sock").exists()


def test_eight_gpus_of_the_usual_size_boot(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The positive control: the same machine with a little less to say."""
    with booting(tmp_path_factory.mktemp("y"), 500) as enclave:
        enclave.wait_for("enclave: listening on unix:", 60)
