"""Inputs that nobody should hand over, and what the commands say to them.

python -m tests.untrusted.inputs        writes the table of docs/untrusted_inputs.md
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.cli import main

DATA = Path(iabn_hub.__file__).parent / "data"
IMAGE = str(sorted((DATA / "samples").glob("*.png"))[0])
WEIGHTS = DATA / "test_resnet_iabn.mnist.safetensors"
PAGE = Path(__file__).parents[2] / "docs" / "untrusted_inputs.md"
TITLE = "\x1b]0;title\x07"  # sets the title of a terminal's window
RECORD = {"model": "resnet50_iabn", "tag": "mine", "md5": "0" * 32}
# Values that JSON allows and that programs fail on.
VALUES = {
    "a number of 401 digits": "1" + "0" * 400,
    "1e999": "1e999",
    "NaN": "NaN",
    "a NUL character": '"\\u0000"',
    "half of a surrogate pair": '"\\ud800"',
    "900 levels of lists": "[" * 900 + "]" * 900,
    "200,000 levels of lists": "[" * 200_000,
}


@dataclass(frozen=True)
class Case:
    """One input: `make` prepares it in a folder, and returns the arguments and the environment of a command."""

    kind: str
    what: str
    make: Callable[[Path], tuple[list[str], dict[str, str]]]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str


def run(case: Case, folder: Path) -> Answer:
    """Run the command of a case in this process."""
    arguments, environment = case.make(folder)
    before = dict(os.environ)
    os.environ.update({"HF_HUB_OFFLINE": "1", "IABN_HUB_CACHE": str(folder / "cache"), **environment})
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Answer(code, out.getvalue(), err.getvalue())


def row(case: Case, answer: Answer, folder: Path) -> str:
    """The line of the table."""
    said = " ".join(answer.err.split("iabn-hub: ")[-1].replace(str(folder), "DIR").split())
    said = re.sub(r"(.)\1{40,}", r"\1\1\1\1…", said)
    return f"| {case.kind} | {case.what} | {said.replace('|', chr(92) + '|')} |"


# ---- how each is made ------------------------------------------------------------------------------------------------


def catalogue(content: bytes | str, *command: str) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        path = folder / "catalogue.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [*(command or ("info", "resnet50_iabn"))], {"IABN_HUB_CATALOGUE": str(path)}

    return make


def recipe(content: bytes | str) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        path = folder / "recipe.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return ["train", str(path), str(folder), "--out", str(folder / "run")], {}

    return make


def weights(name: str, save: Callable[[Path], object]) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        save(folder / name)
        return ["classify", IMAGE, "--model", "test_resnet_iabn", "--checkpoint", str(folder / name)], {}

    return make


def named(name: str, save: Callable[[Path], object]) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        save(folder / name)
        return ["classify", IMAGE, "--model", str(folder / name)], {}

    return make


def arguments(*given: str) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    return lambda folder: ([each.replace("DIR", str(folder)) for each in given], {})


def image(name: str, save: Callable[[Path], object]) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        save(folder / name)
        return ["classify", str(folder / name)], {}

    return make


def run_folder(file: str, content: str, *command: str) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    """The folder of a run of which one file is not what it was."""

    def make(folder: Path) -> tuple[list[str], dict[str, str]]:
        run = folder / "run"
        run.mkdir()
        shutil.copy(WEIGHTS, run / "model.safetensors")
        config = {"architecture": "test_resnet_iabn", "num_classes": 10, "pretrained_cfg": {}, "model_args": {}}
        (run / "config.json").write_text(json.dumps(config))
        (run / file).write_text(content)
        return [each.replace("DIR", str(folder)) for each in command], {}

    return make


def tensors() -> dict[str, torch.Tensor]:
    return load_file(WEIGHTS)


def deflated(path: Path) -> None:
    """A record of zeros, deflated to a thousandth."""
    torch.save({"weight": torch.zeros(1 << 20)}, path.with_suffix(".stored"))
    with zipfile.ZipFile(path.with_suffix(".stored")) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            new.writestr(each.filename, old.read(each))


def two_directories(path: Path) -> None:
    """An archive within another one: Python and torch would each read another directory of it."""
    torch.save(tensors(), path)
    content = path.read_bytes()
    path.write_bytes(content + content)


def one_bit_changed(path: Path) -> None:
    torch.save(tensors(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-1000])


class Code:
    """A pickle that would run a program."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this ran",)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code(), protocol=2))


def long_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")


SNAPSHOT = {
    "model": {}, "ema": None, "optimizer": {}, "recipe": {}, "classes": None, "sums": {}, "rows": [],
    "position": {"epoch": 1, "step": 1, "steps_per_epoch": 1},
}  # fmt: skip


def odd_snapshot(path: Path) -> None:
    torch.save({**SNAPSHOT, "model": 5, "sums": 3}, path)


def foreign_snapshot(path: Path) -> None:
    torch.save({**SNAPSHOT, "config": {"architecture": "hf-hub:a/b", "num_classes": 2}}, path)


def bomb(path: Path) -> None:
    """A PNG of 20,000 × 20,000 pixels in a few bytes."""
    header = PngImagePlugin.o32(20_000) * 2 + b"\x08\x02\x00\x00\x00"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
            PngImagePlugin.putchunk(file, name, content)


def truncated(path: Path) -> None:
    Image.effect_noise((256, 256), 90).save(path)
    path.write_bytes(path.read_bytes()[:5000])


