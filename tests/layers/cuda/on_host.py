"""Builds the CUDA kernels for the host and runs them.

As a script on libraries: checks each in a process of its own, which threads that wait at different barriers end, and
prints its exit code and what it wrote on stderr as JSON.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iabn_hub.layers import reference
from iabn_hub.layers.activations import INVERTIBLE
from iabn_hub.layers.backends import building

HERE = Path(__file__).parent
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
NUMBERS = {dtype: i for i, dtype in enumerate(DTYPES.values())}
# Error allowed, relative to the size of the terms: rounding in the stored dtype, and of sums in the accumulate dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
STATISTICS, NORMALIZE, FUSED_FORWARD, GRADIENT_SUMS, INPUT_GRADIENT, FUSED_BACKWARD, UPDATE = range(7)
POISON = 77.0


def build(folder: Path, dtypes: dict[str, torch.dtype] = DTYPES, planted: tuple[str, str] | None = None) -> Path:
    """A library of the kernels, with the text `planted[0]` replaced by `planted[1]`."""
    csrc = building.sources() / "cuda"
    places = 0
    for name in ("kernels.cu", "planes.h", "rows.h", "merging.h", "parts.h"):
        name = f"iabn_cuda_{name}"
        text = (csrc / name).read_text()
        if planted:
            places += text.count(planted[0])
            text = text.replace(*planted)
        (folder / name).write_text(text)
    assert places == (1 if planted else 0), f"{places} places hold {planted}"
    kernels = folder / "iabn_cuda_kernels.cu"
    compile_ = [
        building.compiler(), "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DIABN_ON_HOST",
        f"-I{csrc}", f"-I{csrc.parent / 'common'}", f"-I{HERE}",
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


class Extent(ctypes.Structure):
    _fields_ = [
        ("outer", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("rows", ctypes.c_bool),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("run", ctypes.c_int64),
        ("divisor", ctypes.c_uint32 * 2),
    ]


class StridedTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("outer", "channel", "inner")]


class Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64)]


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("width", "x", "y", "tiles", "most_parts")]


VECTORS = ("weight", "bias", "mean", "var", "mean_dz", "mean_dz_xhat")


class Call(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("operation", "dtype", "element_bytes")],
        ("shape", Extent),
        ("operands", StridedTensor * 5),
        *[(name, Vector) for name in VECTORS],
        *[(name, ctypes.c_int64) for name in ("activation", "signed_scale", "from_input")],
        *[(name, ctypes.c_double) for name in ("param", "lowest", "eps", "share")],
        *[(name, ctypes.c_int64) for name in ("alignment", "processors", "shared_bytes")],
        ("out", Vector * 4),
        ("num_batches", ctypes.c_void_p),
        *[(name, ctypes.c_double) for name in ("momentum", "correction")],
        *[(name, ctypes.c_void_p) for name in ("partial", "arrived")],
        ("plan", Plan),
        *[(name, ctypes.c_int64) for name in ("parts", "launches")],
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

    def operand(self) -> StridedTensor:
        n, c, _ = self.view.shape
        outer, channel, inner = self.view.stride()
        return StridedTensor(self.view.data_ptr(), 0 if self.rows or n == 1 else outer, 1 if c == 1 else channel, inner)

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


@dataclass
class Result:
    """What a launcher wrote per channel, and how it was launched."""

    out: list[Tensor | None]
    plan: Plan
    parts: int
    launches: int
    batches: int


class Library:
    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self.run, self.divide = library.iabn_run, library.iabn_divide

    def __call__(
        self, operation: int, x: Tensor, rows: bool, operands: list[Guarded | None], options: tuple, **given: Any
    ) -> Result | None:
        """None if no kernel keeps so large a channel in shared memory; `group` channels at a time."""
        weight, bias, eps, activation, param, signed = options
        n, c, s = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = given.pop("out", None) or [*(torch.full((c,), POISON, dtype=wide) for _ in range(2)), None, None]
        partial = torch.full((3 * 1024 * c,), math.nan, dtype=wide)
        arrived, batches = torch.zeros(c + 1, dtype=torch.int32), torch.tensor([5])
        group = given.pop("group", None) or c
        plain = {name: given.pop(name, default) for name, default in PLAIN.items()}
        call = Call(
            operation=operation,
            dtype=NUMBERS[x.dtype],
            element_bytes=x.element_size(),
            activation=activation,
            signed_scale=signed,
            param=param,
            lowest=math.log(torch.finfo(x.dtype).eps / 4),
            eps=eps,
            alignment=min((o.alignment() for o in operands if o), default=16),
            partial=partial.data_ptr(),
            arrived=arrived.data_ptr(),
            num_batches=batches.data_ptr(),
            weight=vector(weight),
            bias=vector(bias),
            **plain,
            **{name: vector(v) for name, v in given.items()},
        )
        for i, o in enumerate(operands):
            if o:
                call.operands[i] = o.operand()
        for i, v in enumerate(out):
            call.out[i] = vector(v)
        launches = 0
        for begin in range(0, c, group):
            call.shape = Extent(1, c, n * s, True) if rows else Extent(n, c, s, False)
            call.shape.begin, call.shape.end = begin, min(c, begin + group)
            if self.run(ctypes.byref(call)):
                return None
            launches += call.launches
            assert not arrived.any(), "a counter is not zero again"
        return Result(out, call.plan, call.parts, launches, batches.item() - 5)


PLAIN = {
    "share": 1.0, "processors": 4, "shared_bytes": 100 << 10, "from_input": False, "momentum": 0.0, "correction": 1.0,
}  # fmt: skip


def assert_near(ours: Tensor, exact: Tensor, size: Tensor, tolerance: float, what: str) -> None:
    size = size.double().view(1, -1, *[1] * (ours.dim() - 2)) if ours.dim() > 1 else size.double()
    error = ((ours.double() - exact.double()).abs() / size.clamp(min=1e-300)).max()
    assert error <= tolerance, f"{what} is off by {error:.1e} of the size of its terms"


@dataclass(frozen=True)
class Case:
    """One kind of tensor and layer, and the device that the kernels plan for."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    rows: bool
    seed: int = 0
    activation: tuple[int, float] = (1, 0.01)
    affine: torch.dtype | None = torch.float32
    joined: bool = False
    signed: bool = False
    shift: int = 0
    gap: int = 0
    mean: float = 0.0
    in_place: bool = True
    processors: int = 4
    shared_bytes: int = 100 << 10
    group: int | None = None  # channels of a launch


