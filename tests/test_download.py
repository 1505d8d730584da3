"""Downloads: pairing, what passes under a final name, and resuming; against a fake of `earthaccess`.

The fake has the signatures and the ways to fail of earthaccess 0.17.0: `search_data` refuses unknown keys and raises
RuntimeError, `login` raises classes of its own, `download` writes a temporary sibling first, tries every Exception
three times, and without a login returns an empty list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import threading
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from inferring import Result

from spectralvae import cli
from spectralvae.config.loading import to_yaml

PRODUCTS = ["RAD", "NO2", "HCHO"]
KEYS = ["20240601T150000Z_S007G01", "20240601T150636Z_S007G02", "20240602T150000Z_S007G01"]
SEARCH_KEYS = {"short_name", "version", "provider", "bounding_box", "temporal"}
ALGORITHMS = {"SHA-512": hashlib.sha512, "SHA-256": hashlib.sha256, "MD5": hashlib.md5}


class LibraryError(Exception):
    """The library's own classes share nothing but Exception."""


class DataGranule(dict[str, Any]):
    """UMM-G of one granule."""

    def data_links(self, access: str | None = None, in_region: bool = False) -> list[str]:
        return [link["URL"] for link in self["umm"]["RelatedUrls"] if link["Type"] == "GET DATA"]


def content(name: str) -> bytes:
    """What a file holds: some hundreds of bytes of its own."""
    return (name * (5 + zlib.crc32(name.encode()) % 7)).encode()


def file_name(product: str, key: str, version: str = "V03") -> str:
    return f"TEMPO_{product}_{'L1' if product.startswith('RAD') else 'L2'}_{version}_{key}.nc"


def granule(product: str, key: str, version: str = "V03", algorithm: str | None = "SHA-512") -> DataGranule:
    name = file_name(product, key, version)
    entry: dict[str, Any] = {"Name": name, "SizeInBytes": len(content(name)), "Size": 0.1, "SizeUnit": "MB"}
    if algorithm:
        digest = ALGORITHMS[algorithm](content(name)).hexdigest() if algorithm in ALGORITHMS else "0"
        entry["Checksum"] = {"Value": digest, "Algorithm": algorithm}
    links = {"GET DATA": f"https://data.example/{name}", "VIEW RELATED INFORMATION": f"https://data.example/{name}.png"}
    return DataGranule(
        meta={"concept-id": f"G{zlib.crc32(name.encode())}-LARC_CLOUD", "provider-id": "LARC_CLOUD"},
        umm={
            "GranuleUR": name,
            "RelatedUrls": [{"Type": kind, "URL": url} for kind, url in links.items()],
            "DataGranule": {"ArchiveAndDistributionInformation": [{"Name": f"{name}.dmrpp", "SizeInBytes": 7}, entry]},
        },
    )


