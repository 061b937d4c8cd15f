"""How the native kernels are built: compilers, flags, and the ninja file of a library. Nothing here runs at import."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent.parent.parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10: a library built for it serves every later torch
# Tables of CPU kernels by instruction set. A machine builds the first for its float64, and the best that it can run.
LEVELS = {
    "kBaseline": ["-DIABN_FLOAT64"],
    "kV3": ["-march=x86-64-v3", "-DIABN_BF16"],
    "kV4": ["-march=x86-64-v4", "-DIABN_BF16"],
}
NEEDED = {"kV3": ("avx2", "fma", "bmi2"), "kV4": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
CAPABILITY = "IABN_HUB_CPU_CAPABILITY"  # caps the level, as ATEN_CPU_CAPABILITY does for torch's own kernels
CAPABILITIES = {"default": "kBaseline", "avx2": "kV3", "avx512": "kV4"}
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
KERNEL_FLAGS = ["-O2", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math"]
DRIVER_FLAGS = ["-O1", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]  # it only prepares what the kernels do
CUDA_DTYPES = ("f32", "f64", "bf16", "f16")
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CUDA_FLAGS_VARIABLE = "IABN_HUB_CUDA_FLAGS"  # further flags, such as -DIABN_UNDER_WAY=4, for measurements
CUDA_STRICT = ["-Werror=all-warnings", "-Xptxas=-v"]  # for what is published
# What a wheel carries: from Turing to Blackwell, and code that the driver compiles for what comes later.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why and how to mend it."""


@dataclass(frozen=True)
class Build:
    """A library to build: the file `<name>.so` that ninja makes from `ninja_file`."""

    name: str
    tools: tuple[str, ...]  # compilers, whose versions decide what comes out
    ninja_file: str

    def key(self) -> str:
        """Everything that decides what the library is."""
        digest = hashlib.sha256()
        for path in sorted(sources().glob("*/iabn*")):
            digest.update(path.name.encode() + path.read_bytes())
        versions = [run([tool, "--version"]) for tool in self.tools]
        for part in (torch.__version__, platform.machine(), *self.tools, *versions, self.ninja_file):
            digest.update(part.encode())
        return digest.hexdigest()[:16]

    def build(self, folder: Path) -> Path:
        """The library, built in `folder`, beside what the compilers said in build.log."""
        (folder / "build.ninja").write_text(self.ninja_file)
        (folder / "build.log").write_text(run([ninja(), "-v", "-C", str(folder)]))
        return folder / f"{self.name}.so"


def run(command: list[str], both: bool = False) -> str:
    """What a program prints; with `both`, on stderr too.

    Raises:
        BuildError: it cannot be run or fails, with the first line that speaks of an error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    except OSError as e:
        raise BuildError(f"{command[0]} cannot be run ({e.strerror})") from e
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = (
            [line for line in lines if re.search(r"(?<![\w-])error\b", line, re.IGNORECASE)]
            or lines[-1:]
            or ["no output"]
        )
        raise BuildError(f"{Path(command[0]).name} failed ({errors[0].strip()})")
    return done.stdout + (done.stderr if both else "")


# ---- what there is to build with -------------------------------------------------------------------------------------


def sources() -> Path:
    """The folder of C++ sources: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "cpu" / "iabn_cpu.cpp").is_file():
            return folder
    raise BuildError(f"their sources are missing: there is no csrc/cpu/iabn_cpu.cpp in {PACKAGE} or {PACKAGE.parent}")


def compiler() -> str:
    """The C++ compiler to build with: `CXX`, or the first of the usual names on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"no C++ compiler is on the PATH (looked for {', '.join(names)}); install g++ or set CXX")
    return found


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


def cuda_home() -> Path:
    """The folder of a CUDA toolkit that suits this torch: `CUDA_HOME`, `CUDA_PATH`, the usual place, or nvcc's own."""
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    places = [Path(p) for p in named] or [
        Path("/usr/local/cuda"),
        *([Path(on_path).resolve().parent.parent] if on_path else []),
    ]
    why = "the folder that holds bin/nvcc and lib64/libcudart_static.a"
    for home in places:
        if not ((home / "bin" / "nvcc").is_file() and cudart_folder(home)):
            continue
        found = re.search(r"release (\d+)\.", run([str(home / "bin" / "nvcc"), "--version"]))
        if found and found[1] == cuda_major():
            return home
        release = found[1] if found else "?"
        why = f"{home} is CUDA {release}, but torch is built with CUDA {torch.version.cuda}"
    looked = ", ".join(map(str, places))
    raise BuildError(
        f"no CUDA {cuda_major()} toolkit was found (looked in {looked}); install one with nvcc, or set CUDA_HOME to "
        f"its own folder ({why})"
    )


def cuda_major() -> str:
    """Of the CUDA that torch is built with, such as '13'; empty without."""
    return (torch.version.cuda or "").partition(".")[0]


