#!/usr/bin/env python
"""Build the native kernels as a repository for the package `kernels`, so that its users need no compiler.

    python tools/build_kernels.py dist/kernels                 CPU, and CUDA where a toolkit is found
    python tools/build_kernels.py dist/kernels --devices cpu
    python tools/build_kernels.py dist/kernels --sign key.pem --name ORG/iabn --release 3

    hf upload ORG/iabn dist/kernels . --repo-type kernel       sends it to the Hub

The folder receives build/VARIANT/ for each device, named after the stable ABI of torch 2.10, and a README.md. Then

    IABN_HUB_KERNELS=ORG/iabn@COMMIT

makes the layer take them instead of building its own, if they are signed by the publisher that the user's list names
for ORG/iabn (iabn_hub.signing). A key is made with

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from build_wheel import add_targets, build, devices_of

from iabn_hub import __version__
from iabn_hub.files import sha256_of
from iabn_hub.layers import ops as schemas
from iabn_hub.layers.backends import building
from iabn_hub.signing import SignatureError, public_key_of, sign

ROOT = Path(__file__).parent.parent
INIT = '''"""The operators of in-place activated BatchNorm, compiled, in torch.ops.iabn_hub."""

from ._ops import LIBRARY, ops

__all__ = ["LIBRARY", "ops"]
'''
OPS = '''"""The library, for the operators that iabn_hub defines or, without it, the copy of its schemas."""

from pathlib import Path

import torch

try:
    import iabn_hub.layers.ops
except ImportError:
    from . import _schemas

LIBRARY = str(Path(__file__).with_name("{library}"))
torch.ops.load_library(LIBRARY)
ops = torch.ops.iabn_hub
'''
README = """---
library_name: kernels
license: apache-2.0
tags: [kernel, in-place-abn]
---

# Kernels of in-place activated BatchNorm

Compiled for torch 2.10 and later (stable ABI) by `tools/build_kernels.py` of iabn_hub {version}.

```python
import kernels

iabn = kernels.get_kernel("ORG/iabn", revision="COMMIT", trust_remote_code=["ORG/iabn"])
mean, var = iabn.ops.statistics(x)  # x: (N, C, *)
```

The layer itself, with its backward pass, is in the package iabn_hub; `IABN_HUB_KERNELS=ORG/iabn@COMMIT` makes it load
these instead of building its own.

| variant | bytes | sha256 of the library |
|---|---|---|
{rows}
"""


def cuda_version() -> str:
    """'13.0' of the toolkit that builds."""
    facts = building.cuda_home() / "version.json"
    if facts.is_file():
        release = json.loads(facts.read_text())["cuda"]["version"]
    else:
        nvcc = str(building.cuda_home() / "bin" / "nvcc")
        release = building.run([nvcc, "--version"]).partition("release ")[2].partition(",")[0]
    return ".".join(release.split(".")[:2])


def variant(device: str) -> str:
    """The name by which `kernels` finds what suits a machine."""
    backend = "cpu" if device == "cpu" else "cu" + cuda_version().replace(".", "")
    return f"torch-stable-abi210-{backend}-{platform.machine()}-{platform.system().lower()}"


def write_variant(
    out: Path, device: str, architectures: list[str], signed: Callable[[Path], None] | None = None
) -> tuple[str, Path]:
    """Build one variant aside, sign it, and move it into place; returns its name and its library."""
    name = variant(device)
    (out / "build").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out / "build", prefix=".partial-") as folder:
        part = Path(folder) / name
        part.mkdir()
        build(device, architectures, part)
        library = complete(part, device, architectures)
        if signed:
            signed(part)
        target = out / "build" / name
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    return name, target / library.name


def complete(part: Path, device: str, architectures: list[str]) -> Path:
    """Put beside a library what `kernels` needs of it; returns the library under its new name."""
    (part / "iabn_cuda.json").unlink(missing_ok=True)  # metadata.json says it here
    library = part / f"iabn_{device}.abi3.so"
    (part / f"iabn_{device}.so").rename(library)
    (part / "__init__.py").write_text(INIT)
    (part / "_ops.py").write_text(OPS.format(library=library.name))
    shutil.copy(schemas.__file__, part / "_schemas.py")
    backend = {"type": device} if device == "cpu" else {"type": device, "archs": architectures}
    digest = sha256_of(library)
    facts = {"id": f"iabn_{device}_{digest[:12]}", "name": "iabn", "version": 1, "license": "Apache-2.0",
             "python-depends": [], "backend": backend}  # fmt: skip
    (part / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n")
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the repository; variants of other devices there are kept")
    add_targets(parser)
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign every variant with this private key (PEM)")
    parser.add_argument("--name", metavar="ORG/NAME", help="the repository that it will be, with --sign")
    parser.add_argument("--release", type=int, metavar="N", help="a number that grows with each release, with --sign")
    arguments = parser.parse_args()
    if arguments.sign and not (arguments.name and arguments.release):
        parser.error("--sign needs --name and --release")
    devices = devices_of(arguments)
    if arguments.out.is_dir() and any(arguments.out.iterdir()) and not (arguments.out / "build").is_dir():
        parser.error(f"{arguments.out} holds other files: name another folder")

    def signed(folder: Path) -> None:
        if arguments.sign:
            files = [path.name for path in folder.iterdir()]
            sign(folder, files, arguments.name, arguments.release, arguments.sign)

    try:
        if arguments.sign:
            public_key_of(arguments.sign)  # before minutes of building
        for device in devices:
            _, library = write_variant(arguments.out, device, arguments.architectures, signed)
            print(f"{library.parent}: {library.stat().st_size:,} bytes")
    except (building.BuildError, SignatureError, OSError) as e:
        print(f"build_kernels: {e}", file=sys.stderr)
        return 1
    rows = [
        f"| {library.parent.name} | {library.stat().st_size:,} | {sha256_of(library)} |"
        for library in sorted((arguments.out / "build").glob("*/*.so"))
    ]
    (arguments.out / "README.md").write_text(README.format(version=__version__, rows="\n".join(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
