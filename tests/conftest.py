"""Shared by all tests: where the real files are, and the golden table at the end of a run."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files, which are not part of the project."""
    folder = Path(os.environ.get("SPECTRALVAE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real files at {folder}: set SPECTRALVAE_REAL_DATA")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        (*name.removeprefix("golden:").split(":"), value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name.startswith("golden:")
    ]
    if rows:
        terminalreporter.section("largest deviations from mltools")
        for case, quantity, value in sorted(rows):
            terminalreporter.write_line(f"{case:22s} {quantity:34s} {value}")
