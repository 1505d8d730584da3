"""Downloads: pairing, what passes under a final name, and going on; against a fake of `earthaccess`.

The fake has the signatures and the ways to fail of earthaccess 0.17.0: `search_data` refuses unknown keys and raises
RuntimeError, `login` raises classes of its own, `download` writes a temporary sibling first, tries every Exception
three times, skips what is there already, and without a login returns an empty list.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from spectralvae import cli
from spectralvae.config.loading import to_yaml

PRODUCTS = ["RAD", "NO2", "HCHO"]
KEYS = ["20240601T150000Z_S007G01", "20240601T150636Z_S007G02", "20240602T150000Z_S007G01"]
SEARCH_KEYS = {"short_name", "version", "provider", "bounding_box", "temporal"}
ALGORITHMS = {"SHA-512": hashlib.sha512, "SHA-256": hashlib.sha256, "MD5": hashlib.md5}


class LoginStrategyUnavailable(Exception):
    pass


class LoginAttemptFailure(Exception):
    pass


class DownloadFailure(Exception):
    pass


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
    if algorithm in ALGORITHMS:
        entry["Checksum"] = {"Value": ALGORITHMS[algorithm](content(name)).hexdigest(), "Algorithm": algorithm}
    elif algorithm:
        entry["Checksum"] = {"Value": "0", "Algorithm": algorithm}
    other = {"Name": f"{name}.dmrpp", "SizeInBytes": 7}
    urls = [
        ("GET DATA", f"https://data.example/{name}"),
        ("VIEW RELATED INFORMATION", f"https://data.example/{name}.png"),
    ]
    return DataGranule(
        meta={"concept-id": f"G{zlib.crc32(name.encode())}-LARC_CLOUD", "provider-id": "LARC_CLOUD"},
        umm={
            "GranuleUR": name,
            "RelatedUrls": [{"Type": kind, "URL": url} for kind, url in urls],
            "DataGranule": {"ArchiveAndDistributionInformation": [other, entry]},
        },
    )


@dataclass
class Archive:
    """What the fake serves, how it fails, and what was asked of it."""

    granules: list[DataGranule] = field(default_factory=list)
    served: dict[str, bytes] = field(default_factory=dict)  # instead of content(name)
    before: Callable[[str], None] = lambda name: None
    search_error: Exception | None = None
    login_error: Exception | None = None
    authenticated: bool = False
    searches: list[dict[str, Any]] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def module(self) -> types.ModuleType:
        module = types.ModuleType("earthaccess")
        vars(module).update(login=self.login, search_data=self.search_data, download=self.download)
        return module

    def login(self, strategy: str = "all", persist: bool = False, system: object = None) -> Archive:
        self.strategies.append(strategy)
        if self.login_error:
            raise self.login_error
        self.authenticated = True
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
        self,
        granules: DataGranule | list[DataGranule],
        local_path: Path | str | None = None,
        provider: str | None = None,
        threads: int = 8,
        *,
        show_progress: bool | None = None,
        credentials_endpoint: str | None = None,
        pqdm_kwargs: dict[str, Any] | None = None,
        force: bool = False,
    ) -> list[Path]:
        if not self.authenticated:
            return []
        assert local_path is not None
        urls = [
            url for one in ([granules] if isinstance(granules, DataGranule) else granules) for url in one.data_links()
        ]
        return [self._download_file(url.rpartition("/")[2], Path(local_path)) for url in urls]

    def _download_file(self, name: str, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            for attempt in range(3):
                partial = folder / f"partial_{attempt}"
                try:
                    data = self.served.get(name, content(name))
                    partial.write_bytes(data[: len(data) // 2])
                    self.before(name)
                    partial.write_bytes(data)
                    partial.replace(folder / name)
                    break
                except Exception:
                    partial.unlink()
                    if attempt == 2:
                        raise
            self.fetched.append(name)
        return folder / name


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Three scans with all three products, in the place of the library."""
    archive = Archive([granule(product, key) for product in PRODUCTS for key in reversed(KEYS)])
    monkeypatch.setitem(sys.modules, "earthaccess", archive.module())
    for name in ("EARTHDATA_TOKEN", "EARTHDATA_USERNAME", "EARTHDATA_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return archive


@dataclass
class Result:
    """What one call did."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The line of the error; a bar of the progress may stand before it."""
        line = self.err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("spectralvae: error: "), self
        assert self.err.count("spectralvae: error: ") == 1
        return line.removeprefix("spectralvae: error: ")


@pytest.fixture
def call(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `download`: options, and keys that differ from those that ask for everything."""

    def caller(*options: str, **keys: Any) -> Result:
        values = {
            "output_dir": str(tmp_path / "out"),
            "box": [-80, 35.5, -70, 45],
            "start": "2024-06-01",
            "end": "2024-06-02",
            "products": PRODUCTS,
        }
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml({key: value for key, value in {**values, **keys}.items() if value is not None}))
        capfd.readouterr()
        code = cli.run(["download", str(path), *options])
        return Result(code, *capfd.readouterr())

    return caller


def files_below(folder: Path) -> dict[str, bytes]:
    """The granules below a folder, with all else that is not the run's bookkeeping."""
    own = {"run.json", "config.yaml", "granules.json", ".lock"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


def expected(keys: list[str] = KEYS, products: list[str] = PRODUCTS) -> dict[str, bytes]:
    """What must lie in the folder."""
    names = {f"{product}/{file_name(product, key)}" for product in products for key in keys}
    return {name: content(name.rpartition("/")[2]) for name in names}


def state(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["state"])


# --- what is fetched --------------------------------------------------------------------------


def test_every_file_in_the_folder_of_its_product(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    result = call()
    assert result.code == 0, result.err
    assert files_below(tmp_path / "out") == expected()
    assert not (tmp_path / "out" / ".partial").exists()
    assert state(tmp_path / "out") == "finished"
    n_bytes = sum(map(len, expected().values()))
    assert f"3 granules, 9 files, {n_bytes:,} bytes; 9 fetched now" in result.out
    again = call()
    assert again.code == 0
    assert "finished" in again.out
    assert len(archive.fetched) == 9


def test_what_is_asked_of_the_archive(archive: Archive, call: Callable[..., Result]) -> None:
    assert call("--dry-run", end="2024-06-01").code == 0
    assert [search["short_name"] for search in archive.searches] == ["TEMPO_RAD_L1", "TEMPO_NO2_L2", "TEMPO_HCHO_L2"]
    for search in archive.searches:
        assert search["version"] == "V03"
        assert search["provider"] == "LARC_CLOUD"
        assert search["bounding_box"] == (-80, 35.5, -70, 45)
        day = datetime(2024, 6, 1, tzinfo=UTC)
        assert search["temporal"] == (day, day + timedelta(days=1, seconds=-1))


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
def test_period(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, start: str, end: str, keys: list[str]
) -> None:
    assert call(start=start, end=end).code == 0
    assert files_below(tmp_path / "out") == expected(keys)


def test_version_and_level_1_of_twilight(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    archive.granules += [granule(product, KEYS[0], "V04") for product in ("RADT", "NO2")]
    assert call(version="V04", products=["RADT", "NO2"]).code == 0
    assert set(files_below(tmp_path / "out")) == {
        f"{product}/{file_name(product, KEYS[0], 'V04')}" for product in ("RADT", "NO2")
    }


def test_suffix_of_a_name_is_not_part_of_the_key(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    archive.granules = [granule("RAD", f"{KEYS[0]}-034"), granule("NO2", KEYS[0])]
    assert call(products=["RAD", "NO2"]).code == 0
    assert set(files_below(tmp_path / "out")) == {
        f"RAD/{file_name('RAD', KEYS[0] + '-034')}",
        f"NO2/{file_name('NO2', KEYS[0])}",
    }


def test_granules_that_lack_a_product_are_left_out_by_name(
    archive: Archive, call: Callable[..., Result], tmp_path: Path
) -> None:
    lacking = {("NO2", KEYS[1]), ("HCHO", KEYS[1]), ("RAD", KEYS[2])}
    archive.granules = [granule(p, k) for p in PRODUCTS for k in KEYS if (p, k) not in lacking]
    for options in (["--dry-run"], []):
        result = call(*options)
        assert result.code == 0
        assert "2 granules are left out" in result.out
        assert f"{KEYS[1]}: no NO2, HCHO\n" in result.out
        assert f"{KEYS[2]}: no RAD\n" in result.out
        assert "1 granules, 3 files" in result.out
    assert files_below(tmp_path / "out") == expected(KEYS[:1])


def test_list_tells_where_the_files_come_from(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    archive.granules = [granule("RAD", KEYS[0]), granule("NO2", KEYS[0]), granule("RAD", KEYS[1])]
    assert call(products=["RAD", "NO2"]).code == 0
    listed = json.loads((tmp_path / "out" / "granules.json").read_text())
    assert listed["left_out"] == {KEYS[1]: ["NO2"]}
    assert list(listed["granules"]) == [KEYS[0]]
    assert list(listed["granules"][KEYS[0]]) == ["RAD", "NO2"]
    name = file_name("NO2", KEYS[0])
    assert listed["granules"][KEYS[0]]["NO2"] == {
        "name": name,
        "bytes": len(content(name)),
        "exact": True,
        "checksum": {"algorithm": "SHA-512", "value": hashlib.sha512(content(name)).hexdigest()},
        "concept_id": archive.granules[1]["meta"]["concept-id"],
    }


def test_dry_run_lists_names_and_bytes_and_writes_nothing(
    archive: Archive, call: Callable[..., Result], tmp_path: Path
) -> None:
    result = call("--dry-run")
    assert result.code == 0
    assert result.err == ""
    lines = [line.split() for line in result.out.splitlines()]
    for path, data in expected().items():
        assert [path.rpartition("/")[2], f"{len(data):,}", "bytes"] in lines
    total = f"{sum(map(len, expected().values())):,} bytes"
    assert f"3 granules, 9 files, {total}; {total} to fetch" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert archive.strategies == [], "a search needs no login"
    assert call().code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert f"{total}; 0 bytes to fetch" in call("--dry-run").out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


# --- whole files only -------------------------------------------------------------------------


def other_bytes(data: bytes) -> bytes:
    return bytes(reversed(data))


@pytest.mark.parametrize("algorithm", ["SHA-512", "SHA-256", "MD5", "CRC-64", None])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", other_bytes])
def test_what_is_not_as_announced_is_refused(
    archive: Archive,
    call: Callable[..., Result],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    algorithm: str | None,
) -> None:
    archive.granules = [granule(product, key, algorithm=algorithm) for product in PRODUCTS for key in KEYS]
    name = file_name("NO2", KEYS[1])
    archive.served[name] = damage(content(name))
    result = call()
    if damage is other_bytes and algorithm not in ALGORITHMS:
        assert result.code == 0, "nothing tells that it is not right"
        return
    assert result.code == 1
    assert name in result.message
    if damage is other_bytes:
        assert f"checksum is not the one announced, {algorithm}" in result.message
    else:
        assert f"{len(archive.served[name])} bytes came, {len(content(name))} bytes were announced" in result.message
    kept = {**expected(KEYS[:1]), f"RAD/{file_name('RAD', KEYS[1])}": content(file_name("RAD", KEYS[1]))}
    assert files_below(tmp_path / "out") == kept
    assert state(tmp_path / "out") == "failed"
    del archive.served[name]
    result = call()
    assert result.code == 0
    assert "5 fetched now" in result.out
    assert files_below(tmp_path / "out") == expected()
    assert sorted(archive.fetched) == sorted([name, *(path.rpartition("/")[2] for path in expected())])


@pytest.mark.parametrize(("share", "code"), [(1.0, 0), (1.06, 0), (0.95, 0), (0.85, 1), (1.15, 1)])
def test_size_in_megabytes_is_checked_within_its_rounding(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, share: float, code: int
) -> None:
    """As in records that were translated from an older model: one entry, without a name."""
    entry = {"Name": "Not provided", "Size": 0.01, "SizeUnit": "MB"}
    archive.granules = [granule("RAD", KEYS[0])]
    archive.granules[0]["umm"]["DataGranule"]["ArchiveAndDistributionInformation"] = [entry]
    name = file_name("RAD", KEYS[0])
    archive.served[name] = b"x" * round(share * 0.01 * 2**20)
    assert f"{name}  about 10,485 bytes" in call("--dry-run", products=["RAD"]).out
    result = call(products=["RAD"])
    assert result.code == code
    assert (tmp_path / "out" / "RAD" / name).is_file() == (code == 0)
    if code:
        assert "about 10,485 bytes were announced" in result.message


@pytest.mark.parametrize("entries", [[], [{"Name": "x"}], [{"Name": "x", "Size": 1, "SizeUnit": "NA"}], None])
def test_file_of_unknown_size_is_refused(archive: Archive, call: Callable[..., Result], entries: Any) -> None:
    archive.granules = [granule("RAD", KEYS[0])]
    archive.granules[0]["umm"]["DataGranule"] = {"ArchiveAndDistributionInformation": entries} if entries else {}
    result = call("--dry-run", products=["RAD"])
    assert result.code == 1
    assert file_name("RAD", KEYS[0]) in result.message
    assert "no size" in result.message


@pytest.mark.parametrize("links", [[], ["../../x.nc"], [file_name("NO2", KEYS[0])], [f"x{file_name('RAD', KEYS[0])}"]])
def test_link_to_another_file_is_refused(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, links: list[str]
) -> None:
    archive.granules = [granule("RAD", KEYS[0])]
    archive.granules[0]["umm"]["RelatedUrls"] = [{"Type": "GET DATA", "URL": f"https://x/{link}"} for link in links]
    result = call(products=["RAD"])
    assert result.code == 1
    assert archive.granules[0]["meta"]["concept-id"] in result.message
    assert not (tmp_path / "out").exists()


# --- going on ---------------------------------------------------------------------------------


def test_goes_on_with_what_lacks(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    """Also with what has become damaged, and with what is new in the archive."""
    name = file_name("HCHO", KEYS[1])

    def lost(fetching: str) -> None:
        if fetching == name:
            raise DownloadFailure(f"Download failed for https://data.example/{name}. Status code: 503")

    archive.before = lost
    shorter, changed = (tmp_path / "out" / "RAD" / file_name("RAD", key) for key in KEYS[:2])
    archive.granules = [one for one in archive.granules if one["umm"]["GranuleUR"] != shorter.name]
    archive.granules.append(granule("RAD", KEYS[0], algorithm=None))  # of which only the size tells
    result = call()
    assert result.code == 1
    assert name in result.message
    assert "Status code: 503" in result.message
    there = {**expected(KEYS[:1]), **expected(KEYS[1:2], ["RAD", "NO2"])}
    assert files_below(tmp_path / "out") == there
    archive.before = lambda name: None
    archive.fetched.clear()
    shorter.write_bytes(shorter.read_bytes()[:-1])
    changed.write_bytes(other_bytes(changed.read_bytes()))
    new = "20240602T160000Z_S008G01"
    archive.granules += [granule(product, new) for product in PRODUCTS]
    result = call()
    assert result.code == 0
    assert files_below(tmp_path / "out") == expected([*KEYS, new])
    lacked = set(expected([*KEYS, new])) - set(there) | {f"RAD/{shorter.name}", f"RAD/{changed.name}"}
    assert sorted(archive.fetched) == sorted(path.rpartition("/")[2] for path in lacked)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets a download that hangs go on, at the latest when the test ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_goes_on(
    archive: Archive,
    call: Callable[..., Result],
    tmp_path: Path,
    release: threading.Event,
    number: signal.Signals,
    code: int,
) -> None:
    """At once, in the middle of a file, though the library takes every exception for a reason to try again."""
    name = file_name("NO2", KEYS[0])
    calls = []
    handler = signal.getsignal(number)
    others = set(threading.enumerate())  # of other tests: some never end

    def hang(fetching: str) -> None:
        if fetching == name:
            calls.append(fetching)
            os.kill(os.getpid(), number)
            assert release.wait(60), "the command did not stop"

    archive.before = hang
    assert call().code == code
    assert not release.is_set()
    assert calls == [name]
    assert signal.getsignal(number) == handler
    assert state(tmp_path / "out") == "stopped"
    below = files_below(tmp_path / "out")
    assert {path: data for path, data in below.items() if not path.startswith(".partial")} == expected(
        KEYS[:1], ["RAD"]
    )
    hung = [thread for thread in threading.enumerate() if thread not in others]
    release.set()
    for thread in hung:
        thread.join(60)
    archive.before = lambda name: None
    archive.fetched.clear()
    assert call().code == 0
    assert files_below(tmp_path / "out") == expected()
    assert len(archive.fetched) == 8


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"box": None}, ["box: this key is required"]),
        ({"box": [-80, 35, -70]}, ["box", "4"]),
        ({"box": [-70, 35, -80, 45]}, ["box: [-70.0, 35.0, -80.0, 45.0]", "west < east"]),
        ({"box": [-80, 45, -70, 35]}, ["box", "south < north"]),
        ({"box": [-181, 35, -70, 45]}, ["box", "-180"]),
        ({"box": [-80, 35, 181, 45]}, ["box", "180"]),
        ({"box": [-80, -91, -70, 45]}, ["box", "-90"]),
        ({"box": [-80, 35, -70, 91]}, ["box", "90"]),
        ({"box": [-80, 35, -80, 45]}, ["box", "west < east"]),
        ({"box": [-80, 35, float("nan"), 45]}, ["box.2", "finite"]),
        ({"start": "June"}, ["start: 'June'", "2024-06-01"]),
        ({"start": "2024-06-31"}, ["start: '2024-06-31'"]),
        ({"start": "0001-01-01T00:00+01:00"}, ["start: '0001-01-01T00:00+01:00'"]),
        ({"start": 20240601}, ["start: 20240601", "string"]),
        ({"end": ""}, ["end: ''"]),
        ({"end": "2024-05-31"}, ["end: 2024-05-31 lies before start: 2024-06-01"]),
        ({"start": "2024-06-01T12:00", "end": "2024-06-01T11:59:59Z"}, ["end", "lies before start"]),
        ({"version": "V3"}, ["version: 'V3'", "V03"]),
        ({"products": []}, ["products: []"]),
        ({"products": ["NO2", "RAD"]}, ["products", "must begin with RAD or RADT"]),
        ({"products": ["NO2"]}, ["products", "must begin with RAD or RADT"]),
        ({"products": ["RAD", "RADT"]}, ["products", "only one"]),
        ({"products": ["RAD", "NO2", "NO2"]}, ["products", "twice"]),
        ({"products": ["RAD", "O3"]}, ["products.1: 'O3'", "O3TOT"]),
        ({"complete": True}, ["complete: unknown key"]),
    ],
)
def test_bad_config_is_one_line(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, keys: dict[str, Any], parts: list[str]
) -> None:
    result = call(**keys)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "config.yaml: " in result.message
    assert all(part in result.message for part in parts), result.message
    assert archive.searches == []
    assert not (tmp_path / "out").exists()


def test_legal_corners_of_the_config(archive: Archive, call: Callable[..., Result]) -> None:
    assert call("--print-config", box=[-180, -90, 180, 90], start="2024-06-01", end="2024-06-01").code == 0
    assert call("--print-config", end="9999-12-31").code == 0
    assert call("--print-config", start="2024-06-01T12:00", end="2024-06-01").code == 0
    printed = call("--print-config", products=None).out
    assert "products: [RAD, NO2, HCHO, O3TOT, CLDO4]" in printed
    assert "version: V03" in printed


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_missing_library(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "earthaccess", None)
    result = call(*options)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert 'pip install "spectralvae[earthdata]"' in result.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_nothing_found(archive: Archive, call: Callable[..., Result], tmp_path: Path, options: list[str]) -> None:
    result = call(*options, products=["RAD", "NO2", "CLDO4"])
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "found: 3 RAD, 3 NO2, 0 CLDO4" in result.message
    assert "2024-06-01 to 2024-06-02" in result.message
    assert not (tmp_path / "out").exists()


def test_granule_that_is_there_twice(archive: Archive, call: Callable[..., Result], tmp_path: Path) -> None:
    archive.granules.append(granule("NO2", f"{KEYS[1]}-035"))
    result = call()
    assert result.code == 2
    assert file_name("NO2", KEYS[1]) in result.message
    assert file_name("NO2", f"{KEYS[1]}-035") in result.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [RuntimeError('{"errors":["no\nsuch"]}'), OSError("no route to host")])
def test_failing_search(archive: Archive, call: Callable[..., Result], tmp_path: Path, error: Exception) -> None:
    archive.search_error = error
    result = call()
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "TEMPO_RAD_L1 V03" in result.message
    assert "such" in result.message or "no route to host" in result.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (LoginStrategyUnavailable("No .netrc found at /home/x/.netrc"), 2, ["No .netrc found", "~/.netrc"]),
        (LoginAttemptFailure("failed with:\n" + 5000 * "<html> "), 2, ["failed with", "EARTHDATA_TOKEN"]),
        (OSError("no route to host"), 1, ["no route to host", "start again"]),
    ],
)
def test_failing_login(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, error: Exception, code: int, parts: list[str]
) -> None:
    archive.login_error = error
    result = call()
    assert result.code == code
    assert result.err.count("\n") == 1
    assert len(result.message) < 600
    assert all(part in result.message for part in parts), result.message
    assert not (tmp_path / "out").exists()


def test_login_that_says_no_more_than_no(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unauthenticated = types.SimpleNamespace(authenticated=False)
    monkeypatch.setattr(sys.modules["earthaccess"], "login", lambda strategy: unauthenticated)
    result = call()
    assert result.code == 2
    assert "~/.netrc" in result.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("variable", "strategy"), [(None, "netrc"), ("EARTHDATA_TOKEN", "environment")])
def test_nobody_is_asked_for_a_password(
    archive: Archive, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, variable: str | None, strategy: str
) -> None:
    """The library's own default would, after the environment and ~/.netrc."""
    if variable:
        monkeypatch.setenv(variable, "x")
    assert call().code == 0
    assert archive.strategies == [strategy]


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (DownloadFailure("Status code: 404"), "Status code: 404"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_failing_download_names_the_file(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, error: Exception, part: str
) -> None:
    def fail(name: str) -> None:
        raise error

    archive.before = fail
    result = call()
    assert result.code == 1
    assert file_name("RAD", KEYS[0]) in result.message
    assert part in result.message
    assert files_below(tmp_path / "out") == {}
    assert state(tmp_path / "out") == "failed"


def test_download_that_brings_nothing(
    archive: Archive, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the library tells that it lost its login."""
    monkeypatch.setattr(sys.modules["earthaccess"], "download", lambda *_, **__: [])
    result = call()
    assert result.code == 1
    assert f"{file_name('RAD', KEYS[0])}: the download brought no such file" in result.message
    assert files_below(tmp_path / "out") == {}