def in_record(key: str, value: str, **changes: str) -> str:
    """A catalogue of one record with a value that is written as it is."""
    return '{"checkpoints": [' + json.dumps({**RECORD, **changes})[:-1] + f', "{key}": {value}' + "}]}"


def with_tensors(**changes: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: torch.save({**tensors(), **changes}, path)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


HUGE = "1" + "0" * 400
DEEP = VALUES["900 levels of lists"]
TRAIN = ("train", "test_resnet_iabn.mnist", "DIR", "--set")
OUTSIDE = ("export", "test_resnet_iabn.x/../../evil", "--from", "DIR/run", "--to-dir", "DIR/out")
EXPORT = ("export", "test_resnet_iabn.x", "--from", "DIR/run", "--to-dir", "DIR/out")
CLASSIFY = ("classify", IMAGE, "--model", "DIR/run")
META = {name: value.to("meta") for name, value in tensors().items()}


CASES = [
    *(Case("catalogue", what, catalogue(in_record("description", value))) for what, value in VALUES.items()),
    Case("catalogue", "bytes that are not UTF-8", catalogue(b'{"checkpoints": [\xff]}')),
    Case("catalogue", "an empty file", catalogue("")),
    Case("catalogue", "more than 16 MiB", catalogue(" " * ((16 << 20) + 1))),
    Case("catalogue", "a folder", lambda folder: (["info", "resnet50_iabn"], {"IABN_HUB_CATALOGUE": str(folder)})),
    Case("catalogue", "control characters in a name", catalogue(in_record("license", "1", tag="\x1b[8m"))),
    Case("catalogue", "a bidirectional control in a name", catalogue(in_record("license", "1", tag="\u202e"))),
    Case("catalogue", "an unknown architecture", catalogue(in_record("license", '""', model="x"), "fetch", "x.mine")),
    Case("catalogue", "a tag that leads out of the folder", catalogue(in_record("license", '""', tag="../../x"))),
    *(Case("recipe", what, recipe(f'{{"optimizer": {{"learning_rate": {value}}}}}')) for what, value in VALUES.items()),
    Case("recipe", "bytes that are not UTF-8", recipe(b"\xff\xfe{")),
    Case("recipe", "a list", recipe("[1]")),
    Case("recipe", "--set with a number of 401 digits", arguments(*TRAIN, f"network.classes={HUGE}")),
    Case("recipe", "--set with 900 levels", arguments(*TRAIN, f"network.classes={DEEP}")),
    Case("weights", "a pickle that runs a program", weights("x.pth", a_pickle)),
    Case("weights", "the same in a file of torch.save", weights("x.pth", with_tensors(weight=Code()))),
    Case("weights", "a compressed record", weights("x.pth", deflated)),
    Case("weights", "two archives in one file", weights("x.pth", two_directories)),
    Case("weights", "one bit changed", weights("x.pth", one_bit_changed)),
    Case("weights", "the end cut off", weights("x.pth", cut_short)),
    Case("weights", "tensors on the meta device", weights("x.pth", with_tensors(**META))),
    Case("weights", "a tensor of 4 TB with stride 0", weights("x.pth", with_tensors(x=torch.zeros(1).expand(10**12)))),
    Case("weights", "a list instead of a state dict", weights("x.pth", lambda path: torch.save([1, 2], path))),
    Case("weights", "an empty file", weights("x.pth", text(""))),
    Case("weights", "safetensors with a header of 2⁶³ bytes", weights("x.safetensors", long_header)),
    Case("run", "config.json with 900 levels", run_folder("config.json", DEEP, *CLASSIFY)),
    Case("run", "config.json of another package", run_folder("config.json", '{"architecture": "x"}', *CLASSIFY)),
    Case(
        "run", "metrics.json with a number of 401 digits", run_folder("metrics.json", f'{{"seconds": {HUGE}}}', *EXPORT)
    ),
    Case("run", "metrics.json without metrics", run_folder("metrics.json", '{"model": "x"}', *EXPORT)),
    Case("image", "a bomb of 400 megapixels", image("x.png", bomb)),
    Case("image", "the end cut off", image("x.png", truncated)),
    Case("image", "a text", image("x.png", text("no picture"))),
    Case("image", "a file name that sets the terminal's title", image(f"{TITLE}.png", text(""))),
    Case("image", "a file name written from right to left", image("\u202egnp.exe", text(""))),
    Case("weights", "a text called .safetensors", named("x.safetensors", text("weights"))),
    Case("snapshot", "with values of other types", named("x.pt", odd_snapshot)),
    Case("snapshot", "of a network on the Hub", named("x.pt", foreign_snapshot)),
    Case("name", "a home folder of nobody", arguments("classify", IMAGE, "--model", "~nobody-at-all/x")),
    Case("name", "an empty repository", arguments("classify", IMAGE, "--model", "hf-hub:")),
    Case("name", "a repository of three parts", arguments("classify", IMAGE, "--model", "hf-hub:a/b/c")),
    Case("name", "a path of 5,000 characters", arguments("classify", "x" * 5000)),
    Case("name", "--topk ²", arguments("classify", "--topk", "²")),
    Case("name", "an export that leads out of the folder", run_folder("recipe.json", "{}", *OUTSIDE)),
    Case("mirror", "an index that is not JSON", run_folder("index.json", "{", "verify", "--mirror", "DIR/run")),
]

if __name__ == "__main__":
    lines = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            lines.append(row(case, run(case, Path(name)), Path(name)))
    head = PAGE.read_text().split("| kind |")[0]
    PAGE.write_text(head + "\n".join(["| kind | input | answer |", "|---|---|---|", *lines]) + "\n")
