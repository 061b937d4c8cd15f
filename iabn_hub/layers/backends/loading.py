"""Finding the native kernels: where the caller says, prebuilt beside the package, cached, built by ninja, or none.

Nothing happens at import. The first layer that runs on a device asks `use_native`, which loads a library that
registers its kernels for the operators of `ops`; without one the reference kernels, registered already, serve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from ...files import LockTimeoutError, NoHomeError, UntrustedError, expanded, locked, require_trusted, sha256_of
from ...signing import SIGNATURE, Publisher, SignatureError, publishers, publishers_file, verify
from .building import PACKAGE, Build, BuildError, covers, cpu_build, cuda_build, cuda_major

_logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 600  # seconds that another process may take to build
PREBUILT = PACKAGE / "_native"


@dataclass(frozen=True)
class Status:
    """Which kernels a device type uses, and why."""

    backend: str  # 'native', 'inductor' (the reference, compiled) or 'reference'
    reason: str
    library: str | None = None


_status: dict[str, Status] = {}
_chosen: str | None = None  # by use_backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, all layers of the process use these kernels; for tests and comparisons.

    Args:
        name: 'reference' for the plain PyTorch kernels, 'native' for compiled ones.

    Raises:
        ValueError: another name.
        BuildError: a layer runs on a device without native kernels, and 'native' was chosen.

    Example:
        >>> import torch, iabn_hub
        >>> layer = iabn_hub.InPlaceABN(4)
        >>> with iabn_hub.use_backend("reference"):
        ...     y = layer(torch.randn(2, 4, 8, 8))
    """
    global _chosen  # noqa: PLW0603  (autograd's threads must see it, which a context variable would not reach)
    if name not in ("reference", "native"):
        raise ValueError(f"backend is {name!r}: choose reference or native")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str | None:
    """The argument of the innermost `use_backend`, or None outside of it."""
    return _chosen


def use_native(device_type: str) -> Status:
    """Load the native kernels of a device type on the first call; later calls return what came of it.

    Raises:
        BuildError: `IABN_HUB_BACKEND=native` asks for kernels that are not to be had; or a CUDA graph is captured
            before the first use.
    """
    if device_type not in _status:
        if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise BuildError(
                "a CUDA graph cannot hold the loading of the kernels: run the network once before capturing"
            )
        _status[device_type] = _find(device_type)
    status = _status[device_type]
    if _chosen == "native" and status.backend != "native":
        raise BuildError(f"native {device_type.upper()} kernels are not available: {status.reason}")
    return status


def _find(device_type: str) -> Status:
    wanted = os.environ.get("IABN_HUB_BACKEND", "")
    if wanted not in ("", "reference", "native"):
        raise BuildError(f"IABN_HUB_BACKEND is {wanted!r}: set it to 'reference' or 'native', or leave it out")
    if wanted == "reference":
        return Status("reference", "IABN_HUB_BACKEND=reference asks for it")
    if device_type not in ("cpu", "cuda"):  # meta, mps …: nothing to demand, nothing to warn about
        return Status("reference", f"there are no native kernels for {device_type}")
    try:
        path, reason = _library(device_type)
        return Status("native", reason, str(path))
    except BuildError as e:
        if wanted == "native":
            raise
        instead = "inductor" if device_type == "cuda" and has_triton() else "reference"
        _logger.warning(
            "the native %s kernels are not available: %s. The slower reference kernels serve%s; "
            "'iabn-hub doctor' tells more, IABN_HUB_BACKEND=reference silences this.",
            device_type.upper(),
            e,
            ", through torch.compile" if instead == "inductor" else "",
        )
        return Status(instead, str(e))


def _library(device_type: str) -> tuple[Path, str]:
    """A loaded library and where it came from."""
    mode = os.environ.get("IABN_HUB_BUILD", "1")
    if mode not in ("0", "1", "force"):
        raise BuildError(f"IABN_HUB_BUILD is {mode!r}: set it to 0 (never build), 1 or force (build anew)")
    if device_type == "cuda" and torch.version.cuda is None:
        raise BuildError("this torch is built without CUDA")
    published = os.environ.get("IABN_HUB_KERNELS", "")
    if published:
        place = _published_place(published)
        try:
            return _from_hub(*place, device_type), f"from the Hub, {published}"
        except BuildError as e:
            _logger.warning("%s. The other sources of kernels are tried.", e)
    prebuilt = PREBUILT / f"iabn_{device_type}.so"
    if mode != "force" and prebuilt.is_file() and _suits(prebuilt):
        try:
            _load(prebuilt)
            return prebuilt, "prebuilt with the package"
        except BuildError as e:
            _logger.info("%s; they are built instead", e)
    build = (
        cpu_build()
        if device_type == "cpu"
        else cuda_build([f"{major}.{minor}" for major, minor in capabilities_here()])
    )
    target = cache_folder() / f"{build.name}-{build.key()}.so"
    _require_trusted(target)
    if mode != "force" and _loads(target):
        return target, "built earlier, from the cache"
    if mode == "0":
        raise BuildError("IABN_HUB_BUILD=0 forbids to build them, and they are not cached")
    with _locked(target):
        if mode == "force" or not _loads(target):  # another process may have built it meanwhile
            _run(build, target, forget=mode == "force")
            _load(target)
    return target, f"built with {' and '.join(build.tools)}"


def _published_place(published: str) -> tuple[str, str]:
    """Name and commit, or name and folder. It is code that runs here, so only a full commit is taken, no branch."""
    repo, _, revision = published.partition("@")
    is_fixed = os.path.isabs(revision) or re.fullmatch(r"[0-9a-f]{40}", revision)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or not is_fixed:
        raise BuildError(
            f"IABN_HUB_KERNELS is {published!r}: write ORG/NAME@COMMIT with all 40 digits of a commit, so that the "
            "code that it names stays what it is, or ORG/NAME@FOLDER with an absolute path"
        )
    return repo, revision


