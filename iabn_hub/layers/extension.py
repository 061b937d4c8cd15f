"""Finding the native kernels: prebuilt beside the package, else cached, else built by ninja, else none.

Nothing happens at import. The first layer that runs on a device asks `use_native`, which loads a library that
registers its kernels for the operators of `ops`; without one the reference kernels, registered already, serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

_logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
PREBUILT = PACKAGE / "_native"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: a library built for it serves every later torch
# Tables of kernels by instruction set. A machine builds the first for its float64, and the best that it can run.
LEVELS = {
    "kBaseline": ["-DIABN_FLOAT64"],
    "kV3": ["-march=x86-64-v3", "-DIABN_BF16"],
    "kV4": ["-march=x86-64-v4", "-DIABN_BF16"],
}
NEEDED = {"kV3": ("avx2", "fma", "bmi2"), "kV4": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
KERNEL_FLAGS = ["-O2", "-fno-math-errno", "-fno-trapping-math"]
DRIVER_FLAGS = ["-O1", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]  # it only prepares what the kernels do


@dataclass(frozen=True)
class Status:
    """Which kernels a device type uses, and why."""

    backend: str  # 'native' or 'reference'
    reason: str
    library: str | None = None


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why and how to mend it."""


_status: dict[str, Status] = {}


def use_native(device_type: str) -> Status:
    """Load the native kernels of a device type on the first call; later calls return what came of it.

    Raises:
        BuildError: `IABN_HUB_BACKEND=native` asks for kernels that are not to be had.
    """
    if device_type not in _status:
        _status[device_type] = _find(device_type)
    return _status[device_type]


def _find(device_type: str) -> Status:
    wanted = os.environ.get("IABN_HUB_BACKEND", "")
    if wanted not in ("", "reference", "native"):
        raise BuildError(f"IABN_HUB_BACKEND is {wanted!r}: set it to 'reference' or 'native', or leave it out")
    if wanted == "reference":
        return Status("reference", "IABN_HUB_BACKEND=reference asks for it")
    if device_type != "cpu":
        return Status("reference", f"there are no native kernels for {device_type} yet")
    try:
        path, reason = _library()
        return Status("native", reason, str(path))
    except BuildError as e:
        if wanted == "native":
            raise
        _logger.warning(
            "the native CPU kernels are not available: %s. The slower reference kernels serve; "
            "'iabn-hub doctor' tells more, IABN_HUB_BACKEND=reference silences this.",
            e,
        )
        return Status("reference", str(e))


def _library() -> tuple[Path, str]:
    """A loaded library and where it came from."""
    mode = os.environ.get("IABN_HUB_BUILD", "1")
    if mode not in ("0", "1", "force"):
        raise BuildError(f"IABN_HUB_BUILD is {mode!r}: set it to 0 (never build), 1 or force (build anew)")
    prebuilt = PREBUILT / "iabn_cpu.so"
    if prebuilt.is_file() and mode != "force":
        _load(prebuilt)
        return prebuilt, "prebuilt with the package"
    cxx = compiler()
    target = cache_folder() / f"iabn_cpu-{_key(cxx)}.so"
    if mode != "force" and _loads(target):
        return target, "built earlier, from the cache"
    if mode == "0":
        raise BuildError("IABN_HUB_BUILD=0 forbids to build them, and they are not cached")
    with _locked(target):
        if mode == "force" or not _loads(target):  # another process may have built it meanwhile
            _build(cxx, target, forget=mode == "force")
            _load(target)
    return target, f"built with {cxx}"


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as e:
        raise BuildError(f"{path} cannot be loaded ({str(e).splitlines()[0]})") from e


def _loads(path: Path) -> bool:
    """Load a cached library if it is the one that was built; a truncated one would crash the process."""
    try:
        if _digest_file(path).read_text() != _digest(path):
            return False
        _load(path)
        return True
    except (OSError, BuildError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def cache_folder() -> Path:
    """Where built libraries lie: `IABN_HUB_BUILD_DIR`, or `iabn_hub/kernels` in the user's cache folder."""
    named = os.environ.get("IABN_HUB_BUILD_DIR")
    if named:
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "iabn_hub" / "kernels"


def sources() -> Path:
    """The folder of C++ sources: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "iabn_cpu.cpp").is_file():
            return folder
    raise BuildError(f"their sources are missing: there is no csrc/iabn_cpu.cpp in {PACKAGE} or {PACKAGE.parent}")


def compiler() -> str:
    """The C++ compiler to build with: `CXX`, or the first of the usual names on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"no C++ compiler is on the PATH (looked for {', '.join(names)}); install g++ or set CXX")
    return found


