"""The development TEE is under tests/, and no wheel carries it."""

from __future__ import annotations

import tomllib
from typing import Any

from tests.devtee.running import REPOSITORY


def test_wheel_names_its_packages_and_the_development_tee_is_in_none() -> None:
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) == {"attestation", "enclave", "host", "measurements"}
    assert not {"include", "force-include", "artifacts"} & set(wheel)
    assert "force-include" not in project["tool"]["hatch"]["build"]


def test_nothing_that_ships_imports_or_names_the_development_tee() -> None:
    shipped = [p for d in ("attestation", "enclave", "host", "measurements") for p in (REPOSITORY / d).rglob("*.py")]
    assert len(shipped) > 4
    for path in shipped:
        text = path.read_text()
        assert "tests.devtee" not in text and "import tests" not in text and "from tests" not in text, path


def test_built_wheel_carries_no_file_of_the_development_tee() -> None:
    """The file list that the build backend itself would pack."""
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(REPOSITORY))
    names = [f.distribution_path for f in builder.recurse_included_files()]
    assert any(n.startswith("attestation/") for n in names)
    assert not [n for n in names if n.startswith("tests") or "devtee" in n]