def check(
    library: Library, shape: tuple[int, int, int], dtype: torch.dtype, rows: bool, **options: Any
) -> list[Result]:
    """Compare every launcher with the formulas in float64; what came of each reduction."""
    return Comparison(library, Case(shape, dtype, rows, **options)).run()


class Comparison:
    """The launchers on one case, step by step, and what they should give in float64."""

    def __init__(self, library: Library, case: Case) -> None:
        self.library, self.case, self.results = library, case, list[Result]()
        generator = torch.Generator().manual_seed(case.seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        channels = case.shape[1]
        self.x, self.dy, r = ((random(*case.shape) + m).to(case.dtype) for m in (case.mean, 0, 0))
        self.weight = self.bias = None
        if case.affine:
            self.weight = random(channels).to(case.affine)
            self.weight[: min(2, channels - 1)] = 0
            self.bias = random(channels).to(case.affine)
        self.residual = r if case.joined else None
        self.running = [random(channels).to(torch.bfloat16), random(channels).double()]
        self.options = (self.weight, self.bias, 1e-5, *case.activation, case.signed)
        self.wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.tolerance, self.loose = TOLERANCE[case.dtype], TOLERANCE[self.wide]
        self.exact_mean, self.exact_var = reference.statistics(self.x.double())
        # How much of a value is lost when a mean that is far away is taken from it.
        distance = (self.exact_mean.abs() / (self.exact_var + 1e-5).sqrt()).max().item()
        self.far = 1 + distance * (self.case.dtype == self.wide)
        exact = (v.double() if isinstance(v, Tensor) else v for v in (self.weight, self.bias, self.residual))
        self.recover = (*exact, *self.options[2:])
        self.exact_y = reference.normalize(self.x.double(), self.exact_mean, self.exact_var, *self.recover)
        self.held_residual = self.held(self.residual) if case.joined else None

    def run(self) -> list[Result]:
        self.statistics()
        self.normalize()
        self.fused_forward()
        if not self.case.joined:
            self.from_input()
        if self.case.activation[0] in INVERTIBLE.values():
            self.prepare_backward()
            self.gradient_sums()
            self.input_gradient(centred=True)
            self.input_gradient(centred=False)
            self.fused_backward()
        return self.results

    def held(self, values: Tensor | None) -> Guarded:
        return Guarded(values, self.x, self.case.rows, self.case.shift, self.case.gap)

    def launch(self, operation: int, operands: list[Guarded | None], **given: Any) -> Any:
        case = self.case
        device = {"processors": case.processors, "shared_bytes": case.shared_bytes}
        if operation not in (FUSED_FORWARD, FUSED_BACKWARD):
            device["group"] = case.group
        options = given.pop("options", self.options)
        result = self.library(operation, self.x, case.rows, operands, options, **given, **device)
        assert result is None or result.launches == -(-case.shape[1] // (device.get("group") or case.shape[1]))
        return result

    def per_channel(self) -> Tensor:
        return torch.full(self.case.shape[1:2], POISON, dtype=self.wide)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def moments(self, operation: int, operands: list[Guarded | None], what: str) -> bool:
        """Whether there is such a kernel; then its statistics, and the running ones, are right."""
        out = [self.per_channel(), self.per_channel(), *(v.clone() for v in self.running)]
        result = self.launch(operation, operands, out=out, momentum=0.25, correction=1.5)
        if result is None:
            return False
        assert result.batches == 1
        self.results.append(result)
        mean, var, *renewed = out
        spread = self.exact_var + self.exact_mean.square() * torch.finfo(self.wide).eps ** 2 + 1e-300
        largest = self.x.double().abs().amax((0, 2)) + 1e-300
        assert_near(mean, self.exact_mean, largest, self.loose, f"{what}: mean")
        assert_near(var, self.exact_var, spread, (1e3 if self.case.mean else 10) * self.loose, f"{what}: var")
        for ours, old, batch in zip(renewed, self.running, (mean.double(), var.double() * 1.5)):
            exact = old.double() * 0.75 + batch * 0.25
            tolerance = max(TOLERANCE[ours.dtype], self.loose)
            assert_near(ours, exact, old.double().abs() + batch.abs(), tolerance, f"{what}: running statistics")
        return True

    def statistics(self) -> None:
        self.moments(STATISTICS, [self.held(self.x)], "statistics")

    def y_size(self) -> Tensor:
        joined = self.residual.double().abs().amax((0, 2)) if self.residual is not None else 0
        return self.exact_y.abs().amax((0, 2)) + joined + 1e-300

    def normalize(self) -> None:
        given = {"mean": self.exact_mean.to(self.wide), "var": self.exact_var.to(self.wide)}
        exact = reference.normalize(self.x.double(), *(v.double() for v in given.values()), *self.recover)
        gx = self.held(self.x)
        gy = gx if self.case.in_place else self.held(None)
        self.launch(NORMALIZE, [gx, self.held_residual, gy], **given)
        tolerance = 10 * self.tolerance if self.case.dtype == self.wide else self.tolerance
        assert_near(gy.view, exact, self.y_size(), tolerance, "normalize")
        gy.assert_untouched()

    def fused_forward(self) -> None:
        gx = self.held(self.x)
        gy = gx if self.case.in_place else self.held(None)
        if self.moments(FUSED_FORWARD, [gx, self.held_residual, gy], "fused forward"):
            assert_near(gy.view, self.exact_y, self.y_size(), 10 * self.tolerance * self.far, "fused forward")
            gy.assert_untouched()

    # ---- backward, from the input ------------------------------------------------------------------------------------

    def from_input(self) -> None:
        weight, bias, eps, *activation, _ = self.options
        mean, var = (v.to(self.wide) for v in (self.exact_mean, self.exact_var))
        deviation = (var.double() + eps).sqrt().view(1, -1, 1)
        xhat = (self.x.double() - mean.double().view(1, -1, 1)) / deviation
        z = xhat * (1 if weight is None else weight.double().view(1, -1, 1))
        z = z + (0 if bias is None else bias.double().view(1, -1, 1))
        dy = self.dy.clone()
        for kink in (-3, 0, 3, 6):  # near which z may be rounded to the other side, so that the slope is another
            dy[(z - kink).abs() < 1e-4 * self.far] = 0
        options = (weight, bias, eps, *activation, True)
        exact_affine = [None if v is None else v.double() for v in (weight, bias)]
        given = {"mean": mean, "var": var, "from_input": True, "options": options}
        count = self.x.numel() / self.x.size(1)
        for centred in (True, False):
            exact_dx, *exact_sums = reference.gradient_from_input(
                self.x.double(), dy.double(), mean.double(), var.double(), *exact_affine, eps, *activation, centred
            )
            dz = reference.gradient_at(z, dy.double(), *activation).abs()
            largest = xhat.abs().amax((0, 2)) + 1
            sizes = dz.sum((0, 2)) + 1e-300, dz.sum((0, 2)) * largest + 1e-300
            spread = (1 if weight is None else weight.double().abs()) / deviation.flatten()
            dx_size = spread * dz.amax((0, 2)) * (1 + largest.square()) + 1e-300
            gx, gd = self.held(self.x), self.held(dy)

            def compare(gdx: Guarded, sums: Any, what: str, exact_dx=exact_dx, exact_sums=exact_sums) -> None:
                for ours, exact, size in zip(sums, exact_sums, sizes):  # noqa: B023
                    assert_near(ours, exact, size, 10 * self.loose * self.far, f"{what} sums")
                tolerance = max(self.tolerance, 10 * self.loose * self.far)
                assert_near(gdx.view, exact_dx, dx_size, tolerance, f"{what} dx")  # noqa: B023
                gdx.assert_untouched()

            sums = [self.per_channel(), self.per_channel(), None, None]
            self.launch(GRADIENT_SUMS, [gx, gd, None, None, None], out=sums, **given)
            means = {"mean_dz": sums[0], "mean_dz_xhat": sums[1]} if centred else {}
            gdx = self.held(None)
            self.launch(INPUT_GRADIENT, [gx, gd, None, gdx, None], share=1 / count, **means, **given)
            compare(gdx, sums[:2], "from input")
            fused = [self.per_channel(), self.per_channel(), None, None]
            gdx = self.held(None)
            if centred and self.launch(FUSED_BACKWARD, [gx, gd, None, gdx, None], out=fused, **given):
                compare(gdx, fused[:2], "fused from input")

    # ---- backward, from the stored y ---------------------------------------------------------------------------------

    def prepare_backward(self) -> None:
        """The exact results, and the size of the terms that each is summed from."""
        case, column = self.case, (1, -1, 1)
        self.y, self.var = self.exact_y.to(case.dtype), self.exact_var.to(self.wide)
        z = reference.invert(self.y.double(), *case.activation, torch.finfo(case.dtype).eps)
        terms = z.abs().amax((0, 2))
        gamma = torch.ones(case.shape[1], dtype=torch.float64)
        if self.weight is not None and self.bias is not None:
            gamma = reference.effective_scale(self.weight.double(), 1e-5, case.signed)
            z = z - self.bias.double().view(column)
            terms = terms + self.bias.double().abs()
        if self.residual is not None:
            z = z - self.residual.double()
            terms = terms + self.residual.double().abs().amax((0, 2))
        divisor = torch.where(gamma < 0, gamma.clamp(max=-1e-5), gamma.clamp(min=1e-5))
        terms = terms / divisor.abs()
        self.xhat = z / divisor.view(column)
        self.dz = reference.gradient(self.y.double(), self.dy.double(), *case.activation)
        sums = self.dz.sum((0, 2)), (self.dz * self.xhat).sum((0, 2))
        sign = 1 if case.signed or self.weight is None else torch.where(self.weight < 0, -1, 1)
        self.exact_sums = (*sums, sums[1] * sign, sums[0])
        self.scale = (gamma / (self.var.double() + 1e-5).sqrt()).view(column)
        magnitude = self.dz.abs().sum((0, 2))
        self.sum_sizes = (magnitude + 1e-300, magnitude * (terms + 1) + 1e-300)
        spread = gamma.abs() / (self.exact_var + 1e-5).sqrt()
        self.dx_size = spread * self.dz.abs().amax((0, 2)) * (1 + terms.square()) + 1e-300
        self.gy, self.gd = self.held(self.y), self.held(self.dy)

    def sums_out(self) -> list[Tensor]:
        dtype = self.case.affine or self.wide
        return [self.per_channel(), self.per_channel(), self.per_channel().to(dtype), self.per_channel().to(dtype)]

    def assert_sums(self, found: Any, what: str) -> None:
        names = (f"{what}sum dz", f"{what}sum dz·x̂", f"{what}d weight", f"{what}d bias")
        sizes = (*self.sum_sizes, *self.sum_sizes[::-1])
        for ours, exact, size, name in zip(found, self.exact_sums, sizes, names):
            assert_near(ours, exact, size, max(self.loose, TOLERANCE[ours.dtype]), name)

    def assert_gradients(self, gdx: Guarded, gdz: Guarded | None, centre: Any, what: str) -> None:
        assert_near(gdx.view, self.scale * (self.dz - centre), self.dx_size, self.tolerance, f"{what}dx")
        gdx.assert_untouched()
        if gdz:
            assert_near(gdz.view, self.dz, self.dz.abs().amax((0, 2)) + 1e-300, self.tolerance, f"{what}dz")
            gdz.assert_untouched()

    def gradient_sums(self) -> None:
        out = self.sums_out()
        self.results.append(self.launch(GRADIENT_SUMS, [self.gy, self.gd, self.held_residual], out=out))
        self.assert_sums(out, "")

    def input_gradient(self, centred: bool) -> None:
        n, _, s = self.case.shape
        column = (1, -1, 1)
        means = tuple((v / (n * s)).to(self.wide) for v in self.exact_sums[:2])
        given = {"mean_dz": means[0] * 4, "mean_dz_xhat": means[1] * 4} if centred else {}
        gdx, gdz = self.held(None), self.held(None) if self.case.joined else None
        operands = [self.gy, self.gd, self.held_residual, gdx, gdz]
        self.launch(INPUT_GRADIENT, operands, share=0.25, var=self.var, **given)
        centre = means[0].double().view(column) + self.xhat * means[1].double().view(column) if centred else 0
        self.assert_gradients(gdx, gdz, centre, f"centred {centred}: ")

    def fused_backward(self) -> None:
        n, _, s = self.case.shape
        gdx, gdz = self.held(None), self.held(None) if self.case.joined else None
        out = self.sums_out()
        operands = [self.gy, self.gd, self.held_residual, gdx, gdz]
        fused = self.launch(FUSED_BACKWARD, operands, var=self.var, out=out)
        if fused:
            self.results.append(fused)
            sums = tuple(v.view(1, -1, 1) for v in self.exact_sums[:2])
            self.assert_gradients(gdx, gdz, (sums[0] + self.xhat * sums[1]) / (n * s), "fused ")
            self.assert_sums(out, "fused ")


def check_some(library: Library) -> None:
    """Enough of the kernels, in float32, to find a fault in any of them."""
    for rows in (True, False):
        check(library, (3, 37, 53), torch.float32, rows, joined=True)
        check(library, (2, 8, 1024), torch.float32, rows, shift=1)
        check(library, (2, 2, 8192), torch.float32, rows, processors=2)
        check(library, (2, 16, 64), torch.float32, rows)


def check_forked(path: Path) -> int:
    """Start `check_some` in a child, whose stderr goes to a file beside the library; returns its process id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        error = path.with_suffix(".stderr").open("w")
        os.dup2(error.fileno(), 2)
        code = 1
        try:
            check_some(Library(path))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


if __name__ == "__main__":
    # Torch has computed nothing yet, so the children can: a thread pool would not survive the fork.
    waiting, running, outcomes = [Path(name) for name in sys.argv[1:]], dict[int, Path](), dict[str, Any]()
    while waiting or running:
        while waiting and len(running) < 2:
            library = waiting.pop(0)
            running[check_forked(library)] = library
        child, status = os.wait()
        library = running.pop(child)
        code, stderr = os.waitstatus_to_exitcode(status), library.with_suffix(".stderr").read_text(errors="replace")
        outcomes[str(library)] = {"code": code, "stderr": stderr}
    print(json.dumps(outcomes))
