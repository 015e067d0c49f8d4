"""Models in several GGUF files: cut by gguf-split's rules, written, and read back as one model."""

import shutil

import pytest
import torch
from gguf import GGUFReader

from qquant import recipe
from qquant.artifact.manifest import verify_files
from qquant.artifact.opening import open_weights
from qquant.disk.output import MANIFEST
from qquant.errors import InputError, UsageError
from qquant.formats.gguf.container import Field, header_bytes, read_header
from qquant.formats.gguf.shards import read_model, shard_paths, split
from qquant.inspection import describe
from qquant.pipeline import build, check
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint
from tests.worlds.watched import Watched

FIELDS = [Field("general.architecture", "str", "qwen2")]
RECIPE = """
version: 1
name: shards
gguf_split_size: 1000000
calibration:
  sources: [{bundled: wikitext-2-valid}]
  samples: 2
  length: 64
  default_system_share: 0
checks: {windows: 2, length: 64}
artifacts:
  - {name: whole, format: gguf, type: q4_0, imatrix: false, gates: {kl_divergence: 10}}
  - {name: parts, format: gguf, type: q8_0, imatrix: false, gates: {kl_divergence: 10}}
"""


quiet = Quiet()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(checkpoint, recipe, plan, folder of GGUF files, report) of a build with one whole and one split file."""
    from tests.conftest import write_checkpoint

    folder = tmp_path_factory.mktemp("shards")
    (folder / "recipe.yaml").write_text(RECIPE)
    loaded = recipe.load(str(folder / "recipe.yaml"))
    checkpoint = Checkpoint.open(write_checkpoint(folder / "Tiny"))
    plan = Plan.of(loaded, checkpoint)
    report = build(loaded, checkpoint, plan, folder / "out", torch.device("cpu"), quiet)
    return checkpoint, loaded, plan, folder / "out" / "Tiny-GGUF", report


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([32, 32, 32], 96, [3]),
        ([32, 32, 32], 95, [2, 1]),
        ([31, 1, 32], 64, [2, 1]),  # as they are padded
        ([64, 32, 32, 64], 64, [1, 2, 1]),
        ([64, 64], 64, [1, 1]),
    ],
)
def test_tensors_are_gathered_up_to_the_limit(sizes, limit, expected):
    entries = [(f"t{i}", (size,), 24, size) for i, size in enumerate(sizes)]
    shards = split("m", FIELDS, entries, limit)
    assert [len(shard.entries) for shard in shards] == expected
    assert [entry for shard in shards for entry in shard.entries] == entries
    if len(expected) == 1:
        assert [(shard.name, shard.fields) for shard in shards] == [("m.gguf", FIELDS)]
        return
    count = len(expected)
    assert [shard.name for shard in shards] == [f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    for number, shard in enumerate(shards):
        own = [("split.no", "u16", number), ("split.tensors.count", "i32", len(sizes)), ("split.count", "u16", count)]
        assert [(f.key, f.kind, f.value) for f in shard.fields[0 if number else 1 :]] == own


def test_a_tensor_over_the_limit_is_named():
    with pytest.raises(UsageError, match=r"gguf_split_size 63: tensor b of m takes 64 bytes, and no tensor is cut"):
        split("m", FIELDS, [("a", (8,), 24, 8), ("b", (40,), 24, 40)], 63)


def test_a_split_build_is_the_whole_one_in_parts(built):
    checkpoint, _, plan, folder, report = built
    *split_files, modelfile = plan.artifacts[1].files
    assert modelfile.name == "Modelfile-q8_0"
    assert [file.name for file in split_files] == ["tiny-q8_0-00001-of-00002.gguf", "tiny-q8_0-00002-of-00002.gguf"]
    assert [(folder / file.name).stat().st_size for file in split_files] == [file.size for file in split_files]
    assert all(sum(tensor.nbytes for tensor in file.tensors) <= 1_000_000 for file in split_files)
    assert report.artifacts[1].size == sum(file.size for file in split_files) + modelfile.size
    first, source = folder / split_files[0].name, open_weights(folder / split_files[1].name)
    theirs = {tensor.name: tensor for file in shard_paths(first) for tensor in GGUFReader(file).tensors}
    assert theirs.keys() == source.header.tensors.keys()
    for name in checkpoint.family.shapes(checkpoint.config):
        error = source.tensor(name) - checkpoint.tensor(name).float()
        assert error.abs().max() <= checkpoint.tensor(name).abs().max() / 250  # half a step, and d in fp16
    assert verify_files(folder.parent / folder.name) == sum(
        file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST
    )


def test_a_split_model_is_checked_and_shown_as_one(built):
    checkpoint, loaded, plan, folder, report = built
    first, second = (folder / file.name for file in plan.artifacts[1].files[:2])
    gates = loaded.artifacts[1].gates
    again = check([first], checkpoint, loaded.checks, gates, torch.device("cpu"), quiet)
    assert again.artifacts[0].kl_divergence == report.artifacts[1].kl_divergence
    assert (
        again.artifacts[0].size == report.artifacts[1].size > first.stat().st_size + second.stat().st_size
    )  # Modelfile
    shown = describe(second)
    assert shown == describe(first)
    assert shown["facts"]["parts"] == 2
    assert shown["facts"]["general.name"] == "Tiny"
    assert len(shown["tensors"]) == len(read_model(first).tensors) == len(plan.artifacts[1].stored)


def test_a_part_alone_is_shown_and_not_loaded(built, tmp_path):
    second = built[3] / built[2].artifacts[1].files[1].name
    alone = tmp_path / second.name
    shutil.copy(second, alone)
    assert describe(alone)["facts"]["split.no"] == 1
    with pytest.raises(InputError, match=r"is one of 2 parts; tiny-q8_0-00001-of-00002\.gguf is not beside it"):
        open_weights(alone)
    renamed = tmp_path / "renamed.gguf"
    alone.rename(renamed)
    with pytest.raises(InputError, match=r"is part 2 of 2, .* it must be called NAME-00002-of-00002\.gguf"):
        open_weights(renamed)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (([("split.no", "u16", 0), ("split.count", "u16", 2)], "b"), r"says it is part 0 of 2"),
        (([("split.no", "u16", 1), ("split.count", "u16", 3)], "b"), r"says it is part 1 of 3"),
        (([("split.no", "u16", 1), ("split.count", "u16", 2)], "a"), r"tensor a is in another part, too"),
        (([("split.no", "u16", 1), ("split.count", "u16", 2)], None), r"hold 1 tensors, split.tensors.count is 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, second, message):
    for number, (fields, tensor) in enumerate(
        (([("split.no", "u16", 0), ("split.count", "u16", 2), ("split.tensors.count", "i32", 2)], "a"), second)
    ):
        entries = [(tensor, (8,), 0, 32)] if tensor else []
        head, _, size = header_bytes([Field(*field) for field in fields], entries)
        (tmp_path / f"m-{number + 1:05d}-of-00002.gguf").write_bytes(head.ljust(size, b"\0"))
    with pytest.raises(InputError, match=message):
        read_model(tmp_path / "m-00001-of-00002.gguf")


def test_an_interrupted_split_build_continues(built, tmp_path):
    """Bytes lost in the second part make its units be written again, and only those."""
    checkpoint, loaded, plan, folder, _ = built

    def stop(what, done, of):
        if what == "quantize" and done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(loaded, checkpoint, plan, out, torch.device("cpu"), Watched(stop))
    drafts = sorted((out / ".partial" / "parts").iterdir())
    assert {path.name for path in drafts} == {file.name for file in plan.artifacts[1].files}
    build(loaded, checkpoint, plan, out, torch.device("cpu"), quiet)
    for file in plan.artifacts[1].files:
        assert (out / "Tiny-GGUF" / file.name).read_bytes() == (folder / file.name).read_bytes()
    assert read_header(folder / plan.artifacts[1].files[1].name).value("general.name") is None
