#!/usr/bin/env python
"""Build, test and measure the CUDA kernels on this machine, in under ten minutes, and write a report.

    python tools/gpu_report.py                          everything, into gpu_report/
    python tools/gpu_report.py --stages build tests     some stages
    python tools/gpu_report.py --out report --seconds 300

Each stage is a process of its own with a limit in seconds. OUT/report.json is written again after every stage, so that
an interruption loses one stage only. OUT/log.txt has the outputs. At the end tables are printed, as in docs/cuda.md.
Attach both files to a report of a problem. On a machine without a GPU every stage states why it did not run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
NETWORKS = ("resnet50", "resnext101")
WAYS = ("standard", "in place", "converted")
MODES = ("eager", "graph", "checkpointing", "compile@1.0", "compile@0.99", "compile@0.5", "compile@1.0 operators")
BATCH = 64
STEPS, WARMUP = 20, 5
# Constants of csrc/cuda that are chosen by hand; the first value of each is today's.
TUNABLES = {
    "IABN_CACHE_PERCENT": (0, 25, 50),
    "IABN_READS_PER_THREAD": (4, 2, 8),
    "IABN_UNDER_WAY": (2, 1, 4),
}
SMOKE = """
import torch, iabn_hub
from iabn_hub.layers.backends.loading import use_native
layer = iabn_hub.InPlaceABN(64).cuda()
x = torch.randn(8, 64, 56, 56, device="cuda", requires_grad=True)
layer(x * 1).square().mean().backward()
torch.cuda.synchronize()
status = use_native("cuda")
print(status.backend, status.reason, float(x.grad.abs().sum()))
assert status.backend == "native" and x.grad.isfinite().all()
"""
DEVICE = """
import json, torch
if not torch.cuda.is_available():
    why = "this torch is built without CUDA" if torch.version.cuda is None else "none was found"
    raise SystemExit(f"no CUDA device: {why}")
