"""TEMPO granules from NASA Earthdata: level 1 paired with level 2, through the `earthaccess` library.

The library searches, logs in, fetches and tries again. What is done here: pairing, and letting nothing pass under its
final name that is not whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console

from spectralvae.config import LEVEL_1, DownloadConfig
from spectralvae.errors import InputError, RunError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.console import new_progress, warn
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once

PROVIDER = "LARC_CLOUD"  # holds the collections of TEMPO
LIST = "granules.json"
SIZE_UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
# A size given in a unit is rounded, and MB may mean 1e6 or 2^20 bytes (GB differ by 7 %).
TOLERANCE = 0.1
ALGORITHMS = {"MD5": "md5", "SHA-1": "sha1", "SHA-256": "sha256", "SHA-384": "sha384", "SHA-512": "sha512"}
POLL_SECONDS = 0.2
_AGAIN = "start again to resume"


@dataclass(frozen=True)
class RemoteFile:
    """One file in the archive.

    Attributes:
        name: its name, there and here.
        bytes: its size.
        exact: whether ``bytes`` is the very size, or right within TOLERANCE.
        checksum: algorithm and hexadecimal value, where the archive gives one that can be computed here.
        concept_id: by which the archive knows it.
        granule: what the library downloads.
    """

    name: str
    bytes: int
    exact: bool
    checksum: tuple[str, str] | None
    concept_id: str
    granule: Any = field(repr=False)

    @property
    def size(self) -> str:
        """In words."""
        return f"{'' if self.exact else 'about '}{self.bytes:,} bytes"

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        checksum = dict(zip(("algorithm", "value"), self.checksum, strict=True)) if self.checksum else None
        return {
            "name": self.name,
            "bytes": self.bytes,
            "exact": self.exact,
            "checksum": checksum,
            "concept_id": self.concept_id,
        }


@dataclass(frozen=True)
class Listing:
    """What the archive holds of the asked products.

    Attributes:
        granules: key (time, scan and granule, as in the names) -> product -> file; all asked products are there.
        left_out: key -> the products that lack.
    """

    granules: dict[str, dict[str, RemoteFile]]
    left_out: dict[str, list[str]]

    def files(self, root: Path) -> list[tuple[Path, RemoteFile]]:
        """Every file and its place below ``root``, granule by granule."""
        return [
            (root / product / file.name, file)
            for products in self.granules.values()
            for product, file in products.items()
        ]


def download(config: DownloadConfig, run: RunDir, console: Console) -> None:
    """Fetch what ``config`` describes into ``run``'s directory, each product into a folder of its own.

    Raises:
        InputError: no library, no login, or no granule with all products.
        RunError: the archive failed, or what came is not what it announced.
    """
    library = import_library()
    listing = find_granules(library, config)
    log_in(library)
    with run, stop_at_once():
        listed = {key: {p: f.record() for p, f in files.items()} for key, files in listing.granules.items()}
        write_atomic(run.path / LIST, json.dumps({"granules": listed, "left_out": listing.left_out}, indent=2) + "\n")
        scratch = run.path / ".partial"
        if scratch.exists():
            shutil.rmtree(scratch)  # what an earlier start was cut off in
        scratch.mkdir()
        n_fetched = fetch_all(library, listing.files(run.path), scratch)
        shutil.rmtree(scratch)
        report_left_out(listing, console)
        console.print(f"{run.path}: {summary(listing.files(run.path), len(listing.granules))}; {n_fetched} fetched now")


def list_granules(config: DownloadConfig, console: Console) -> None:
    """Print names and bytes of what `download` would fetch; nothing is written.

    Raises:
        InputError: no library, or no granule with all products.
        RunError: the search failed.
    """
    listing = find_granules(import_library(), config)
    for key, products in listing.granules.items():
        console.print(key)
        for file in products.values():
            console.print(f"  {file.name}  {file.size}")
    report_left_out(listing, console)
    files = listing.files(config.output_dir)
    lacking = sum(f.bytes for path, f in files if not (path.is_file() and has_size(path, f)))
    console.print(f"{summary(files, len(listing.granules))}; {lacking:,} bytes to fetch into {config.output_dir}")


def report_left_out(listing: Listing, console: Console) -> None:
    """Name the granules that are not whole in the archive."""
    if listing.left_out:
        warn(console, f"{len(listing.left_out)} granules are left out, since products are not in the archive:")
    for key, missing in listing.left_out.items():
        console.print(f"  {key}: no {', '.join(missing)}")


def summary(files: Sequence[tuple[Path, RemoteFile]], n_granules: int) -> str:
    """Granules, files and bytes in words."""
    about = "" if all(file.exact for _, file in files) else "about "
    return f"{n_granules} granules, {len(files)} files, {about}{sum(file.bytes for _, file in files):,} bytes"


# --- the archive ------------------------------------------------------------------------------


def import_library() -> Any:
    """The module `earthaccess`, made to keep its messages to itself: ours tell them.

    Raises:
        InputError: it is not installed.
    """
    try:
        import earthaccess
    except ImportError as error:
        problem = f"download needs the library earthaccess ({error})"
        raise InputError(problem, remedy='pip install "spectralvae[earthdata]"') from error
    logging.getLogger("earthaccess").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning, module="earthaccess")  # it warns of calls of its own
    return earthaccess


def log_in(library: Any) -> None:
    """Log in with what the environment or else ~/.netrc holds; nobody is asked, since nobody may be there.

    Raises:
        InputError: there is no name and password, or they are not accepted.
        RunError: the server cannot be reached.
    """
    in_environment = os.environ.get("EARTHDATA_TOKEN") or os.environ.get("EARTHDATA_USERNAME")
    try:
        if library.login(strategy="environment" if in_environment else "netrc").authenticated:
            return
        reason = "name or password is missing"
    except OSError as error:
        problem = f"the login to NASA Earthdata failed ({_reason(error)})"
        raise RunError(problem, remedy="check network and token, and start again") from error
    except Exception as error:  # the library's own classes
        reason = _reason(error)
    raise InputError(
        f"no login to NASA Earthdata ({reason})",
        remedy="register at https://urs.earthdata.nasa.gov and put `machine urs.earthdata.nasa.gov login NAME "
        "password WORD` into ~/.netrc, or set EARTHDATA_TOKEN",
    )


def _reason(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300) or type(error).__name__


def find_granules(library: Any, config: DownloadConfig) -> Listing:
    """Search for every product, and pair what belongs to one scan.

    Raises:
        InputError: no granule with all products, or one twice.
        RunError: the search failed, or a granule is described in a way that does not allow to check it.
    """
    found: dict[str, dict[str, RemoteFile]] = {}
    for product in config.products:
        short_name = f"TEMPO_{product}_{'L1' if product in LEVEL_1 else 'L2'}"
        try:
            granules = library.search_data(
                short_name=short_name,
                version=config.version,
                provider=PROVIDER,
                bounding_box=tuple(config.box),
                temporal=config.period,
            )
        except Exception as error:  # RuntimeError, or whatever came from below
            raise RunError(f"the search for {short_name} {config.version} failed: {_reason(error)}") from error
        for granule in granules:
            key, file = describe(granule, f"{short_name}_{config.version}")
            other = found.setdefault(key, {}).setdefault(product, file)
            if other is not file:
                raise InputError(
                    f"the archive holds granule {key} of {short_name} twice, {other.name} ({other.concept_id}) and "
                    f"{file.name} ({file.concept_id})",
                    remedy="leave it out with start and end",
                )
    products: list[str] = list(config.products)
    missing = {key: [p for p in products if p not in found[key]] for key in sorted(found)}
    granules = {key: {p: found[key][p] for p in products} for key in missing if not missing[key]}
    if not granules:
        counts = Counter(product for files in found.values() for product in files)
        raise InputError(
            f"no granule of {config.version} with all of {', '.join(products)} in box {config.box} from "
            f"{config.start} to {config.end} (found: {', '.join(f'{counts[p]} {p}' for p in products)})",
            remedy="change box, start, end, version or products",
        )
    return Listing(granules, {key: lacking for key, lacking in missing.items() if lacking})


def describe(granule: Any, prefix: str) -> tuple[str, RemoteFile]:
    """Read a granule's record (UMM-G, the archive's metadata model).

    The name comes from the link, which is where the library takes it from, too.

    Args:
        granule: the library's ``DataGranule``.
        prefix: beginning of the file's name.

    Returns:
        The key that is common to the products of one scan, and the file.

    Raises:
        RunError: it has no such file, or no size.
    """
    concept_id = granule["meta"]["concept-id"]
    pattern = re.compile(rf"{prefix}_(\d{{8}}T\d{{6}}Z_S\d{{3}}G\d{{2}})(-\d+)?\.nc")
    links = {link.rpartition("/")[2] for link in granule.data_links()}
    matches = [match for match in map(pattern.fullmatch, sorted(links)) if match]
    if len(matches) != 1:
        names = ", ".join(sorted(links)) or "none"
        raise RunError(f"{concept_id}: one link to a file {prefix}_*.nc was expected; its links: {names}")
    name = matches[0].group()
    listed = granule["umm"].get("DataGranule", {}).get("ArchiveAndDistributionInformation", [])
    # records that were translated from an older model have a single entry of another name
    entries = [entry for entry in listed if entry.get("Name") == name] or listed
    entry = entries[0] if len(entries) == 1 else {}
    exact = "SizeInBytes" in entry
    if not exact and not ("Size" in entry and entry.get("SizeUnit") in SIZE_UNITS):
        raise RunError(f"the archive gives no size ({concept_id}), so a download could not be checked", path=name)
    size = entry["SizeInBytes"] if exact else entry["Size"] * SIZE_UNITS[entry["SizeUnit"]]
    checksum = entry.get("Checksum", {})
    known = checksum.get("Algorithm") in ALGORITHMS
    return matches[0][1], RemoteFile(
        name=name,
        bytes=int(size),
        exact=exact,
        checksum=(checksum["Algorithm"], checksum["Value"].lower()) if known else None,
        concept_id=concept_id,
        granule=granule,
    )


# --- the files --------------------------------------------------------------------------------


def has_size(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk is as long as the archive says."""
    return abs(path.stat().st_size - file.bytes) <= (0 if file.exact else TOLERANCE * file.bytes)


