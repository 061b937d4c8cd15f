"""Builds the CUDA kernels for the host and runs them; as a script on a library, and with exit 1 if that is wrong."""

import ctypes
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from iabn_hub.layers import reference
from iabn_hub.layers.backends import building

HERE = Path(__file__).parent
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
NUMBERS = {dtype: i for i, dtype in enumerate(DTYPES.values())}
# Error allowed, relative to the size of the terms: rounding in the stored dtype, and of sums in the accumulate dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
STATISTICS, NORMALIZE, FUSED_FORWARD, GRADIENT_SUMS, INPUT_GRADIENT, FUSED_BACKWARD = range(6)
POISON = 77.0


def build(folder: Path, dtypes: dict[str, torch.dtype] = DTYPES, planted: tuple[str, str] | None = None) -> Path:
    """A library of the kernels, with the text `planted[0]` replaced by `planted[1]`."""
    csrc = building.sources()
    places = 0
    for name in ("iabn_cuda_kernels.cu", "iabn_cuda_parts.h"):
        text = (csrc / name).read_text()
        if planted:
            places += text.count(planted[0])
            text = text.replace(*planted)
        (folder / name).write_text(text)
    assert places == (1 if planted else 0), f"{places} places hold {planted}"
    kernels = folder / "iabn_cuda_kernels.cu"
    compile_ = [
        building.compiler(), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DIABN_ON_HOST",
        f"-I{csrc}", f"-I{HERE}",
    ]  # fmt: skip

    def compiled(arguments: list[str], to: Path) -> Path:
        done = subprocess.run([*compile_, *arguments, "-o", str(to)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return to

    def kernels_of(name: str) -> Path:
        source = ["-include", "cuda_on_host.h", f"-DIABN_DTYPE={name}", "-x", "c++", "-c", str(kernels)]
        return compiled(source, folder / f"{name}.o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(kernels_of, dtypes))
    missing = "".join(f" -DIABN_WITHOUT_{name}" for name in DTYPES if name not in dtypes).split()
    host = compiled([*missing, "-c", str(HERE / "host.cpp")], folder / "host.o")
    return compiled(["-shared", *map(str, objects), str(host)], folder / "kernels.so")


class Shape(ctypes.Structure):
    _fields_ = [
        ("outer", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("rows", ctypes.c_bool),
    ]


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("outer", "channel", "inner")]


class Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64)]


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("width", "x", "y", "tiles", "parts")]


VECTORS = ("weight", "bias", "mean", "var", "mean_dz", "mean_dz_xhat")


class Call(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("operation", "dtype", "element_bytes")],
        ("shape", Shape),
        ("operands", Operand * 5),
        *[(name, Vector) for name in VECTORS],
        *[(name, ctypes.c_int64) for name in ("activation", "signed_scale")],
        *[(name, ctypes.c_double) for name in ("param", "lowest", "eps", "share")],
        *[(name, ctypes.c_int64) for name in ("alignment", "processors", "shared_bytes")],
        ("out", ctypes.c_void_p * 2),
        ("partial", ctypes.c_void_p),
        ("plan", Plan),
    ]


class Guarded:
    """A tensor (N, C, S) in rows or planes, `shift` elements into memory whose other values must stay as they are."""

    def __init__(self, values: Tensor | None, like: Tensor, rows: bool, shift: int, gap: int):
        n, c, s = like.shape
        self.rows = rows
        strides = (s * (c + gap), 1, c + gap) if rows else ((c * s) + gap, s, 1)
        self.memory = torch.full((n * strides[0] + shift + 64,), POISON, dtype=like.dtype)
        self.view = self.memory.as_strided((n, c, s), strides, shift)
        if values is not None:
            self.view.copy_(values)

    def operand(self) -> Operand:
        n, c, _ = self.view.shape
        outer, channel, inner = self.view.stride()
        return Operand(self.view.data_ptr(), 0 if self.rows or n == 1 else outer, 1 if c == 1 else channel, inner)

    def alignment(self) -> int:
        bits = 16 | self.view.data_ptr()
        for stride in self.view.stride()[:: 2 if self.rows else 1]:
            bits |= stride * self.view.element_size() if stride != 1 else 0
        return bits & -bits

    def assert_untouched(self) -> None:
        outside = self.memory.clone()
        outside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(POISON)
        assert (outside == POISON).all(), "values beside the tensor were overwritten"


def vector(v: Tensor | None) -> Vector:
    return Vector() if v is None else Vector(v.data_ptr(), NUMBERS[v.dtype], v.stride(0))


