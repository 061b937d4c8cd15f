#!/usr/bin/env python
"""Build the wheels of a release: a pure one, and one that carries the native kernels, whose users need no compiler.

    python tools/build_wheel.py --check                  both; for the CPU, and for CUDA where a toolkit is found
    python tools/build_wheel.py --libraries build/       only the libraries, into a folder

--check installs each into a fresh environment, over the packages of this one, and runs 'iabn-hub doctor' there: it must
load the kernels that the wheel carries, or build those whose sources it carries, and they must compute what the
reference computes.

The CPU library holds every instruction set, the CUDA library every architecture of the list, compressed, and PTX for
GPUs to come. CUDA kernels that read 16 bytes at once may not spill registers; where others do, that is printed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sbom import PACKAGE, document

from iabn_hub import __version__
from iabn_hub.layers.backends import building

ROOT = Path(__file__).parent.parent


def build_of(device: str, architectures: list[str]) -> building.Build:
    if device == "cpu":
        return building.cpu_build(building.LEVELS if os.uname().machine == "x86_64" else None)
    return building.cuda_build(architectures, building.CUDA_STRICT)


def spills(log: str) -> tuple[list[str], list[str]]:
    """(kernels that may not spill but do, others), as '<kernel> <width> of <dtype> for <architecture>'.

    In the compiler's own names the width is the template's argument.
    """
    hot, others = [], []
    dtype = architecture = "?"
    kernel, width, general = "", 0, False
    for line in log.splitlines():
        if found := re.search(r"-DIABN_DTYPE=(\w+)", line):
            dtype = found[1]
        if found := re.search(
            r"Compiling entry function '\w*?((?:planes|rows)_[a-z_]+)(?:ILi(\d+)E(?:L\w*?E?(\d)E)?)?.* for '(\w+)'",
            line,
        ):
            kernel, width, architecture = found[1], int(found[2] or 0), found[4]
            general = found[3] not in (None, "0")  # for any activation and a residual, not for leaky ReLU alone
        if (found := re.search(r"(\d+) bytes spill stores", line)) and int(found[1]):
            widest = width == {"f32": 4, "f64": -1}.get(dtype, 8)  # float64 is for checks
            (hot if widest and not general else others).append(f"{kernel} {width} of {dtype} for {architecture}")
    return hot, others


def check_wide_accesses(folder: Path) -> None:
    """Kernels for the widest vectors of bfloat16 must read and write 16 bytes at once.

    Raises:
        BuildError: one does not; it would run, at a fraction of its speed.
    """
    code = folder / "bf16.ptx"
    source = building.sources() / "cuda" / "iabn_cuda_kernels.cu"
    nvcc = building.cuda_home() / "bin" / "nvcc"
    building.run(
        [
            str(nvcc),
            "-std=c++20",
            "-O3",
            "-arch=compute_80",
            f"-I{source.parent.parent / 'common'}",
            "-DIABN_DTYPE=bf16",
            "-ptx",
            str(source),
            "-o",
            str(code),
        ]
    )
    for body in code.read_text().split(".entry ")[1:]:
        name = re.search(r"((?:planes|rows)_[a-z_]+)ILi8E", body.partition("(")[0])
        if not name:
            continue
        writes = not name[1].endswith(("moments", "sums"))
        if not re.search(r"ld\.global\S*\.v4", body) or (writes and not re.search(r"st\.global\S*\.v4", body)):
            raise building.BuildError(f"{name[1]} does not access 16 bytes at once")


def build(device: str, architectures: list[str], to: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        built = build_of(device, architectures).build(Path(folder))
        hot, others = spills((Path(folder) / "build.log").read_text())
        if hot:
            raise building.BuildError(f"hot kernels spill registers: {', '.join(hot)}")
        if device == "cuda":
            check_wide_accesses(Path(folder))
            facts = {"cuda": building.cuda_major(), "architectures": architectures}
            (to / "iabn_cuda.json").write_text(json.dumps(facts))
        shutil.copy(built, to / built.name)
    size = (to / built.name).stat().st_size
    detail = f" for {', '.join(architectures)}" if device == "cuda" else ""
    print(f"{built.name}{detail}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s", flush=True)
    if others:
        print(f"  some registers spilled in kernels that are not hot: {', '.join(others)}")


def pack(libraries: Path | None, out: Path) -> Path:
    """The wheel, with these libraries and a bill of materials in it; moved to `out` when it is whole."""
    environment = {key: value for key, value in os.environ.items() if key != "IABN_HUB_NATIVE"}
    if libraries is not None:
        environment["IABN_HUB_NATIVE"] = str(libraries)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        environment["IABN_HUB_SBOM"] = str(Path(folder) / "iabn_hub.cdx.json")
        Path(environment["IABN_HUB_SBOM"]).write_text(json.dumps(document(), indent=1) + "\n")
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        (built,) = Path(folder).glob("*.whl")
        return built.replace(out / built.name)


def check(wheel: Path, native: bool) -> str:
    """Install a wheel where nothing of this package is, and let it check itself; returns what it says.

    Raises:
        BuildError: it loads other kernels than it should, or they compute something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=False, symlinks=True)
        python = environment / "bin" / "python"
        (packages,) = environment.glob("lib/python*/site-packages")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), str(wheel)]
        subprocess.run(install, check=True)
        # torch and the others, several GB, come from here; the wheel's own package stands before them.
        (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        own = {key: value for key, value in os.environ.items() if not key.startswith(("IABN_HUB_", "PYTHONPATH"))}
        settings = {"IABN_HUB_BUILD_DIR": f"{folder}/kernels", "IABN_HUB_BACKEND": "native"}
        settings["IABN_HUB_BUILD"] = "0" if native else "1"
        command = [str(python), "-m", "iabn_hub", "doctor", "--json"]
        done = subprocess.run(command, env=own | settings, cwd=folder, capture_output=True, text=True, check=False)
        try:
            devices = json.loads(done.stdout)["devices"]
        except ValueError as e:
            raise building.BuildError(f"{wheel.name} does not start: {done.stderr.strip()[-500:]}") from e
        wanted = "prebuilt with the package" if native else "built with"
        if done.returncode or not devices["cpu"]["reason"].startswith(wanted):
            raise building.BuildError(f"{wheel.name}: {devices['cpu']}")
        return "; ".join(f"{name}: {d['backend']}, {d['reason']}; {d['self_check']}" for name, d in devices.items())


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what kernels are built for."""
    parser.add_argument(
        "--devices", nargs="+", choices=("cpu", "cuda"), help="default: cpu, and cuda if it can be built"
    )
    parser.add_argument("--architectures", nargs="+", default=list(building.CUDA_ARCHITECTURES), metavar="X.Y")


def devices_of(arguments: argparse.Namespace) -> list[str]:
    """The devices that were asked for, or all that kernels can be built for here."""
    if arguments.devices is not None:
        return list(arguments.devices)
    devices = ["cpu"]
    try:
        building.cuda_home()
        devices.append("cuda")
    except building.BuildError as e:
        print(f"without CUDA: {e}", file=sys.stderr)
    return devices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_targets(parser)
    parser.add_argument("--libraries", type=Path, metavar="FOLDER", help="write the libraries there, and no wheel")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel (default: dist)")
    parser.add_argument("--check", action="store_true", help="install each wheel in a fresh environment, and try it")
    arguments = parser.parse_args()
    devices = devices_of(arguments)
    try:
        installed = version(PACKAGE)
        if installed != __version__:
            raise building.BuildError(
                f"{PACKAGE} {installed} is installed, this is {__version__}: pip install -e . first"
            )
        with tempfile.TemporaryDirectory() as folder:
            libraries = arguments.libraries or Path(folder)
            libraries.mkdir(parents=True, exist_ok=True)
            for device in devices:
                build(device, arguments.architectures, libraries)
            if arguments.libraries:
                return 0
            for native in (None, libraries):
                wheel = pack(native, arguments.out)
                print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
                if arguments.check:
                    print(f"  {check(wheel, native is not None)}", flush=True)
    except (building.BuildError, PackageNotFoundError, subprocess.CalledProcessError, OSError) as e:
        print(f"build_wheel: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
