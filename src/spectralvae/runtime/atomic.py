"""Files that are either whole or absent, and one line for a disk without room."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectralvae.errors import NoRoomError

NO_ROOM = {  # errno -> what to do
    errno.ENOSPC: "make room",
    errno.EDQUOT: "delete what you can spare, or have the quota raised,",
    errno.EFBIG: "raise `ulimit -f`",
}


@contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """Make one line of whatever tells that there is no room; what is free is looked up once the block is left.

    Args:
        path: what is being written, named in place of its parts and temporary files.
        needed: how many bytes it takes, where known.

    Raises:
        NoRoomError: the disk is full, a quota used up, or a file larger than files may be.
    """
    try:
        yield
    except (OSError, NoRoomError) as error:
        cause = error.__cause__ if isinstance(error, NoRoomError) else error
        if not isinstance(cause, OSError) or cause.errno not in NO_ROOM:
            raise
        raise no_room_error(cause, path, needed) from cause


def no_room_error(error: OSError, path: Path, needed: int | None) -> NoRoomError:
    assert error.errno is not None
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    figures = [f"{shutil.disk_usage(nearest).free:,} bytes are free"]
    if needed is not None:
        figures.insert(0, f"{needed:,} bytes are needed")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if error.errno == errno.EFBIG and limit != resource.RLIM_INFINITY:  # else it is the file system's
        figures.append(f"{limit:,} bytes are the limit of a file")
    remedy = f"{NO_ROOM[error.errno]} and start again"
    return NoRoomError(f"{os.strerror(error.errno)}: {', '.join(figures)}", path=path, remedy=remedy)


def write_atomic(path: Path, *content: bytes | str) -> None:
    """Write a file that is either whole or not there: temporary name, fsync, replace.

    Args:
        path: the file.
        content: its parts, one after the other.

    Raises:
        NoRoomError: it does not fit; nothing of it stays.
    """
    parts = [part.encode() if isinstance(part, str) else part for part in content]
    temporary = path.with_name(f".{path.name}.tmp")
    with room_for(path, sum(map(len, parts))):
        try:
            with temporary.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
