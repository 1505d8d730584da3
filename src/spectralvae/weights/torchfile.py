"""Files of ``torch.save``: strangers' are read whole or refused, with no code from them run; ours are written whole."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralvae.errors import InputError
from spectralvae.runtime.atomic import write_atomic

# Metric lists beside the weights hold numpy scalars. The function that restores them is found through a scalar,
# since its module is private and was renamed in numpy 2. Numbers and booleans only: the state of a
# void or object dtype from a stranger's file could make numpy follow forged pointers.
_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY_GLOBALS: list[Any] = [
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
]


def _check_zip(path: Path, *, every_byte: bool) -> None:
    """Refuse archives that are not of torch.save.

    Args:
        path: the file.
        every_byte: compare all with the checksums, which ``torch.load`` does not: a flipped bit is a wrong weight.
    """
    with zipfile.ZipFile(path) as archive:
        members = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in members or "constants.pkl" in members:
            raise InputError("is a zip file, but not of torch.save (nor may it be TorchScript)", path=path)
        # torch.save never compresses; a file that unpacks to more than its size is a trap for memory
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            problem = "is a compressed archive, which torch.save never writes"
            raise InputError(problem, path=path, remedy="save it anew with torch.save")
        damaged = archive.testzip() if every_byte else None
    if damaged is not None:
        problem = f"is corrupt: the checksum of {damaged!r} does not match"
        raise InputError(problem, path=path, remedy="copy the file again")


def load_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """Read whatever ``torch.save`` put into ``path``.

    Args:
        path: the file.
        mmap: map the tensors into memory, so that only what is used of them is read. Damaged bytes in them are then
            not noticed, and files that PyTorch before 1.6 wrote are refused.

    Returns:
        Tensors on the CPU, plain values, numpy scalars, and containers of them.

    Raises:
        InputError: for a file that is missing, damaged, not of torch.save, or needs pickle code, which is not run.
    """
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(problem, path=path, remedy="give a file written by torch.save (.pt, .pth, .ckpt)")
    advice = "save the bare weights in the program that wrote it: torch.save(model.state_dict(), FILE)"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            _check_zip(path, every_byte=not mmap)
        elif magic[:1] == b"\x80" and magic[:2] != b"\x80\x02":
            raise InputError("is a plain pickle, whose code is never run", path=path, remedy=advice)
        elif magic[:1] != b"\x80":
            remedy = "give a .pt, .pth or .ckpt written by torch.save"
            raise InputError("is not a file of torch.save", path=path, remedy=remedy)
        elif mmap:
            problem = "is of the format before PyTorch 1.6, which cannot be mapped"
            raise InputError(problem, path=path, remedy="save it anew")
        with torch.serialization.safe_globals(_NUMPY_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about oddities of the file; the user gets one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f" ({name[1]})" if name else ""
        raise InputError(f"needs pickle code{needs}, which is never run", path=path, remedy=advice) from error
    except Exception as error:  # damaged bytes make torch and zipfile raise almost any class
        problem = f"is corrupt or truncated ({type(error).__name__})"
        raise InputError(problem, path=path, remedy="copy the file again") from error


def check_size(path: Path, values: list[Any]) -> None:
    """Refuse tensors that a small file makes huge by repeating one value, before any of them is unfolded.

    Args:
        path: the file.
        values: what it holds; only tensors are looked at.

    Raises:
        InputError: together they are larger than the file.
    """
    if sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor)) > path.stat().st_size:
        remedy = "save contiguous copies with torch.save"
        raise InputError("claims tensors larger than the file", path=path, remedy=remedy)


def save_torch_file(content: Any, path: Path) -> None:
    """``torch.save`` to a file that is either whole or not there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())
