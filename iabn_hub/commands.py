"""What all commands do alike: their exit codes, their complaints, and the limits of their numbers."""

from __future__ import annotations

import argparse
import sys

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def complain(program: str, message: object, code: int) -> int:
    """Say on stderr what is wrong; returns `code`."""
    print(f"{program}: {message}", file=sys.stderr)
    return code


def check_least(parser: argparse.ArgumentParser, arguments: argparse.Namespace, **least: int) -> None:
    """Refuse a number below its least value as wrong usage; one that was not given is fine."""
    for name, low in least.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be {low} or more")
