"""Ctrl-C while a command of this package still imports torch ends it without a traceback."""

import signal
import sys
import threading
from pathlib import Path


def _is_command() -> bool:
    """Whether this process runs `iabn-hub`, `python -m iabn_hub` or one of tools/, not a program of the user's."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.name == "-m":  # so it is while the package behind -m is imported, whichever that is
        return sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == ["iabn_hub"] if "-m" in sys.orig_argv else False
    tools = program.absolute().parent
    of_checkout = tools.name == "tools" and (tools.parent / "hubconf.py").is_file()
    return program.name in ("iabn-hub", "iabn-hub.exe") or (of_checkout and (tools.parent / "iabn_hub").is_dir())


def end_at_interrupt() -> None:
    """Until `raise_at_interrupt`, SIGINT ends the process at once; for commands of this package alone."""
    main = threading.current_thread() is threading.main_thread()
    if main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_at_interrupt() -> None:
    """From now on SIGINT raises KeyboardInterrupt, as usual."""
    main = threading.current_thread() is threading.main_thread()
    if main and _is_command() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
