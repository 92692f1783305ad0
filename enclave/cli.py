"""`vouchsafe-enclave serve --config F` runs the enclave; `vouchsafe-enclave check` prints which hardening holds.

Runs in the guest, or on a laptop. Exit status: 0 stopped in order (or every check passed), 1 a boot stage or a check
failed, 2 usage or a configuration that cannot be used, 3 something failed while serving.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from attestation.errors import VouchsafeError
from enclave import hardening
from enclave.settings import Settings

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vouchsafe-enclave", description="LLM inference you can verify: the program inside the confidential VM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="boot in numbered stages, then serve until SIGTERM")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="the measured configuration (TOML)")
    check = commands.add_parser("check", help="print which hardening holds on this machine")
    check.add_argument("--config", type=Path, metavar="FILE", help="look at the directories of this configuration too")
    check.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(argv)
    try:
        if options.command == "check":
            return _check(options.config, as_json=options.json)
        from enclave import boot  # late: `check` needs neither engine nor server

        return boot.run(options.config)
    except VouchsafeError as err:
        print(f"vouchsafe-enclave: {err}", file=sys.stderr)
        if err.hint:
            print(f"  hint: {err.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1


def _check(config: Path | None, *, as_json: bool) -> int:
    directories = {}
    if config is not None:
        paths = Settings.load(config).paths
        directories = {"tsm": paths.tsm, "measurements": paths.measurements, "acpi": paths.acpi, "pci": paths.pci}
    hardening.apply()  # what a process may set for itself is set, then read back
    measures = hardening.check(directories=directories)
    failed = [m for m in measures if m.status == "fail"]
    if as_json:
        print(json.dumps({"holds": not failed, "measures": [m.as_json() for m in measures]}, indent=1))
    else:
        print(f"hardening: {'holds' if not failed else f'{len(failed)} of {len(measures)} measures do not hold'}")
        for measure in measures:
            print(f"  {measure.status:4}  {measure.id}: {measure.reason}")
            if measure.hint and measure.status == "fail":
                print(f"        hint: {measure.hint}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
