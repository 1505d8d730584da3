"""What benchmarks tell on stderr while they work, and their quick form."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

_begun = time.monotonic()


def say(text: str) -> None:
    """Print what is being done, with the seconds since the start."""
    print(f"{time.monotonic() - _begun:6.0f} s  {text}", file=sys.stderr, flush=True)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: dict[str, Any]
) -> argparse.Namespace:
    """The options of a command line with ``--quick``, which replaces the defaults of some of them.

    Args:
        parser: knows all options but ``--quick``.
        arguments: None for those of the process.
        quick: the defaults of the quick form.
    """
    values = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a first impression in a minute or two: {values}")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)
