"""Steps of the boot and of its end that are functions of what they are given."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from attestation.attester import TeeAttester
from attestation.errors import RefusedError, VouchsafeError
from attestation.tdx import append_records, rtmr_after
from enclave.custody import Custody
from enclave.engine import Engine, processes
from enclave.issuer import Issuer
from enclave.metrics import Metrics
from enclave.producer import Producer

__all__ = ["children", "gauges", "give_gpus_back", "seal"]

READY_PATIENCE: Final = 5.0
"""Seconds that the driver gets to withdraw the GPUs' ready state at the end."""
RTMR_INDEX: Final = 4  # of RTMR3 in event logs (CCEL: 1 to 4)
EV_EVENT_TAG: Final = 6


async def give_gpus_back(producer: Producer) -> None:
    """Nobody vouches for the GPUs any more: they take no work of whatever runs here next."""
    if producer.has_gpu:
        with contextlib.suppress(VouchsafeError, TimeoutError):  # the machine may be why we stop
            await asyncio.wait_for(producer.set_gpu_ready(False), READY_PATIENCE)


def children() -> dict[int, str]:
    """Our living descendants, but for Python's resource tracker: it ends with us, after it has removed shared memory
    that a killed engine left."""
    found = processes.descendants()
    for pid in list(found):
        with contextlib.suppress(OSError):
            if b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                del found[pid]
    return found


def seal(tdx: TeeAttester, items: list[bytes]) -> bytes:
    """Extend RTMR3 by *items* and return the closed event log. RTMR3 must be untouched: its value follows from the
    items alone, and a verifier computes it."""
    if (value := tdx.read_rtmr(3)) != bytes(48):
        raise RefusedError(
            "BOOT_RTMR3",
            "RTMR3 is not zero: something was measured into it since the machine started",
            expected=bytes(48),
            actual=value,
            hint="an enclave boots once per boot of its machine: restart the TD (or the development TEE)",
        )
    digests = [hashlib.sha384(item).digest() for item in items]
    for digest in digests:
        tdx.extend_rtmr3(digest)
    if (value := tdx.read_rtmr(3)) != rtmr_after(items):
        raise RefusedError("BOOT_RTMR3", "RTMR3 holds something else", expected=rtmr_after(items), actual=value)
    records = [(RTMR_INDEX, EV_EVENT_TAG, digest, item) for digest, item in zip(digests, items, strict=True)]
    return append_records(tdx.event_log(), records)


def _up(engine: Engine) -> float:
    return float(engine.healthy)


def gauges(metrics: Metrics, engines: Mapping[str, Engine], custody: Custody, issuer: Issuer) -> Metrics:
    """What is read when a picture of the service is made."""

    def queue(id: str, what: str) -> float:
        tenancy = custody.tenancy
        return float(getattr(tenancy.queues[id], what)) if tenancy is not None else 0.0

    for id, engine in engines.items():
        metrics.watch("vouchsafe_engine_up", "1 while the model can answer.", partial(_up, engine), id)
        metrics.watch("vouchsafe_requests_running", "Requests in the engine.", partial(queue, id, "running"), id)
        metrics.watch("vouchsafe_requests_waiting", "Requests before it.", partial(queue, id, "waiting"), id)
    metrics.watch("vouchsafe_state_open", "1 while the state is open.", lambda: float(custody.tenancy is not None))
    metrics.watch(
        "vouchsafe_ledger_overruns", "Answers that used more than was reserved: the operator pays.",
        lambda: float(custody.tenancy.ledger.overruns) if custody.tenancy is not None else 0.0,
    )  # fmt: skip
    metrics.watch("vouchsafe_certificate_valid", "1 while the certificate is valid.", lambda: float(issuer.valid))
    metrics.watch("vouchsafe_certificate_failing", "1 while its renewal fails.", lambda: float(bool(issuer.failing)))
    return metrics