class Library:
    def __init__(self, path: Path):
        self.run = ctypes.CDLL(str(path)).iabn_run

    def __call__(self, operation: int, x: Tensor, rows: bool, operands: list[Guarded | None], options: tuple, **given):
        """(out0, out1, plan), or None if no kernel keeps so large a channel in shared memory."""
        weight, bias, eps, activation, param, signed = options
        n, c, s = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = [torch.full((c,), POISON, dtype=wide) for _ in range(2)]
        partial = torch.full((3 * 1024 * c,), math.nan, dtype=wide)
        call = Call(
            operation=operation,
            dtype=NUMBERS[x.dtype],
            element_bytes=x.element_size(),
            shape=Shape(1, c, n * s, True) if rows else Shape(n, c, s, False),
            activation=activation,
            signed_scale=signed,
            param=param,
            lowest=math.log(torch.finfo(x.dtype).eps / 4),
            eps=eps,
            share=given.pop("share", 1.0),
            alignment=min(o.alignment() for o in operands if o),
            processors=given.pop("processors", 4),
            shared_bytes=given.pop("shared_bytes", 100 << 10),
            partial=partial.data_ptr(),
            weight=vector(weight),
            bias=vector(bias),
            **{name: vector(v) for name, v in given.items()},
        )
        for i, o in enumerate(operands):
            if o:
                call.operands[i] = o.operand()
        call.out[0], call.out[1] = (v.data_ptr() for v in out)
        if self.run(ctypes.byref(call)):
            return None
        return *out, call.plan


def assert_near(ours: Tensor, exact: Tensor, size: Tensor, tolerance: float, what: str) -> None:
    size = size.double().view(1, -1, *[1] * (ours.dim() - 2)) if ours.dim() > 1 else size.double()
    error = ((ours.double() - exact.double()).abs() / size.clamp(min=1e-300)).max()
    assert error <= tolerance, f"{what} is off by {error:.1e} of the size of its terms"


