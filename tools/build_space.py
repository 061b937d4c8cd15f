#!/usr/bin/env python
"""Write the folder of a Space of the Hugging Face Hub that serves the page of 'iabn-hub demo'.

python tools/build_space.py dist/space                          EfficientNet-Lite0
python tools/build_space.py dist/space --model hf-hub:ORG/NAME  another network

hf upload ORG/SPACE dist/space . --repo-type space              sends it to the Hub
"""

import argparse
import sys
from pathlib import Path

from iabn_hub import __version__, list_models

CARD = """---
title: In-place activated BatchNorm
emoji: 🐈
colorFrom: gray
colorTo: blue
sdk: gradio
app_file: app.py
license: apache-2.0
---

Names photos with a network of [iabn_hub]({source}), and shows how many bytes less a network of timm or torchvision
would keep for its backward pass.
"""
APP = """import iabn_hub.demo.app

app = iabn_hub.demo.app.make_app({model!r})
app.queue(default_concurrency_limit=2)

if __name__ == "__main__":
    app.launch(max_file_size=f"{{iabn_hub.demo.app.LARGEST_MB}}mb", show_error=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder, made if missing")
    parser.add_argument("--model", help="a name of 'iabn-hub list', or hf-hub:ORG/NAME (default: EfficientNet-Lite0)")
    parser.add_argument("--source", default="https://github.com/OWNER/iabn_hub", help="the package's repository")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds files")
    given = parser.parse_args()
    if given.model and not given.model.startswith("hf-hub:") and given.model not in list_models(pretrained=True):
        print(
            f"build_space: --model is {given.model!r}, not a name of 'iabn-hub list' or hf-hub:ORG/NAME",
            file=sys.stderr,
        )
        return 2
    if given.out.is_dir() and any(given.out.iterdir()) and not given.overwrite:
        print(f"build_space: {given.out} holds files: name another folder, or pass --overwrite", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    files = {
        "README.md": CARD.format(source=given.source),
        "app.py": APP.format(model=given.model),
        "requirements.txt": f"iabn-hub[demo] @ git+{given.source}@v{__version__}\n",
    }
    for name, text in files.items():
        (given.out / name).write_text(text)
        print(given.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