def cudart_folder(home: Path) -> Path | None:
    """Where a toolkit has the runtime library that is linked into ours."""
    folders = (home / "lib64", home / "lib", home / "targets" / "x86_64-linux" / "lib")
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability."""
    for architecture in architectures:
        major, minor = map(int, architecture.removesuffix("+PTX").split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if architecture.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


# ---- builds ----------------------------------------------------------------------------------------------------------


def levels_here() -> dict[str, list[str]]:
    """The instruction sets to compile for on this machine, with their flags; `IABN_HUB_CPU_CAPABILITY` caps them.

    Raises:
        BuildError: that variable has another value than 'default', 'avx2' or 'avx512'.
    """
    cap = os.environ.get(CAPABILITY, "")
    if cap and cap not in CAPABILITIES:
        raise BuildError(f"{CAPABILITY} is {cap!r}: set it to {', '.join(CAPABILITIES)}, or leave it out")
    if platform.machine() != "x86_64":
        return {"kBaseline": [*LEVELS["kBaseline"], "-DIABN_BF16"]}
    features: set[str] = set()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        features = set(next(line for line in lines if line.startswith("flags")).split())
    allowed = list(LEVELS)[: list(LEVELS).index(CAPABILITIES[cap or "avx512"]) + 1]
    best = [level for level, needed in NEEDED.items() if level in allowed and features.issuperset(needed)]
    return {level: LEVELS[level] for level in ["kBaseline", *best[-1:]]}


def cpu_build(levels: dict[str, list[str]] | None = None) -> Build:
    """The CPU library, for the instruction sets of this machine or for those given."""
    cxx, csrc = compiler(), sources()
    levels = levels_here() if levels is None else levels
    common = _argument(f"-I{csrc / 'common'}")
    tables = [f"-DIABN_{level[1:].upper()}" for level in levels]
    edges = [
        _edge("cxx", "driver", csrc / "cpu" / "iabn_cpu.cpp", [*COMMON, *DRIVER_FLAGS, common, *tables, *_headers()])
    ]
    for level, flags in levels.items():
        flags = [*COMMON, *KERNEL_FLAGS, common, *flags, f"-DIABN_LEVEL={level}"]
        edges.append(_edge("cxx", level, csrc / "cpu" / "iabn_cpu_kernels.cpp", flags))
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    return Build("iabn_cpu", (cxx,), _ninja_file("iabn_cpu", cxx, "", ["driver", *levels], libraries, edges))


def cuda_build(architectures: Iterable[str], extra: Iterable[str] = ()) -> Build:
    """The CUDA library for compute capabilities such as '9.0', or '12.0+PTX'; `extra` flags go to nvcc."""
    cxx, csrc, home = compiler(), sources(), cuda_home()
    extra = [*extra, *os.environ.get(CUDA_FLAGS_VARIABLE, "").split()]
    codes = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
        codes.append(f"-gencode=arch=compute_{number},code={code}")
    common, include = (_argument(f"-I{folder}") for folder in (csrc / "common", home / "include"))
    defines = [flag for flag in extra if flag.startswith("-D")]
    driver = [*COMMON, *DRIVER_FLAGS, "-DUSE_CUDA", *defines, common, include, *_headers()]
    edges = [_edge("cxx", "driver", csrc / "cuda" / "iabn_cuda.cpp", driver)]
    for dtype in CUDA_DTYPES:
        flags = [*CUDA_FLAGS, common, *codes, *extra, f"-DIABN_DTYPE={dtype}"]
        edges.append(_edge("nvcc", dtype, csrc / "cuda" / "iabn_cuda_kernels.cu", flags))
    # The runtime is linked statically: it serves whatever CUDA runtime of the same major version torch brings.
    libraries = [_argument(f"-L{cudart_folder(home) or home}"), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"]
    nvcc = str(home / "bin" / "nvcc")
    text = _ninja_file("iabn_cuda", cxx, nvcc, ["driver", *CUDA_DTYPES], libraries, edges)
    return Build("iabn_cuda", (cxx, nvcc), text)


def _argument(text: str) -> str:
    """One argument of a command: quoted for the shell, and then for ninja."""
    return shlex.quote(text).replace("$", "$$")


def _headers() -> list[str]:
    return [_argument(f"-I{Path(torch.__file__).parent / 'include'}")]


def _edge(rule: str, name: str, source: Path, flags: list[str]) -> str:
    path = re.sub("[$ :]", r"$\g<0>", str(source))  # ninja quotes it for the shell
    return f"build {name}.o: {rule} {path}\n  flags = {' '.join(flags)}"


def _ninja_file(name: str, cxx: str, nvcc: str, objects: list[str], libraries: list[str], edges: list[str]) -> str:
    torch_lib = _argument(f"-L{Path(torch.__file__).parent / 'lib'}")
    cxx, nvcc = _argument(cxx), _argument(nvcc)
    lines = [
        "rule cxx",
        f"  command = {cxx} $flags -c $in -o $out",
        "rule nvcc",
        f"  command = {nvcc} -ccbin {cxx} $flags -c $in -o $out",
        "rule link",
        f"  command = {cxx} -shared $in -o $out {torch_lib} {' '.join(libraries)}",
        *edges,
        f"build {name}.so: link {' '.join(f'{each}.o' for each in objects)}",
    ]
    return "\n".join(lines) + "\n"