def levels_here() -> dict[str, list[str]]:
    """The instruction sets to compile for on this machine, with their flags."""
    if platform.machine() != "x86_64":
        return {"kBaseline": [*LEVELS["kBaseline"], "-DIABN_BF16"]}
    features: set[str] = set()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        features = set(next(line for line in lines if line.startswith("flags")).split())
    best = [level for level, needed in NEEDED.items() if features.issuperset(needed)]
    return {level: LEVELS[level] for level in ["kBaseline", *best[-1:]]}


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, errors="replace")
    except OSError as e:
        raise BuildError(f"{command[0]} cannot be run ({e.strerror})") from e
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise BuildError(f"{Path(command[0]).name} failed ({errors[0].strip()})")
    return done.stdout


def _key(cxx: str) -> str:
    """Everything that decides what the library is."""
    digest = hashlib.sha256()
    for path in sorted(sources().glob("iabn*")):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([cxx, "--version"])
    for part in (
        torch.__version__,
        platform.machine(),
        cxx,
        version,
        repr((levels_here(), COMMON, KERNEL_FLAGS, DRIVER_FLAGS)),
    ):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{target}.lock", timeout=600)
        lock.acquire()
    except filelock.Timeout as e:
        raise BuildError(f"another process has been building them for 10 minutes (lock {e.lock_file})") from e
    except OSError as e:
        raise BuildError(
            f"the folder {target.parent} cannot be written ({e.strerror}); set IABN_HUB_BUILD_DIR to one that can"
        ) from e
    try:
        yield
    finally:
        lock.release()


def _build(cxx: str, target: Path, forget: bool) -> None:
    """Build the library aside and move it to `target`; a failure is remembered there until something changes."""
    failure = target.with_suffix(".failed")
    if failure.is_file() and not forget:
        raise BuildError(f"{failure.read_text().strip()} (remembered; IABN_HUB_BUILD=force tries again)")
    print(f"iabn_hub: building the CPU kernels once, into {target.parent}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            (Path(folder) / "build.ninja").write_text(_ninja_file(cxx))
            _run([ninja(), "-C", folder])
            built = Path(folder) / "iabn_cpu.so"
            _digest_file(target).write_text(_digest(built))
            os.replace(built, target)
        failure.unlink(missing_ok=True)
    except OSError as e:
        raise BuildError(f"{target.parent} cannot be written ({e.strerror}); set IABN_HUB_BUILD_DIR") from e
    except BuildError as e:
        with contextlib.suppress(OSError):
            failure.write_text(f"{e}\n")
        raise BuildError(f"{e}; another compiler can be named with CXX") from e


def ninja() -> str:
    """The program of the ninja package, whose folder need not be on the PATH, or one from the PATH."""
    try:
        import ninja as package  # noqa: PLC0415

        packaged = Path(package.BIN_DIR) / "ninja"
        if packaged.is_file():
            return str(packaged)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja")
    return found


def _ninja_file(cxx: str) -> str:
    csrc, root = sources(), Path(torch.__file__).parent
    levels = levels_here()
    tables = "".join(f" -DIABN_{level[1:].upper()}" for level in levels)
    quoted = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    torch_lib = quoted(root / "lib")
    lines = [
        f"cxx = {cxx}",
        f"headers = -I{quoted(root / 'include')}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{torch_lib} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,{torch_lib}",
        f"build driver.o: compile {quoted(csrc / 'iabn_cpu.cpp')}",
        f"  flags = {' '.join(COMMON + DRIVER_FLAGS)}{tables} $headers",
    ]
    for level, flags in levels.items():
        lines += [
            f"build {level}.o: compile {quoted(csrc / 'iabn_cpu_kernels.cpp')}",
            f"  flags = {' '.join([*COMMON, *KERNEL_FLAGS, *flags])} -DIABN_LEVEL={level}",
        ]
    lines.append(f"build iabn_cpu.so: link driver.o {' '.join(f'{level}.o' for level in levels)}")
    return "\n".join(lines) + "\n"
