"""What tests are made of: chats and prose, hostile files, recipes, releases and a hub to publish them to, kernels run by the interpreter."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def importing(**more):
    """The environment of a child that imports this tree, and what this process may import: packages may lie on PYTHONPATH alone."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | more
