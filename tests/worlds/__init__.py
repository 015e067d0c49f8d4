"""What tests are made of: chats and prose, hostile files, recipes, releases and a hub to publish them to, kernels run by the interpreter."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
