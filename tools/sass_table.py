#!/usr/bin/env python
"""What nvcc makes of the CUDA kernels, without a GPU: registers, blocks per multiprocessor, loads in flight.

    python tools/sass_table.py              prints the table of docs/cuda.md (bf16 and f32, compute capability 9.0)
    python tools/sass_table.py --check      fails if a hot kernel spills, or has fewer loads in flight than promised
    python tools/sass_table.py --architecture 8.0 --dtypes f16

Loads in flight: the most vectors that a thread has asked for in the main loop of a kernel before an instruction needs
one of them, counted in the order of the machine code. Needs nvcc, and nvdisasm, which torch's package triton brings.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from iabn_hub.layers.backends import building

REGISTERS, GRANULE, THREADS = 65536, 8, 256  # of a multiprocessor; per thread; of a block
UNDER_WAY = 2  # vectors of each operand
# Kernels and what they have code for: leaky ReLU without a residual; any activation and a residual; the gradient of any
# activation from the input. Each with the operands that its main loop reads.
LEAKY, ANY, FROM_INPUT = "leaky ReLU", "any, residual", "any, from the input"
OPERANDS = {
    ("moments", ""): 1,
    ("normalize", LEAKY): 1, ("normalize", ANY): 2,
    ("sums", LEAKY): 2, ("sums", ANY): 3, ("sums", FROM_INPUT): 2,
    ("gradient", LEAKY): 2, ("gradient", ANY): 3, ("gradient", FROM_INPUT): 2,
}  # fmt: skip
HEADER = ("kernel", "code for", "dtype", "registers", "blocks", "loads in flight", "instructions per load")


def nvdisasm():
    """The program, from the CUDA toolkit, the PATH, or triton."""
    found = shutil.which("nvdisasm")
    places = [building.cuda_home() / "bin" / "nvdisasm"]
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    except ImportError:
        pass
    found = found or next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise building.BuildError("nvdisasm was not found: pip install nvidia-cuda-nvdisasm, or triton")
    return found


def compiled(dtype, architecture, folder):
    """(registers, spilled bytes) by kernel and width, and the machine code as text."""
    home, csrc = building.cuda_home(), building.sources()
    cubin, number = folder / f"{dtype}.cubin", architecture.replace(".", "")
    command = [
        *(str(home / "bin" / "nvcc"), *building.CUDA_FLAGS, "-ccbin", building.compiler(), f"-I{csrc / 'common'}"),
        *(f"-gencode=arch=compute_{number},code=sm_{number}", f"-DIABN_DTYPE={dtype}", "-Xptxas=-v", "-cubin"),
        *(str(csrc / "cuda" / "iabn_cuda_kernels.cu"), "-o", str(cubin)),
    ]
    log = building.run(command, both=True)
    entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = {}
    for name, spilled, registers in re.findall(entry, log, re.DOTALL):
        kernel = kernel_of(name)
        if kernel:
            found[kernel] = (int(registers), int(spilled))
    return found, building.run([nvdisasm(), "-c", str(cubin)])


def kernel_of(mangled):
    """(name, what it has code for, width), or None."""
    match = re.search(r"\d((?:planes|rows)_[a-z_]+?)ILi(\d+)E(?:L\w*?E?(\d)E)?E", mangled)
    if not match:
        return None
    return match[1], ("" if match[3] is None else (LEAKY, ANY, FROM_INPUT)[int(match[3])]), int(match[2])


def loops(sass):
    """By kernel and width: (loads in flight, instructions) of the loop with most loads in flight."""
    found = {}
    for section in re.split(r"\.section\s+\.text\.", sass)[1:]:
        kernel = kernel_of(section.partition(",")[0])
        if kernel:
            found[kernel] = max((in_flight(body), len(body)) for body in _bodies(section))
    return found


def _bodies(section):
    """The instructions of every loop, without predicates."""
    instructions, labels = [], {}
    for line in section.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line)
        if label:
            labels[label[1]] = len(instructions)
        elif code:
            instructions.append(code[1])
    yield []
    for number, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if target and labels.get(target[1], number + 1) <= number:
            yield instructions[labels[target[1]] : number + 1]


def in_flight(body):
    """The most 16-byte loads that wait at once: a load waits until an instruction names one of its registers."""
    waiting, most = {}, 0
    for instruction in body:
        operation, _, operands = instruction.partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if operation.startswith("LDG") and ".128" in operation:  # narrower ones merge parts, at the end
            waiting[registers[0]] = 4
            most = max(most, len(waiting))
            continue
        for first, size in list(waiting.items()):
            if any(first <= register < first + size for register in registers):
                del waiting[first]
    return most


def rows_of(dtypes, architecture):
    """A row for each hot kernel at its widest access, as in HEADER, then (loads promised, bytes spilled)."""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            registers, sass = compiled(dtype, architecture, Path(folder))
            found = loops(sass)
            width = {"f64": 2, "f32": 4}.get(dtype, 8)
            for (kernel, code), operands in OPERANDS.items():
                for layout in ("planes", "rows"):
                    key = f"{layout}_{kernel}", code, width
                    if key not in registers:  # float64 has no kernels for leaky ReLU alone
                        continue
                    used, spilled = registers[key]
                    rounded = -(-used // GRANULE) * GRANULE
                    loads, instructions = found[key]
                    # A loop with code for several activations runs a part of its instructions.
                    each = round(instructions / loads) if code in ("", LEAKY) and loads else ""
                    row = (key[0], code, dtype, used, min(REGISTERS // (rounded * THREADS), 8), loads, each)
                    yield row, UNDER_WAY * operands, spilled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=building.CUDA_DTYPES, default=["bf16", "f32"])
    parser.add_argument("--architecture", default="9.0", help="compute capability (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail if a kernel does not keep its promise")
    given = parser.parse_args()
    try:
        rows = list(rows_of(given.dtypes, given.architecture))
    except building.BuildError as e:
        print(f"sass_table: {e}", file=sys.stderr)
        return 1
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row, _, _ in rows:
        print(f"| `{row[0]}` | {' | '.join(map(str, row[1:]))} |")
    broken = [
        f"{row[0]} ({row[1]}) of {row[2]}: {row[5]} loads in flight, promised {promised}; {spilled} bytes spilled"
        for row, promised, spilled in rows
        if spilled or row[5] < promised
    ]
    if given.check and broken:
        print("\n".join(f"sass_table: {each}" for each in broken), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
