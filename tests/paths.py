"""Where the recorded references lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
TOOLS = ROOT / "tools"