p = torch.cuda.get_device_properties(0)
print("JSON " + json.dumps({"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory,
      "processors": p.multi_processor_count, "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


# ---- stages ----------------------------------------------------------------------------------------------------------


def stages(me):
    """Name, command, limit in seconds, and whether the later ones need it."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-n", "0"]
    layer = [
        PYTHON,
        "-m",
        "iabn_hub",
        "benchmark",
        "layer",
        "--device",
        "cuda",
        "--json",
        "--no-compile",
        "--rounds",
        "7",
    ]
    yield "device", [PYTHON, "-c", DEVICE], 60, True
    yield "build", [PYTHON, "-c", SMOKE], 150, True
    yield "tests", [*pytest, "-m", "gpu", str(ROOT / "tests" / "layers"), "--timeout=60"], 150, False
    for tool in ("memcheck", "racecheck"):
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode=9"]
        small = [*pytest, str(ROOT / "tests" / "layers" / "test_cuda.py"), "-k", "agrees and (7 or 65)", "--timeout=80"]
        yield tool, [*check, *small], 80, False
    yield "layer", layer, 60, False
    yield "layer, shapes of ResNet-50", [*layer, "--shapes", "resnet50"], 60, False
    for network in NETWORKS:
        for way in WAYS:
            for mode in MODES:
                if way == "converted" and mode.startswith("compile"):
                    continue  # a converted network steps aside for the compiler
                if way == "standard" and mode.endswith("operators"):
                    continue  # there are none in it
                yield f"step {network}, {way}, {mode}", [PYTHON, me, "--step", network, way, mode], 90, False
    for name, values in TUNABLES.items():
        for value in values:
            yield f"tunable {name}={value}", [PYTHON, me, "--tunable", f"-D{name}={value}"], 90, False


def run_stage(command, limit, environment):
    """What a stage gave: its exit code, seconds, the end of its output, and what it printed as JSON."""
    began = time.monotonic()
    if shutil.which(command[0]) is None:
        return {"rc": None, "why": f"{command[0]} is not installed"}, ""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            env=environment,
            cwd=ROOT,
        )
        code, text = done.returncode, done.stdout + done.stderr
        found = _json_of(done.stdout)
    except subprocess.TimeoutExpired as e:
        code, found = None, None
        text = "".join(
            part.decode(errors="replace") if isinstance(part, bytes) else part or "" for part in (e.stdout, e.stderr)
        )
    row = {"rc": code, "seconds": round(time.monotonic() - began, 1)}
    if found is not None:
        row["found"] = found
    if code != 0:
        last = [line for line in text.strip().splitlines() if line.strip()][-1:] or ["no output"]
        row["why"] = f"more than {limit:.0f} s" if code is None else last[0][:300]
    return row, text


def _json_of(text):
    lines = re.findall(r"^JSON (.*)$", text, re.MULTILINE)
    try:
        return json.loads(lines[-1]) if lines else json.loads(text) if text.startswith("{") else None
    except ValueError:
        return None


def report(out, seconds, wanted):
    """Run the stages that are wanted, one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    kernels = out.resolve() / "kernels"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "IABN_HUB_BACKEND": "native"}
    environment |= {"IABN_HUB_BUILD_DIR": str(kernels), "IABN_HUB_TEST_KERNELS": str(kernels)}
    began, rows, reason = time.monotonic(), {}, None
    with (out / "log.txt").open("w") as log:
        for name, command, limit, needed in stages(str(Path(__file__).resolve())):
            if wanted and name != "device" and not any(name.startswith(each) for each in wanted):
                continue
            left = seconds - (time.monotonic() - began)
            if reason or left < 10:
                rows[name], text = {"rc": None, "why": reason or f"the {seconds} seconds are over"}, ""
            else:
                rows[name], text = run_stage(command, min(limit, left), environment)
            if needed and rows[name]["rc"] != 0 and not reason:
                reason = f"the stage {name} failed: {rows[name]['why']}"
            log.write(f"\n=== {name}: {json.dumps({**rows[name], 'found': None})}\n{text[-200_000:]}")
            log.flush()
            part = out / "report.json.partial"
            part.write_text(json.dumps({"stages": rows}, indent=1) + "\n")
            os.replace(part, out / "report.json")
            print(f"{name}: {rows[name].get('why') or 'passed'}", flush=True)
    return rows


# ---- the work of two stages ------------------------------------------------------------------------------------------


def step(network, way, mode):
    """Time of a training step in bfloat16 and its peak of memory, channels_last, batch 64 at 224.

    With "graph" it is replayed from a CUDA graph; with "operators" the compiled network calls the native kernels, of
    which it otherwise has the formulas, to fuse them with what is around.
    """
    import torch

    import iabn_hub

    place = {"device": "cuda", "memory_format": torch.channels_last}
    norm = {"norm_layer": "iabn"} if way == "in place" else {"norm_layer": "abn", "activation": "relu"}
    model = iabn_hub.create_model(f"{network}_iabn", **norm).to(**place).train()
    if way == "converted":
        iabn_hub.convert(model)
    model.set_grad_checkpointing(mode == "checkpointing")
    runs = model
    if mode.startswith("compile"):
        torch._functorch.config.activation_memory_budget = float(mode.partition("@")[2].split()[0])
        runs = torch.compile(model)
    images = torch.randn(BATCH, 3, 224, 224).to(**place)
    labels = torch.randint(1000, (BATCH,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def one():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(runs(images).float(), labels)
        loss.backward()
        optimizer.step()

    side = torch.cuda.Stream()  # what a graph captures must have run on another stream before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side) if mode == "graph" else contextlib.nullcontext():
        for _ in range(WARMUP):
            one()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        one = graph.replay
    times = []
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        one()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    found = {"ms": statistics.median(times), "fastest_ms": min(times), "peak": torch.cuda.max_memory_allocated()}
    print("JSON " + json.dumps(found))


def tunable(flag):
    """The layer's operators with another constant, as shares of the bandwidth of a copy."""
    os.environ["IABN_HUB_CUDA_FLAGS"] = flag
    from iabn_hub.benchmarks.layer import LayerOptions, measure_layer

    result = measure_layer(LayerOptions("cuda", compile=False, rounds=5), lambda text: None)
    shares = {}
    for case in result["cases"]:
        shares.setdefault(f"{case['dtype']} {case['layout']}", []).append(case["operators_alone_share_of_copy"])
    print("JSON " + json.dumps({name: round(statistics.mean(each), 3) for name, each in shares.items()}))


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows):
    device = rows.get("device", {}).get("found")
    yield f"Measured on {device['name']}, torch {device['torch']}, CUDA {device['cuda']}" if device else "No GPU."
    steps = {name: row["found"] for name, row in rows.items() if name.startswith("step ") and "found" in row}
    if steps:
        yield "\n| network | " + " | ".join(MODES) + " |\n|---|" + "---|" * len(MODES)
        for network in NETWORKS:
            for way in WAYS:
                cells = [steps.get(f"step {network}, {way}, {mode}") for mode in MODES]
                text = [f"{c['ms']:.1f} ms, {c['peak'] / 1e9:.2f} GB" if c else "" for c in cells]
                yield f"| {network}, {way} | {' | '.join(text)} |"
    tuned = {name: row["found"] for name, row in rows.items() if name.startswith("tunable ") and "found" in row}
    if tuned:
        columns = list(next(iter(tuned.values())))
        yield "\n| share of a copy | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns)
        for name, found in tuned.items():
            yield f"| {name.removeprefix('tunable ')} | {' | '.join(f'{100 * found[c]:.0f} %' for c in columns)} |"
    failed = [f"{name}: {row['why']}" for name, row in rows.items() if "why" in row]
    if failed:
        yield "\nNot measured:\n" + "\n".join(f"  {each}" for each in failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="only those that begin so: build, tests, layer, step …"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the stages, and stop")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tunable", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        from iabn_hub import use_backend

        with use_backend("native") if given.step[2].endswith("operators") else contextlib.nullcontext():
            step(*given.step)
    elif given.tunable:
        tunable(given.tunable)
    elif given.list:
        print("\n".join(name for name, *_ in stages("")))
    else:
        print("\n".join(tables(report(given.out, given.seconds, given.stages))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