def has_checksum(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk holds what the archive's checksum says; without a checksum it may hold anything."""
    if file.checksum is None:
        return True
    algorithm, value = file.checksum
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, ALGORITHMS[algorithm]).hexdigest() == value


def fetch_all(library: Any, files: Sequence[tuple[Path, RemoteFile]], scratch: Path) -> int:
    """Fetch the files that are not there yet, one after the other.

    Returns:
        How many were fetched.

    Raises:
        RunError: one could not be fetched, or came other than announced.
    """
    n_fetched = done = 0
    with new_progress("{task.fields[file]}") as progress:
        task = progress.add_task("downloading, MB", total=sum(f.bytes for _, f in files) // 10**6, file="")

        def show(n_bytes: int) -> None:
            progress.update(task, completed=(done + n_bytes) // 10**6)

        for number, (path, file) in enumerate(files, 1):
            progress.update(task, file=f"file {number} of {len(files)}")
            if not (path.is_file() and has_size(path, file) and has_checksum(path, file)):
                keep(fetch(library, file, scratch, show), path, file)
                n_fetched += 1
            done += file.bytes
            show(0)
    return n_fetched


def fetch(library: Any, file: RemoteFile, scratch: Path, show: Callable[[int], None]) -> Path:
    """Let the library fetch one file.

    It works in a thread of its own, since it takes every exception for a reason to try again, a signal's too; and a
    daemon does not keep a stopped command from ending.

    Args:
        library: earthaccess.
        file: what to fetch.
        scratch: an empty folder.
        show: called with the bytes that have come, now and then.

    Raises:
        RunError: the library failed.
    """
    failures: list[Exception] = []
    ended = Event()

    def work() -> None:
        try:
            library.download([file.granule], local_path=scratch, threads=1, show_progress=False)
        except Exception as error:  # raised again below
            failures.append(error)
        finally:
            ended.set()

    Thread(target=work, daemon=True).start()
    while not ended.wait(POLL_SECONDS):
        show(_bytes_in(scratch))
    if failures:
        problem = f"the download failed ({_reason(failures[0])})"
        raise RunError(problem, path=file.name, remedy=_AGAIN) from failures[0]
    path = scratch / file.name
    if not path.is_file():  # how the library tells of some failures
        raise RunError("the download brought no such file", path=file.name, remedy=_AGAIN)
    return path


def _bytes_in(folder: Path) -> int:
    n = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # the library renames and removes meanwhile
            n += path.stat().st_size
    return n


def keep(came: Path, path: Path, file: RemoteFile) -> None:
    """Give a fetched file its final name, if it is what the archive announced.

    Raises:
        RunError: it is not; it is deleted.
    """
    wrong = ""
    if not has_size(came, file):
        wrong = f"{came.stat().st_size:,} bytes came, {file.size} were announced"
    elif not has_checksum(came, file):
        wrong = f"its checksum is not the one announced, {' '.join(file.checksum or ())}"
    if wrong:
        came.unlink()
        raise RunError(f"{wrong}; it was deleted", path=file.name, remedy="start again to fetch it anew")
    with came.open("rb") as opened:
        os.fsync(opened.fileno())
    path.parent.mkdir(exist_ok=True)
    came.replace(path)
