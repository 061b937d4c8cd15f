"""Hatchling's hook: puts the libraries in the folder IABN_HUB_NATIVE into the wheel, without which it is pure; and the
bill of materials IABN_HUB_SBOM."""

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibraries(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if sbom := os.environ.get("IABN_HUB_SBOM"):
            build_data["sbom_files"].append(sbom)
        folder = os.environ.get("IABN_HUB_NATIVE")
        if not folder:
            return
        for path in sorted(Path(folder).glob("iabn_*")):
            build_data["force_include"][str(path)] = f"iabn_hub/_native/{path.name}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        # torch's stable ABI knows nothing of Python: one wheel serves every Python, and every torch from 2.10 on.
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