@dataclass
class Archive:
    """What the fake serves, how it fails, and what was asked of it; `run` is the command that asks."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    granules: list[DataGranule] = field(
        default_factory=lambda: [granule(product, key) for product in PRODUCTS for key in reversed(KEYS)]
    )
    served: dict[str, bytes] = field(default_factory=dict)  # instead of content(name)
    before: Callable[[str], None] = lambda name: None
    installed: bool = True
    search_error: Exception | None = None
    login_error: Exception | None = None
    accepts: bool = True
    loses_login: bool = False
    authenticated: bool = False
    searches: list[dict[str, Any]] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def run(self, *options: str, **keys: Any) -> Result:
        """Run `download` with keys that differ from those that ask for everything."""
        values = {
            "output_dir": str(self.folder / "out"),
            "box": [-80, 35.5, -70, 45],
            "start": "2024-06-01",
            "end": "2024-06-02",
            "products": PRODUCTS,
        }
        path = self.folder / "config.yaml"
        path.write_text(to_yaml({key: value for key, value in {**values, **keys}.items() if value is not None}))
        module = types.ModuleType("earthaccess")
        vars(module).update(login=self.login, search_data=self.search_data, download=self.download)
        sys.modules["earthaccess"] = module if self.installed else None
        self.fetched.clear()
        self.capture.readouterr()
        code = cli.run(["download", str(path), *options])
        return Result(code, *self.capture.readouterr(), self.folder / "out")

    def files(self) -> dict[str, bytes]:
        """The granules that are there, with all else that is not the run's bookkeeping."""
        out, own = self.folder / "out", {"run.json", "config.yaml", "granules.json", ".lock"}
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in own}

    def login(self, strategy: str = "all", persist: bool = False, system: object = None) -> Archive:
        self.strategies.append(strategy)
        if self.login_error:
            raise self.login_error
        self.authenticated = self.accepts
        return self

    def search_data(self, count: int = -1, **kwargs: Any) -> list[DataGranule]:
        if unknown := kwargs.keys() - SEARCH_KEYS:
            raise ValueError(f"Unknown key {unknown}")
        self.searches.append(kwargs)
        if self.search_error:
            raise self.search_error
        first, last = kwargs["temporal"]
        product, level = re.fullmatch(r"TEMPO_(\w+)_(L\d)", kwargs["short_name"]).groups()
        found = []
        for one in self.granules:
            match = re.fullmatch(rf"TEMPO_{product}_{level}_(V\d+)_(\w+?)Z_.*", one["umm"]["GranuleUR"])
            if match and match[1] == kwargs["version"] and kwargs["provider"] == one["meta"]["provider-id"]:
                begins = datetime.strptime(match[2], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
                if begins <= last and begins + timedelta(minutes=6) >= first:
                    found.append(one)
        return found

    def download(
        self, granules: list[DataGranule], local_path: Path, threads: int = 8, *, show_progress: bool | None = None
    ) -> list[Path]:
        if not self.authenticated or self.loses_login:
            return []
        (url,) = granules[0].data_links()
        name = url.rpartition("/")[2]
        partial, data = local_path / "partial", self.served.get(name, content(name))
        for attempt in range(3):
            try:
                partial.write_bytes(data[: len(data) // 2])
                self.before(name)
                partial.write_bytes(data)
                break
            except Exception:
                partial.unlink()
                if attempt == 2:
                    raise
        self.fetched.append(name)
        return [partial.replace(local_path / name)]


@pytest.fixture
def archive(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Three scans with all three products, in the place of the library."""
    monkeypatch.setitem(sys.modules, "earthaccess", None)
    for name in ("EARTHDATA_TOKEN", "EARTHDATA_USERNAME", "EARTHDATA_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return Archive(tmp_path, capfd)


def expected(keys: list[str] = KEYS, products: list[str] = PRODUCTS) -> dict[str, bytes]:
    """What must lie in the folder."""
    names = {f"{product}/{file_name(product, key)}" for product in products for key in keys}
    return {name: content(name.rpartition("/")[2]) for name in names}


# --- what is fetched --------------------------------------------------------------------------


def test_first_listed_then_fetched_into_the_folder_of_its_product(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = f"{sum(map(len, expected().values())):,} bytes"
    result = archive.run("--dry-run")
    assert (result.code, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    for path, data in expected().items():
        assert [path.rpartition("/")[2], f"{len(data):,}", "bytes"] in lines
    assert "9 files" in result.out and result.out.count(total) == 2, "in all, and to fetch"
    assert [path.name for path in archive.folder.iterdir()] == ["config.yaml"]
    assert archive.strategies == [], "a search needs no login"
    common = {
        "version": "V03",
        "provider": "LARC_CLOUD",
        "bounding_box": (-80, 35.5, -70, 45),
        "temporal": (datetime(2024, 6, 1, tzinfo=UTC), datetime(2024, 6, 2, 23, 59, 59, tzinfo=UTC)),
    }
    names = ["TEMPO_RAD_L1", "TEMPO_NO2_L2", "TEMPO_HCHO_L2"]
    assert archive.searches == [{"short_name": name, **common} for name in names]

    result = archive.run()
    assert result.code == 0, result.err
    assert "9 files" in result.out and total in result.out
    assert archive.files() == expected()
    assert result.record["state"] == "finished" and not (result.folder / ".partial").exists()

    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    assert " 0 bytes" in archive.run("--dry-run").out
    assert archive.run().code == 0 and archive.fetched == []
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == before

    monkeypatch.setenv("EARTHDATA_TOKEN", "x")
    assert archive.run("--overwrite").code == 0
    assert archive.strategies == ["netrc", "environment"], "the library's own default would ask for a password"


@pytest.mark.parametrize(
    ("start", "end", "keys"),
    [
        ("2024-06-01", "2024-06-01", KEYS[:2]),
        ("2024-06-02", "2024-06-02", KEYS[2:]),
        ("2024-06-01T15:06:30", "2024-06-01T16:00:00Z", KEYS[1:2]),
        ("2024-06-01 17:06:30+02:00", "2024-06-01T18:00:00+02:00", KEYS[1:2]),
        ("2024-06-01T15:06:30Z", "2024-06-02T15:00:00Z", KEYS[1:]),
    ],
)
def test_period(archive: Archive, start: str, end: str, keys: list[str]) -> None:
    lines = archive.run("--dry-run", start=start, end=end).out.splitlines()
    assert [line for line in lines if line in KEYS] == keys


def test_version_twilight_and_suffix(archive: Archive) -> None:
    files = {"RADT": f"{KEYS[0]}-034", "NO2": KEYS[0]}  # the suffix is not part of the key
    archive.granules = [granule(product, key, "V04") for product, key in files.items()]
    archive.granules.append(granule("NO2", KEYS[0], "V03"))
    assert archive.run(version="V04", products=list(files)).code == 0
    assert set(archive.files()) == {f"{product}/{file_name(product, key, 'V04')}" for product, key in files.items()}


def test_granules_that_lack_a_product_are_left_out_by_name(archive: Archive) -> None:
    """And a list tells where the files come from."""
    lacking = {KEYS[1]: ["NO2", "HCHO"], KEYS[2]: ["RAD"]}
    archive.granules = [granule(p, k) for p in PRODUCTS for k in KEYS if p not in lacking.get(k, [])]
    for options in (["--dry-run"], []):
        result = archive.run(*options)
        assert result.code == 0
        for key, products in lacking.items():
            assert re.search(rf"{key}.*{', '.join(products)}\n", result.out)
        assert "3 files" in result.out
    assert archive.files() == expected(KEYS[:1])
    listed = json.loads((result.folder / "granules.json").read_text())
    assert listed["left_out"] == lacking
    assert [(key, list(files)) for key, files in listed["granules"].items()] == [(KEYS[0], PRODUCTS)]
    name = file_name("RAD", KEYS[0])
    assert listed["granules"][KEYS[0]]["RAD"] == {
        "name": name,
        "bytes": len(content(name)),
        "exact": True,
        "checksum": {"algorithm": "SHA-512", "value": hashlib.sha512(content(name)).hexdigest()},
        "concept_id": archive.granules[0]["meta"]["concept-id"],
    }


# --- whole files only -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["SHA-512", "SHA-256", "MD5", "CRC-64", None])
@pytest.mark.parametrize("damage", ["shorter", "longer", "empty", "reversed"])
def test_what_is_not_as_announced_is_refused(archive: Archive, algorithm: str | None, damage: str) -> None:
    archive.granules = [granule(product, key, algorithm=algorithm) for product in PRODUCTS for key in KEYS]
    name = file_name("NO2", KEYS[1])
    data = content(name)
    archive.served[name] = {"shorter": data[:-1], "longer": data + b"x", "empty": b"", "reversed": data[::-1]}[damage]
    result = archive.run()
    if damage == "reversed" and algorithm not in ALGORITHMS:
        assert result.code == 0, "nothing tells that it is not right"
        return
    assert result.code == 1
    sizes = [len(archive.served[name]), len(data)]
    told = [algorithm] if damage == "reversed" else [f"{n} bytes" for n in sizes]
    assert all(word in result.message for word in (name, *told)), result
    kept = {**expected(KEYS[:1]), **expected(KEYS[1:2], ["RAD"])}
    assert archive.files() == kept
    assert result.record["state"] == "failed"
    del archive.served[name]
    assert archive.run().code == 0
    assert archive.files() == expected()
    assert len(archive.fetched) == 5


@pytest.mark.parametrize(("share", "code"), [(1.0, 0), (1.06, 0), (0.95, 0), (0.85, 1), (1.15, 1)])
def test_size_in_megabytes_is_checked_within_its_rounding(archive: Archive, share: float, code: int) -> None:
    """As in records that were translated from an older model: one entry, without a name."""
    entry = {"Name": "Not provided", "Size": 0.01, "SizeUnit": "MB"}
    archive.granules = [granule("RAD", KEYS[0])]
    archive.granules[0]["umm"]["DataGranule"]["ArchiveAndDistributionInformation"] = [entry]
    name = file_name("RAD", KEYS[0])
    archive.served[name] = b"x" * round(share * 0.01 * 2**20)
    assert "about 10,485 bytes" in archive.run("--dry-run", products=["RAD"]).out
    result = archive.run(products=["RAD"])
    assert result.code == code
    assert (result.folder / "RAD" / name).is_file() == (code == 0)
    assert code == 0 or "about 10,485 bytes" in result.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("DataGranule", {"ArchiveAndDistributionInformation": entries})
            for entries in ([], [{"Name": "x"}], [{"Name": "x", "Size": 1, "SizeUnit": "NA"}])
        ),
        ("DataGranule", {}),
        *(
            ("RelatedUrls", [{"Type": "GET DATA", "URL": f"https://x/{link}"} for link in links])
            for links in ([], ["../../x.nc"], [file_name("NO2", KEYS[0])], [f"x{file_name('RAD', KEYS[0])}"])
        ),
    ],
)
def test_record_without_size_or_with_other_links_is_refused(archive: Archive, key: str, value: Any) -> None:
    archive.granules = [granule("RAD", KEYS[0])]
    archive.granules[0]["umm"][key] = value
    result = archive.run(products=["RAD"])
    assert result.code == 1
    assert archive.granules[0]["meta"]["concept-id"] in result.message
    assert not result.folder.exists()


# --- resuming ---------------------------------------------------------------------------------


def test_resumes_with_what_lacks(archive: Archive) -> None:
    """Also with what has become corrupt, and with what is new in the archive."""
    name = file_name("HCHO", KEYS[1])

    def lost(fetching: str) -> None:
        if fetching == name:
            raise LibraryError(f"Download failed for https://data.example/{name}. Status code: 503")

    archive.before = lost
    cut, changed = (archive.folder / "out" / "RAD" / file_name("RAD", key) for key in KEYS[:2])
    archive.granules = [one for one in archive.granules if one["umm"]["GranuleUR"] != cut.name]
    archive.granules.append(granule("RAD", KEYS[0], algorithm=None))  # of which only the size tells
    result = archive.run()
    assert result.code == 1
    assert name in result.message and "503" in result.message
    there = {**expected(KEYS[:1]), **expected(KEYS[1:2], ["RAD", "NO2"])}
    assert archive.files() == there
    archive.before = lambda name: None
    cut.write_bytes(cut.read_bytes()[:-1])
    changed.write_bytes(changed.read_bytes()[::-1])
    new = "20240602T160000Z_S008G01"
    archive.granules += [granule(product, new) for product in PRODUCTS]
    assert archive.run().code == 0
    assert archive.files() == expected([*KEYS, new])
    lacked = set(expected([*KEYS, new])) - set(there) | {f"RAD/{cut.name}", f"RAD/{changed.name}"}
    assert sorted(archive.fetched) == sorted(path.rpartition("/")[2] for path in lacked)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_resumes(
    archive: Archive, request: pytest.FixtureRequest, number: signal.Signals, code: int
) -> None:
    """At once, in the middle of a file, though the library takes every exception for a reason to try again."""
    name = file_name("NO2", KEYS[0])
    calls = []
    release = threading.Event()
    request.addfinalizer(release.set)
    handler = signal.getsignal(number)
    others = set(threading.enumerate())  # of other tests: some never end

    def hang(fetching: str) -> None:
        if fetching == name:
            calls.append(fetching)
            os.kill(os.getpid(), number)
            assert release.wait(60), "the command did not stop"

    archive.before = hang
    stopped = archive.run()
    assert (stopped.code, stopped.record["state"]) == (code, "stopped")
    assert not release.is_set()
    assert calls == [name]
    assert signal.getsignal(number) == handler
    whole = {path: data for path, data in archive.files().items() if not path.startswith(".partial")}
    assert whole == expected(KEYS[:1], ["RAD"])
    hung = [thread for thread in threading.enumerate() if thread not in others]
    release.set()
    for thread in hung:
        thread.join(60)
    archive.before = lambda name: None
    assert archive.run().code == 0
    assert archive.files() == expected()
    assert len(archive.fetched) == 8


# --- what goes wrong --------------------------------------------------------------------------

TWICE = f"{KEYS[1]}-035"


@pytest.mark.parametrize(
    ("failing", "keys", "code", "words"),
    [
        ({"installed": False}, {}, 2, ['pip install "spectralvae[earthdata]"']),
        ({}, {"products": ["RAD", "NO2", "CLDO4"]}, 2, ["3 RAD, 3 NO2, 0 CLDO4", "2024-06-01 to 2024-06-02"]),
        (
            {"granules": [granule("RAD", KEYS[1]), granule("RAD", TWICE)]},
            {},
            2,
            [file_name("RAD", KEYS[1]), file_name("RAD", TWICE)],
        ),
        ({"search_error": RuntimeError('{"errors":["no\nsuch"]}')}, {}, 1, ["TEMPO_RAD_L1 V03", "no such"]),
        ({"search_error": OSError("no route")}, {}, 1, ["TEMPO_RAD_L1 V03", "no route"]),
        ({"login_error": LibraryError("No .netrc at /home/x/.netrc")}, {}, 2, ["/home/x/.netrc", "~/.netrc"]),
        ({"login_error": LibraryError("failed with:\n" + 5000 * "<html> ")}, {}, 2, ["EARTHDATA_TOKEN"]),
        ({"login_error": OSError("no route")}, {}, 1, ["no route"]),
        ({"accepts": False}, {}, 2, ["~/.netrc"]),
    ],
)
def test_refused_before_anything_is_written(
    archive: Archive, failing: dict[str, Any], keys: dict[str, Any], code: int, words: list[str]
) -> None:
    vars(archive).update(failing)
    needs_login = {"login_error", "accepts"} & failing.keys()
    for options in ([], *([] if needs_login else [["--dry-run"]])):
        result = archive.run(*options, **keys)
        assert result.code == code
        assert all(word in result.message for word in words), result.message
        assert len(result.message) < 600
        assert not result.folder.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ConnectionResetError(), None])
def test_failing_download_names_the_file(archive: Archive, error: Exception | None) -> None:
    def fail(name: str) -> None:
        raise error

    archive.before = fail
    archive.loses_login = error is None  # then the library returns no file and tells nothing
    result = archive.run()
    assert result.code == 1
    assert file_name("RAD", KEYS[0]) in result.message and "resume" in result.message
    assert error is None or (str(error) or type(error).__name__) in result.message
    assert archive.files() == {}
    assert result.record["state"] == "failed"