def check(library: Library, shape: tuple[int, int, int], dtype: torch.dtype, rows: bool, *, seed: int = 0,
          activation: tuple[int, float] = (1, 0.01), affine: torch.dtype | None = torch.float32, joined: bool = False,
          signed: bool = False, shift: int = 0, gap: int = 0, mean: float = 0.0, in_place: bool = True,
          processors: int = 4, shared_bytes: int = 100 << 10) -> list[Plan]:  # fmt: skip
    """Compare every launcher with the formulas in float64; the plans that were taken."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    n, c, s = shape
    x, dy, r = ((random(*shape) + m).to(dtype) for m in (mean, 0, 0))
    weight = bias = None
    if affine:
        weight = random(c).to(affine)
        weight[: min(2, c - 1)] = 0
        bias = random(c).to(affine)
    residual = r if joined else None
    tolerance, loose = TOLERANCE[dtype], TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    options = (weight, bias, 1e-5, *activation, signed)

    def exactly(v):
        return v.double() if isinstance(v, Tensor) else v

    recover = tuple(map(exactly, (weight, bias, residual, *options[2:])))
    held = lambda values: Guarded(values, x, rows, shift, gap)  # noqa: E731
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact_mean, exact_var = reference.statistics(x.double())
    spread = exact_var + exact_mean.square() * torch.finfo(wide).eps ** 2 + 1e-300
    plans = []

    def statistics_right(found_mean, found_var, what):
        assert_near(found_mean, exact_mean, x.double().abs().amax((0, 2)) + 1e-300, loose, f"{what}: mean")
        assert_near(found_var, exact_var, spread, 1e3 * loose if mean else 10 * loose, f"{what}: var")

    # forward
    gx = held(x)
    *found, plan = library(STATISTICS, x, rows, [gx], options, processors=processors, shared_bytes=shared_bytes)
    plans.append(plan)
    statistics_right(*found, "statistics")
    exact_y = reference.normalize(x.double(), exact_mean, exact_var, *recover)
    y_size = exact_y.abs().amax((0, 2)) + (r.double().abs().amax((0, 2)) if joined else 0) + 1e-300
    given = {"mean": exact_mean.to(wide), "var": exact_var.to(wide)}
    rounded = reference.normalize(x.double(), *(v.double() for v in given.values()), *recover)
    gr = held(r) if joined else None
    gy = gx if in_place else held(None)
    *_, plan = library(
        NORMALIZE, x, rows, [gx, gr, gy], options, **given, processors=processors, shared_bytes=shared_bytes
    )
    assert_near(gy.view, rounded, y_size, 10 * tolerance if dtype == wide else tolerance, "normalize")
    gy.assert_untouched()
    gx = held(x)
    gy = gx if in_place else held(None)
    fused = library(FUSED_FORWARD, x, rows, [gx, gr, gy], options, processors=processors, shared_bytes=shared_bytes)
    if fused:
        plans.append(fused[2])
        statistics_right(*fused[:2], "fused forward")
        far = 1 + (exact_mean.abs() / (exact_var + 1e-5).sqrt()).max().item() * (dtype == wide)
        assert_near(gy.view, exact_y, y_size, 10 * tolerance * far, "fused forward")
        gy.assert_untouched()

    # backward, from the y that is stored
    y = exact_y.to(dtype)
    var = exact_var.to(wide)
    column = (1, -1, 1)
    z = reference.invert(y.double(), *activation, torch.finfo(dtype).eps)
    invert = z.abs().amax((0, 2))
    gamma = torch.ones(c, dtype=torch.float64)
    if weight is not None and bias is not None:
        gamma = reference.effective_scale(weight.double(), 1e-5, signed)
        z = z - bias.double().view(column)
    if joined:
        z = z - r.double()
    xhat = z / gamma.view(column)
    dz = reference.gradient(y.double(), dy.double(), *activation)
    exact_sums = dz.sum((0, 2)), (dz * xhat).sum((0, 2))
    scale = (gamma / (var.double() + 1e-5).sqrt()).view(column)
    gamma = gamma.abs()
    terms = (invert + (bias.double().abs() if affine else 0) + (r.double().abs().amax((0, 2)) if joined else 0)) / gamma
    sizes = (dz.abs().sum((0, 2)), dz.abs().sum((0, 2)) * (terms + 1))
    gy, gd = held(y), held(dy)
    *found, plan = library(
        GRADIENT_SUMS, x, rows, [gy, gd, gr], options, processors=processors, shared_bytes=shared_bytes
    )
    plans.append(plan)
    for ours, exact, size, what in zip(found, exact_sums, sizes, ("sum dz", "sum dz·x̂")):
        assert_near(ours, exact, size + 1e-300, loose, what)

    means = tuple((v / (n * s)).to(wide) for v in exact_sums)
    dx_size = gamma / (exact_var + 1e-5).sqrt() * dz.abs().amax((0, 2)) * (1 + terms.square()) + 1e-300
    for centred in (True, False):
        given = {"var": var}
        if centred:
            given |= {"mean_dz": means[0] * 4, "mean_dz_xhat": means[1] * 4}
        gdx, gdz = held(None), held(None) if joined else None
        library(
            INPUT_GRADIENT,
            x,
            rows,
            [gy, gd, gr, gdx, gdz],
            options,
            share=0.25,
            processors=processors,
            shared_bytes=shared_bytes,
            **given,
        )
        centre = (means[0].double().view(column) + xhat * means[1].double().view(column)) if centred else 0
        assert_near(gdx.view, scale * (dz - centre), dx_size, tolerance, f"dx, centred {centred}")
        gdx.assert_untouched()
        if gdz:
            assert_near(gdz.view, dz, dz.abs().amax((0, 2)) + 1e-300, tolerance, "dz")
            gdz.assert_untouched()
    gdx, gdz = held(None), held(None) if joined else None
    fused = library(
        FUSED_BACKWARD,
        x,
        rows,
        [gy, gd, gr, gdx, gdz],
        options,
        var=var,
        processors=processors,
        shared_bytes=shared_bytes,
    )
    if fused:
        plans.append(fused[2])
        centre = (exact_sums[0].view(column) + xhat * exact_sums[1].view(column)) / (n * s)
        assert_near(gdx.view, scale * (dz - centre), dx_size, tolerance, "fused dx")
        for ours, e, size, what in zip(fused[:2], exact_sums, sizes, ("fused sum dz", "fused sum dz·x̂")):
            assert_near(ours, e, size + 1e-300, loose, what)
        gdx.assert_untouched()
        if gdz:
            assert_near(gdz.view, dz, dz.abs().amax((0, 2)) + 1e-300, tolerance, "fused dz")
            gdz.assert_untouched()
    return plans


def check_some(library: Library) -> None:
    """Enough of the kernels, in float32, to find a fault in any of them."""
    for rows in (True, False):
        check(library, (3, 37, 53), torch.float32, rows, joined=True)
        check(library, (2, 8, 1024), torch.float32, rows, shift=1)


if __name__ == "__main__":
    check_some(Library(Path(sys.argv[1])))