def _from_hub(repo: str, revision: str, device_type: str) -> Path:
    """Load what `tools/build_kernels.py` wrote, once its publisher is known. Nothing else of the repository runs."""
    try:
        publisher = publishers().get(repo)
        if publisher is None:
            raise SignatureError(f"{repo} is not among the publishers of {publishers_file()}")
        folder = _verified_copy(_variant(repo, revision, device_type), repo, publisher)
        library = folder / f"iabn_{device_type}.abi3.so"
        _load(library)
        return library
    except ImportError as e:
        raise BuildError(f"IABN_HUB_KERNELS needs the package kernels ({e}): pip install kernels") from e
    except Exception as e:  # as many kinds as there are ways to fail on the way
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BuildError(f"IABN_HUB_KERNELS: {repo}@{revision} cannot be loaded: {first}") from e


def _verified_copy(folder: Path, repo: str, publisher: Publisher) -> Path:
    """The files of a variant, verified in the cache of kernels, where nobody else can change them afterwards.

    Raises:
        SignatureError: they are not what the publisher signed.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise SignatureError(f"{folder} is not signed: there is no {SIGNATURE} in it")
    copy = cache_folder() / f"published-{sha256_of(signature)[:16]}"
    _require_trusted(copy)
    copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(copy), tempfile.TemporaryDirectory(dir=copy.parent, prefix="published-") as place:
        if not copy.is_dir():
            fresh = Path(place) / "variant"
            shutil.copytree(folder, fresh)  # what links lead to, not the links
            verify(fresh, repo, publisher)
            os.replace(fresh, copy)
    verify(copy, repo, publisher)
    return copy


def _variant(repo: str, revision: str, device_type: str) -> Path:
    """The folder of a repository with the library for this machine, downloaded if necessary."""
    import kernels  # noqa: PLC0415 - few have it
    from kernels.resolver import resolve_local_kernel  # noqa: PLC0415

    backend = "cpu" if device_type == "cpu" else None
    if os.path.isabs(revision):
        return Path(resolve_local_kernel(Path(revision), backend=backend).variant_path)
    return Path(kernels.install_kernel(repo, revision=revision, backend=backend, trust_remote_code=[repo]))


def _suits(prebuilt: Path) -> bool:
    """Whether a library of the package is for this CUDA and these GPUs, which stands in a file beside it."""
    facts = prebuilt.with_suffix(".json")
    if not facts.is_file():  # a CPU library, which suits any CPU of its architecture
        return True
    made_for = json.loads(facts.read_text())
    gpus = capabilities_here()
    return made_for["cuda"] == cuda_major() and all(covers(made_for["architectures"], gpu) for gpu in gpus)


def capabilities_here() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs of this machine, each once."""
    return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as e:
        raise BuildError(f"{path} cannot be loaded ({str(e).splitlines()[0]})") from e


def _loads(path: Path) -> bool:
    """Load a cached library if it is the one that was built; a truncated one would crash the process."""
    try:
        if _digest_file(path).read_text() != sha256_of(path):
            return False
        _load(path)
        return True
    except (OSError, BuildError):
        return False


def _require_trusted(target: Path) -> None:
    """Make sure that nobody else could have put what is executed or printed into the cache."""
    try:
        for path in (target, _digest_file(target), target.with_suffix(".failed")):
            require_trusted(path)
    except UntrustedError as e:
        raise BuildError(
            f"kernels are code, and {e}: set IABN_HUB_BUILD_DIR to a folder that only you can write, such as one in "
            "your home"
        ) from e


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def cache_folder() -> Path:
    """Where built libraries lie: `IABN_HUB_BUILD_DIR`, or `iabn_hub/kernels` in the user's cache folder."""
    named = os.environ.get("IABN_HUB_BUILD_DIR")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return expanded(named or Path(root) / "iabn_hub" / "kernels", "IABN_HUB_BUILD_DIR")
    except NoHomeError as e:
        raise BuildError(str(e)) from e


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(target, LOCK_TIMEOUT))
        except LockTimeoutError as e:
            raise BuildError(f"{e}; it may be building the kernels, or have died") from e
        except OSError as e:
            raise BuildError(
                f"the folder {target.parent} cannot be written ({e.strerror}); set IABN_HUB_BUILD_DIR to one that can"
            ) from e
        yield


def _run(build: Build, target: Path, forget: bool) -> None:
    """Build the library aside and move it to `target`; a failure is remembered there until something changes."""
    failure = target.with_suffix(".failed")
    if failure.is_file() and not forget:
        raise BuildError(f"{failure.read_text().strip()} (remembered; IABN_HUB_BUILD=force tries again)")
    device = build.name.removeprefix("iabn_").upper()
    print(f"iabn_hub: building the {device} kernels once, into {target.parent}", file=sys.stderr)
    prefix = f"build-{target.stem}-"
    for left in target.parent.glob(f"{prefix}*"):  # of a build that was killed: this process holds its lock
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
            built = build.build(Path(folder))
            _digest_file(target).write_text(sha256_of(built))
            os.replace(built, target)
        failure.unlink(missing_ok=True)
    except OSError as e:
        raise BuildError(f"{target.parent} cannot be written ({e.strerror}); set IABN_HUB_BUILD_DIR") from e
    except BuildError as e:
        with contextlib.suppress(OSError):
            failure.write_text(f"{e}\n")
        raise BuildError(f"{e}; another compiler can be named with CXX") from e
