"""What bundled data needs is installed with qquant; what hub data needs is an extra, and asked for by its name."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib

import pytest

from qquant.calibration.sources import Reading, open_source
from qquant.errors import EnvironmentMissingError
from qquant.recipe import Source
from tests.worlds import ROOT


def test_bundled_texts_import_neither_datasets_nor_pandas():
    code = """
import sys
from qquant import calibration, recipe
from qquant.calibration import Tokenizer
from qquant.resources import data_dir
tokenizer = Tokenizer.open(data_dir("recipes") / "demo" / "tiny-qwen1.5")
small = recipe.Calibration(sources=(recipe.Source(bundled="books-en"),), samples=2, length=32)
calibration.load(small, tokenizer, False)
print(sorted({"datasets", "pandas", "pyarrow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "library"), [({"dataset": "org/set"}, "datasets"), ({"path": "{}/rows.parquet"}, "pyarrow")]
)
def test_a_missing_extra_is_named(source, library, tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a))
    asked = Source(**{key: value.format(tmp_path) for key, value in source.items()})
    with pytest.raises(EnvironmentMissingError, match=r'pip install "qquant\[datasets\]"'):
        open_source(asked, Reading(frozenset()), 1)


def test_bounds_hold_what_is_installed():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert "datasets" not in needed
    for name in ("torch", "transformers"):
        bounds = {specifier.operator for specifier in needed[name].specifier}
        assert bounds == {">=", "<"}
        assert needed[name].specifier.contains(importlib.metadata.version(name).partition("+")[0])
