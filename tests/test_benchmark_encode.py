"""benchmarks/encode.py in its smallest form: both ways compute the same, and the report holds what it should."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("encode")


def test_smallest_form(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"memory_mb": 1.0, "imports_mb": 2.0}
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: memory)  # its processes would take most of the time
    size = ["--shape", "16", "32", "--channels", "16", "--tile", "16", "--chs", "8", "8"]

    benchmark.main([*size, "--repeats", "1", "--directory", str(tmp_path), "--json", str(tmp_path / "report.json")])

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["shape"] == [16, 32, 16] and report["float32_mb"] == 16 * 32 * 16 * 4 / 1e6
    assert report["difference"] < 1e-4  # two whole tiles
    for task in ("encode", "decode"):
        assert set(report[task]) == {"plain", "command-no-overlap", "command"}
        for way, row in report[task].items():
            assert row["mb_per_s"] == pytest.approx(report["float32_mb"] / row["seconds"]["median"])
            assert memory.items() <= row.items()
            shares = row.get("shares", {})
            assert (way == "plain") == (not shares) and sum(shares.values()) < 1
            assert way == "plain" or shares["network"] > 0 < shares["writing"]
        assert report[task]["command"]["shares"]["reading"] > 0 or task == "decode"
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]
