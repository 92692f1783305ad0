"""The production attester on directories shaped like the kernel's, with a thread that plays kernel and host.

The kernel part is honest in shape: attributes appear after mkdir, a write to inblob moves `generation`, outblob blocks
until the quote is there. The host part can lie, be slow, or be silent.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from attestation.attester import AttesterError, TeeAttester
from attestation.attester import tdx as module
from attestation.attester.tdx import TdxAttester
from attestation.tdx import EventLog, Quote, append_records
from attestation.tdx.events import extend
from tests.attestation.tdx.dev import tee
from tests.devtee.eventlog import boot_events, ccel_log, ccel_table

ASKED = bytes(range(64))


@dataclass
class Kernel:
    """What the thread does. `answer` maps report data to what comes out of outblob; None is silence."""

    root: Path
    answer: Callable[[bytes], bytes | None] = lambda data: tee().quote(data)
    provider: str = "tdx_guest\n"
    step: int = 1
    """How far `generation` moves at each write."""
    attributes: bool = True
    extends: bool = True
    late: int = 0
    """How far `generation` moves once more, just before the answer."""
    asked: list[bytes] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tsm, self.rtmr, self.acpi = self.root / "tsm", self.root / "rtmr", self.root / "acpi"
        self.tsm.mkdir()
        self.rtmr.mkdir()
        (self.acpi / "data").mkdir(parents=True)
        self.registers = [bytes([i]) * 48 for i in range(4)]
        for i, value in enumerate(self.registers):
            (self.rtmr / f"rtmr{i}:sha384").write_bytes(value)
        (self.acpi / "CCEL").write_bytes(ccel_table())
        (self.acpi / "data" / "CCEL").write_bytes(ccel_log(boot_events()))
        self.stopped = threading.Event()
        self._seen: dict[str, int] = {}
        self._owed: dict[str, bytes] = {}

    def run(self) -> None:
        while not self.stopped.wait(0.003):
            for entry in self.tsm.iterdir():
                with suppress(FileNotFoundError):
                    self.serve(entry)
            file = self.rtmr / "rtmr3:sha384"
            if self.extends and (written := file.read_bytes()) != self.registers[3] and len(written) == 48:
                self.registers[3] = extend(self.registers[3], written)
                with file.open("r+b") as handle:
                    handle.write(self.registers[3])

    def serve(self, entry: Path) -> None:
        if entry.name not in self._seen:
            if not self.attributes:
                return
            self._seen[entry.name] = 0
            self.entries.append(entry.name)
            os.mkfifo(entry / "outblob")
            (entry / "generation").write_text("0\n")
            (entry / "provider").write_text(self.provider)
            (entry / "new").write_bytes(b"")
            os.utime(entry / "new", ns=(1, 1))
            (entry / "new").rename(entry / "inblob")  # last: whoever sees inblob sees the others
            return
        inblob = entry / "inblob"
        if inblob.stat().st_mtime_ns != 1 and inblob.stat().st_size:
            os.utime(inblob, ns=(1, 1))  # before reading: a later write is another request
            data = inblob.read_bytes()
            self.asked.append(data)
            self._seen[entry.name] += self.step
            (entry / "generation.new").write_text(f"{self._seen[entry.name]}\n")
            (entry / "generation.new").replace(entry / "generation")
            self._owed.pop(entry.name, None)
            if (answer := self.answer(data)) is not None:
                self._owed[entry.name] = answer
        if entry.name in self._owed:
            with suppress(OSError):  # ENXIO: nobody reads yet
                handle = os.open(entry / "outblob", os.O_WRONLY | os.O_NONBLOCK)
                if self.late:
                    self._seen[entry.name] += self.late
                    (entry / "generation").write_text(f"{self._seen[entry.name]}\n")
                with suppress(BrokenPipeError):
                    os.write(handle, self._owed.pop(entry.name))
                os.close(handle)


@contextmanager
def running(kernel: Kernel, *, quote_wait: float = 5.0) -> Iterator[TdxAttester]:
    thread = threading.Thread(target=kernel.run)
    thread.start()
    attester = TdxAttester(kernel.tsm, kernel.rtmr, kernel.acpi, quote_wait=quote_wait)
    try:
        yield attester
    finally:
        attester.close()
        kernel.stopped.set()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTRIBUTE_WAIT", 0.2)
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.01)


def refused(kernel: Kernel, ask: Callable[[TdxAttester], object], *, quote_wait: float = 5.0) -> AttesterError:
    with running(kernel, quote_wait=quote_wait) as attester, pytest.raises(AttesterError) as caught:
        ask(attester)
    return caught.value


def test_attester_is_what_the_enclave_asks_for(kernel: Kernel) -> None:
    attester: TeeAttester = TdxAttester(kernel.tsm, kernel.rtmr, kernel.acpi)
    attester.close()


def test_quote_holds_what_was_asked(kernel: Kernel) -> None:
    with running(kernel) as attester:
        for data in (ASKED, bytes(64), ASKED, ASKED):
            assert Quote.parse(attester.quote(data)).body.report_data == data
    assert kernel.asked == [ASKED, bytes(64), ASKED, ASKED]


def test_one_entry_serves_the_whole_process_under_a_random_name(kernel: Kernel, tmp_path: Path) -> None:
    with running(kernel) as attester:
        attester.quote(ASKED)
        attester.quote(ASKED)
    assert len(kernel.entries) == 1
    (tmp_path / "second").mkdir()
    second = Kernel(tmp_path / "second")
    with running(second) as attester:
        attester.quote(ASKED)
    assert second.entries != kernel.entries


@pytest.mark.parametrize("padding", [0, 70, 3000])
def test_platform_padding_is_cut(kernel: Kernel, padding: int) -> None:
    kernel.answer = lambda data: tee().quote(data) + bytes(padding)
    with running(kernel) as attester:
        quote = attester.quote(ASKED)
    assert Quote.parse(quote).raw == quote


def test_requests_of_many_threads_are_serialised_and_each_gets_its_own_quote(kernel: Kernel) -> None:
    got: dict[int, bytes] = {}
    with running(kernel, quote_wait=20) as attester:

        def ask(i: int) -> None:
            got[i] = Quote.parse(attester.quote(bytes([i]) * 64)).body.report_data

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert got == {i: bytes([i]) * 64 for i in range(8)}
    assert len(kernel.entries) == 1 and sorted(kernel.asked) == [bytes([i]) * 64 for i in range(8)]


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_report_data_of_another_length_is_never_sent(kernel: Kernel, size: int) -> None:
    assert refused(kernel, lambda a: a.quote(bytes(size))).code == "ATTESTER_REPORT_DATA"
    assert not kernel.asked and not kernel.entries


@pytest.mark.parametrize("provider", ["sev_guest\n", "azure\n", "", "tdx_guest2\n", "\xff\n"])
def test_another_quote_provider_is_refused_and_azure_is_named(kernel: Kernel, provider: str) -> None:
    kernel.provider = provider
    error = refused(kernel, lambda a: a.quote(ASKED))
    assert error.code == "ATTESTER_PROVIDER" and "Azure" in error.hint
    assert not kernel.asked


def test_firmware_tables_of_azure_are_refused_by_name(kernel: Kernel) -> None:
    table = bytearray(ccel_table())
    table[10:16] = b"VRTUAL"
    (kernel.acpi / "CCEL").write_bytes(table)
    error = refused(kernel, lambda a: a.event_log())
    assert error.code == "ATTESTER_PROVIDER" and "Azure" in error.hint


@pytest.mark.usefixtures("short_waits")
def test_another_writer_on_the_entry_is_noticed(kernel: Kernel) -> None:
    kernel.step = 2
    error = refused(kernel, lambda a: a.quote(ASKED))
    assert error.code == "ATTESTER_BUSY" and "generation went from" in error.reason
    assert len(kernel.asked) == module.ATTEMPTS


@pytest.mark.usefixtures("short_waits")
def test_write_between_request_and_answer_is_noticed(kernel: Kernel) -> None:
    """The other writer comes after our own check of generation, and the quote that comes out is not ours."""
    answers = iter([bytes(64), bytes(64), bytes(64), bytes(64)])
    kernel.answer = lambda data: tee().quote(next(answers))
    error = refused(kernel, lambda a: a.quote(ASKED))
    assert error.code == "ATTESTER_BUSY" and "other report data" in error.reason


@pytest.mark.usefixtures("short_waits")
def test_write_while_the_platform_signs_is_noticed(kernel: Kernel) -> None:
    """The quote that comes out may be ours; that somebody else uses our entry is refused all the same."""
    kernel.late = 1
    error = refused(kernel, lambda a: a.quote(ASKED))
    assert error.code == "ATTESTER_BUSY" and "after the read" in error.reason


@pytest.mark.usefixtures("short_waits")
def test_one_race_is_survived(kernel: Kernel) -> None:
    wrong = [True]
    kernel.answer = lambda data: tee().quote(bytes(64) if wrong and wrong.pop() else data)
    with running(kernel) as attester:
        assert Quote.parse(attester.quote(ASKED)).body.report_data == ASKED
    assert len(kernel.asked) == 2


def test_silent_host_ends_in_time(kernel: Kernel) -> None:
    kernel.answer = lambda data: None
    begin = time.monotonic()
    assert refused(kernel, lambda a: a.quote(ASKED), quote_wait=0.3).code == "ATTESTER_TIMEOUT"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "answer",
    [b"", b"x", bytes(5000), b"\xff" * 5000],
    ids=["empty", "one byte", "zeros", "ones"],
)
def test_answer_that_is_no_quote_is_refused(kernel: Kernel, answer: bytes) -> None:
    kernel.answer = lambda data: answer
    assert refused(kernel, lambda a: a.quote(ASKED)).code == "ATTESTER_QUOTE"


def test_answer_without_end_is_cut_off(kernel: Kernel) -> None:
    kernel.answer = lambda data: tee().quote(data) + bytes(module.MAX_RAW)
    assert refused(kernel, lambda a: a.quote(ASKED)).code == "ATTESTER_QUOTE"


def test_trailing_bytes_that_are_not_padding_are_refused(kernel: Kernel) -> None:
    kernel.answer = lambda data: tee().quote(data) + b"\1"
    assert refused(kernel, lambda a: a.quote(ASKED)).code == "ATTESTER_QUOTE"


@pytest.mark.usefixtures("short_waits")
def test_directory_without_attributes_is_refused(kernel: Kernel) -> None:
    kernel.attributes = False
    assert refused(kernel, lambda a: a.quote(ASKED)).code == "ATTESTER_TSM"
    assert not list(kernel.tsm.iterdir())


def test_machine_without_configfs_is_refused_with_a_hint(kernel: Kernel) -> None:
    kernel.tsm.rmdir()
    attester = TdxAttester(kernel.tsm, kernel.rtmr, kernel.acpi)
    with pytest.raises(AttesterError) as caught:
        attester.quote(ASKED)
    assert caught.value.code == "ATTESTER_TSM" and "TDX guest" in caught.value.hint


def test_busy_platform_is_asked_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """EBUSY, EINTR and ETIMEDOUT happen while a host signs."""
    real, left = os.open, [errno.EBUSY, errno.ETIMEDOUT, errno.EINTR]

    def busy(path: str | Path, flags: int, *rest: int) -> int:
        if str(path).endswith("outblob") and flags & os.O_NONBLOCK and not flags & os.O_WRONLY and left:
            raise OSError(left.pop(), "busy")
        return real(path, flags, *rest)

    kernel.answer = lambda data: tee().quote(data)
    monkeypatch.setattr(os, "open", busy)
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.01)
    with running(kernel) as attester:
        assert Quote.parse(attester.quote(ASKED)).body.report_data == ASKED
    assert not left


def test_close_may_be_called_twice_and_a_quote_after_it_makes_a_new_entry(kernel: Kernel) -> None:
    with running(kernel) as attester:
        attester.quote(ASKED)
        attester.close()
        attester.close()
        attester.quote(ASKED)
    assert len(kernel.entries) == 2


def test_rtmr3_is_extended_by_the_rule_and_the_others_are_read(kernel: Kernel) -> None:
    digest = b"\7" * 48
    with running(kernel) as attester:
        before = attester.read_rtmr(3)
        attester.extend_rtmr3(digest)
        assert attester.read_rtmr(3) == extend(before, digest)
        attester.extend_rtmr3(digest)
        assert attester.read_rtmr(3) == extend(extend(before, digest), digest)
        assert [attester.read_rtmr(i) for i in range(3)] == kernel.registers[:3]


@pytest.mark.usefixtures("short_waits")
def test_register_that_does_not_move_is_an_error(kernel: Kernel) -> None:
    kernel.extends = False
    assert refused(kernel, lambda a: a.extend_rtmr3(b"\7" * 48)).code == "ATTESTER_RTMR"


@pytest.mark.parametrize("digest", [b"", bytes(32), bytes(47), bytes(49)])
def test_digest_of_another_length_is_never_written(kernel: Kernel, digest: bytes) -> None:
    before = (kernel.rtmr / "rtmr3:sha384").read_bytes()
    assert refused(kernel, lambda a: a.extend_rtmr3(digest)).code == "ATTESTER_RTMR"
    assert (kernel.rtmr / "rtmr3:sha384").read_bytes() == before


@pytest.mark.parametrize("index", [-1, 4])
def test_register_that_is_none_is_refused(kernel: Kernel, index: int) -> None:
    assert refused(kernel, lambda a: a.read_rtmr(index)).code == "ATTESTER_RTMR"


def test_kernel_without_the_measurement_interface_is_refused(kernel: Kernel) -> None:
    kernel.extends = False
    (kernel.rtmr / "rtmr3:sha384").unlink()
    error = refused(kernel, lambda a: a.extend_rtmr3(bytes(48)))
    assert error.code == "ATTESTER_RTMR"


def test_event_log_is_cut_at_its_end_marker(kernel: Kernel) -> None:
    with running(kernel) as attester:
        log = attester.event_log()
    assert len(log) < 8192 and EventLog.parse(log).used == len(log)
    assert append_records(log, []) == log


def put(kernel: Kernel, at: int, value: bytes, *, sum_up: bool = True) -> None:
    table = bytearray(ccel_table())
    table[at : at + len(value)] = value
    if sum_up:
        table[9] = (table[9] - sum(table)) % 256
    (kernel.acpi / "CCEL").write_bytes(table)


@pytest.mark.parametrize(
    "change",
    [
        lambda k: put(k, 0, b"SSDT"),
        lambda k: put(k, 4, b"\x39"),
        lambda k: put(k, 36, b"\1"),
        lambda k: put(k, 40, bytes(8)),
        lambda k: put(k, 40, b"\xff" * 8),
        lambda k: put(k, 40, b"\0\2\0\0\0\0\0\0"),
        lambda k: put(k, 12, b"X", sum_up=False),
        lambda k: (k.acpi / "CCEL").write_bytes(ccel_table()[:-1]),
        lambda k: (k.acpi / "CCEL").write_bytes(ccel_table() + b"\0"),
        lambda k: (k.acpi / "CCEL").unlink(),
        lambda k: (k.acpi / "data" / "CCEL").unlink(),
        lambda k: (k.acpi / "data" / "CCEL").write_bytes(b"\0" * 100),
        lambda k: (k.acpi / "data" / "CCEL").write_bytes(ccel_log(boot_events())[:1000]),
    ],
    ids=["signature", "length", "SEV", "no area", "huge area", "area smaller than the log", "checksum", "short", "long",
         "no table", "no log", "no header", "cut log"],
)  # fmt: skip
def test_event_log_that_is_not_a_tds_is_refused(kernel: Kernel, change: Callable[[Kernel], object]) -> None:
    change(kernel)
    assert refused(kernel, lambda a: a.event_log()).code == "ATTESTER_CCEL"


@pytest.mark.tdx
@pytest.mark.skipif(not Path("/sys/kernel/config/tsm/report").is_dir(), reason="needs a TDX guest")
def test_real_td_gives_a_quote() -> None:
    attester: TeeAttester = TdxAttester(
        Path("/sys/kernel/config/tsm/report"),
        Path("/sys/devices/virtual/misc/tdx_guest/measurements"),
        Path("/sys/firmware/acpi/tables"),
    )
    try:
        quote = Quote.parse(attester.quote(ASKED))
        assert quote.body.report_data == ASKED
        assert [attester.read_rtmr(i) for i in range(4)] == list(quote.body.rtmrs)
    finally:
        attester.close()
