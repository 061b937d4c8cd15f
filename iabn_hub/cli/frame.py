"""What all commands share: their options, their output, and the exit code of every kind of error."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console

from .. import __version__
from ..checkpoints.catalogue import records
from ..checkpoints.errors import CatalogueError, CheckpointError, UnknownNameError
from ..layers.backends.building import BuildError
from ..recipes import RecipeError
from ..schema import shortened
from ..starting import raise_at_interrupt
from ..terminal import raw, safe_streams, without_secrets
from ..world import DeviceError

PROGRAM = "iabn-hub"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
COMMANDS = (
    "list", "info", "fetch", "verify", "doctor", "classify", "segment", "train", "validate", "export", "convert",
    "mirror", "sign", "memory", "benchmark", "demo",
)  # fmt: skip
# Options of the first release, which are accepted with a warning for one more.
RENAMED_OPTIONS = {
    "--minutes": "--snapshot-minutes",
    "--accumulate": "--accumulation-steps",
    "--longest": "--long-side",
    "--ignore": "--ignore-index",
    "--scale": "--resize",
    "--networks": "",  # its values are arguments now
}
LONGEST_NAME = 500  # characters of a path that a message shows
WIDE = 200  # columns of a table that goes to a file or a pipe


class Commands(click.Group):
    """Loads the module of a command when that command is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        try:
            command: click.Command = importlib.import_module(f"{__package__}.{name}").command
        except ModuleNotFoundError as e:
            package = (e.name or "").partition(".")[0]
            if package in ("", __name__.partition(".")[0]):
                raise
            return _without_package(name, package)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, arguments)
        return name, command, rest if command is None else _with_new_names(command, rest)


def _without_package(name: str, package: str) -> click.Command:
    """What stands for a command whose optional package is not installed: --help lists it, and using it says why."""
    reason = f"needs the package {package}: pip install 'iabn-hub[train]'"

    def refuse() -> None:
        raise click.UsageError(f"this command {reason}", click.get_current_context())

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, anything, refuse, help=f"Not available: {reason}")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def app() -> None:
    """Convolutional networks with in-place activated BatchNorm: find, fetch, verify, use, train and publish them.

    'iabn-hub classify' without arguments classifies bundled images with a bundled network, offline.

    \b
    Environment variables:
      IABN_HUB_CACHE      folder for weights
      IABN_HUB_MIRROR     http://, https:// or file:// base URL of a mirror
      IABN_HUB_CATALOGUE  further catalogue files, separated as in PATH
      IABN_HUB_OFFLINE=1  never download

    Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.

    Shell completion: eval "$(_IABN_HUB_COMPLETE=bash_source iabn-hub)", or zsh_source, fish_source.
    """


_arguments: list[str] = []


def command_line() -> str:
    """The command that runs, as it can be typed again, without passwords."""
    return without_secrets(shlex.join([PROGRAM, *_arguments]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _arguments[:] = sys.argv[1:] if arguments is None else arguments
    raise_at_interrupt()
    with safe_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app.main(None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except BrokenPipeError:  # 'iabn-hub list | head'
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except BaseException as e:
        return _exit_code(e)


def _exit_code(error: BaseException) -> int:
    """Report an error in one sentence, or in full if its kind is not known; returns the exit code of its kind."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return USAGE
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else PROGRAM
        return complain(f"{error.format_message()} (see '{where} --help')", USAGE)
    if isinstance(error, UnknownNameError | RecipeError | DeviceError):
        return complain(error, USAGE)
    if isinstance(error, CheckpointError | BuildError | FloatingPointError | ValueError):
        return complain(error, FAILED)
    if isinstance(error, OSError):
        name = shortened(str(error.filename or "output"), LONGEST_NAME)
        text = f"{name}: {error.strerror}" if error.strerror else str(error)
        return complain(text, FAILED)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return complain("interrupted", INTERRUPTED)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, Exception):
        traceback.print_exception(error)
        return complain("this is a bug in iabn_hub: please report it, with the lines above")
    raise error


def complain(message: object, code: int = FAILED) -> int:
    """Print an error on stderr; returns `code`."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _with_new_names(command: click.Command, arguments: list[str]) -> list[str]:
    """The arguments with options that the command does not have any more under their new names."""
    if isinstance(command, click.Group) and arguments:
        inner = command.get_command(click.Context(command), arguments[0])
        return arguments[:1] + _with_new_names(inner, arguments[1:]) if inner else arguments
    known = {option for parameter in command.params for option in parameter.opts}
    renamed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        new = RENAMED_OPTIONS.get(name)
        if new is None or name in known or (new and new not in known):
            renamed.append(argument)
        elif new:
            complain(f"{name} is now called {new}; the old name will be removed in the next release")
            renamed.append(new + equals + value)
        else:
            complain(f"{name} is no longer needed, and will be refused in the next release")
            renamed += [value] if equals else []
    return renamed


# ---- options ---------------------------------------------------------------------------------------------------------


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several click options as one decorator, in the order in which --help lists them."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), function)

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
device_option = click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
amp_option = click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", help="Mixed precision.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that read images, per rank."
)


class Numbers(click.ParamType[Any]):
    """A list such as 0.7,1,1.2."""

    name = "X,…"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[float, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(float(each) for each in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.7,1,1.2", parameter, context)


class Words(click.ParamType[Any]):
    """A list of some of the given words, such as palette,overlay."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known, self.name = tuple(known), "WORD,…"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[str, ...]:
        words = value if isinstance(value, tuple) else tuple(dict.fromkeys(str(value).split(",")))
        for word in words:
            if word not in self.known:
                self.fail(f"{word!r} is not one of {', '.join(self.known)}", parameter, context)
        return words


def complete_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of checkpoints for shell completion."""
    return [name for name in records() if name.startswith(incomplete)]


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Report a ValueError of an option's value as wrong usage."""
    try:
        yield
    except CatalogueError:
        raise
    except ValueError as e:
        raise click.UsageError(str(e), click.get_current_context(silent=True)) from e


# ---- output ----------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print a value as JSON, in ASCII: it is JSON on a terminal of any encoding."""
    print(json.dumps(value, indent=1))


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for whole names in a file or a pipe.

    It writes escape sequences of its own: show nothing in it that was not checked.
    """
    width = None if sys.stdout.isatty() else WIDE
    return Console(file=raw(sys.stdout), width=width, highlight=False, emoji=False, markup=False)
