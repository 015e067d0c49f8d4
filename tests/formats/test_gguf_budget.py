"""A size instead of a type: the best of all maps, to the byte and never above it."""

import itertools
import random

import pytest

from qquant import recipe
from qquant.errors import InputError, UsageError
from qquant.formats.gguf import budget, claims, patterns
from qquant.formats.gguf.budget import Option, abridged, with_least_loss
from qquant.formats.gguf.mix import ModelShape
from qquant.plan.plan import Plan
from qquant.source.checkpoint import Checkpoint

HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0}
checks: {windows: 2, length: 64}
artifacts:
"""


def problem(seed, tensors=5, types=4):
    """Tensors with types of random bytes and losses, also such as lose more in more bytes."""
    draw = random.Random(seed)
    return {
        f"t{number}": [
            Option(f"q{kind}", 32 * draw.randint(1, 40), draw.random() * 4.0**-kind) for kind in range(types)
        ]
        for number in range(tensors)
    }


def best(options, room):
    """The least loss of all maps that fit, by looking at each."""
    maps = itertools.product(*options.values())
    return min(sum(one.loss for one in some) for some in maps if sum(one.bytes for one in some) <= room)


def of(options, types):
    some = [next(one for one in those if one.type == types[name]) for name, those in options.items()]
    return sum(one.bytes for one in some), sum(one.loss for one in some)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_map_in_this_size_loses_less(seed):
    options = problem(seed)
    least = sum(min(one.bytes for one in those) for those in options.values())
    for room in (least, least + 31, least + 32, least + 500, least + 1500, least + 10**6):
        used, loss = of(options, with_least_loss(options, room))
        assert used <= room
        assert loss == pytest.approx(best(options, room))


def test_where_bytes_are_told_apart_roughly_none_is_spent_too_much(monkeypatch):
    for seed in range(20):
        options = problem(seed)
        least = sum(min(one.bytes for one in those) for those in options.values())
        room = least + 1700
        exact = of(options, with_least_loss(options, room))[1]
        monkeypatch.setattr(budget, "CELLS", 25)
        used, loss = of(options, with_least_loss(options, room))
        monkeypatch.undo()
        assert used <= room
        assert exact <= loss <= 3 * exact


def test_a_map_is_written_short_and_read_back(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512, num_hidden_layers=5))
    shape = ModelShape(checkpoint.family, checkpoint.config)
    draw = random.Random(3)
    types = {name: draw.choice(["q4_k", "q4_k", "q4_k", "q6_k", "q8_0"]) for name in shape.matrices()}
    short = abridged(types)
    assert len(short) < len(types)
    for given in (short, dict(reversed(short.items()))):
        assert {name: kinds for name, (kinds,) in patterns.allowed(given, shape.matrices(), "a").items()} == types


def planned(checkpoint, line, **options):
    loaded = recipe.parse(f"{HEAD}  - {{name: small, format: gguf, gates: {{defaults: false}}, {line}}}\n")
    return Plan.of(loaded.model_copy(update=options), checkpoint)


def test_files_are_no_larger_than_was_asked_for_and_use_what_they_can(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    sizes = {}
    for kind in ("q2_k", "q4_0", "q6_k", "q8_0"):
        uniform = planned(checkpoint, f"type: {kind}").artifacts[0]
        asked = uniform.files[0].size
        for few in (0, 1, 33):
            plan = planned(checkpoint, f"size: {asked + few}B")
            (file, _) = plan.artifacts[0].files
            assert asked - 40_000 < file.size <= asked + few
            assert plan.unsettled == ("small",)
            assert plan.artifacts[0].spec.size is None
        sizes[kind] = file.size
        bits = uniform.bits_per_weight
        found = planned(checkpoint, f"bits_per_weight: {bits!r}").artifacts[0].bits_per_weight
        assert bits - 0.1 < found <= bits
    assert sorted(sizes.values()) == list(sizes.values())


def test_parts_are_counted_with_their_headers(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    asked = 3_500_000
    for _ in range(3):
        files = planned(checkpoint, f"size: {asked}B", gguf_split_size=3_000_000).artifacts[0].files
        parts = [file.size for file in files if file.tensors]
        assert len(parts) > 1
        assert sum(parts) <= asked
        asked = sum(parts) - 1


def test_artifacts_whose_types_are_to_be_chosen_are_named_in_the_order_of_the_recipe(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    names = ["six", "five", "four", "three", "two", "one"]
    lines = "".join(f"  - {{name: {name}, format: gguf, size: 4MB}}\n" for name in names)
    assert Plan.of(recipe.parse(HEAD + lines), checkpoint).unsettled == tuple(names)


def test_losses_decide(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    line = "size: 4MB, types: {output: q8_0, token_embd: [q2_k, q4_k, q6_k]}"
    loaded = recipe.parse(f"{HEAD}  - {{name: small, format: gguf, {line}}}\n")
    kinds = ("q2_k", "q3_k", "q4_k", "q4_0", "q4_1", "iq4_nl", "iq4_xs", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0", "bf16")
    matrices = [name for name, shape in checkpoint.family.shapes(checkpoint.config).items() if len(shape) == 2]
    losses = {
        name: {kind: (1e-9 if "embed" in name else 1.0) / (place + 1) for place, kind in enumerate(kinds)}
        for name in matrices
    }
    plan = Plan.of(loaded, checkpoint, losses={"small": losses})
    stored = {name: plan.artifacts[0].stored[name].type for name in matrices}
    assert stored["model.embed_tokens.weight"] == "q2_k"
    assert stored["lm_head.weight"] == "q8_0"
    assert plan.unsettled == ()
    assert plan.expected["small"] == pytest.approx(sum(losses[name][stored[name]] for name in matrices))


def test_the_mix_in_the_metadata_is_the_largest_that_is_not_larger(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    shape = ModelShape(checkpoint.family, checkpoint.config)
    asked = planned(checkpoint, "type: q5_k_m").artifacts[0].files[0].size
    artifact = planned(checkpoint, f"size: {asked}B").artifacts[0]
    names = {checkpoint.family.gguf_name(name): stored.type for name, stored in artifact.stored.items()}
    assert artifact.spec.kind == claims.kind_of({name: names[name] for name in shape.matrices()}, shape)
    assert recipe.parse(recipe.dump(recipe.parse(f"{HEAD}  - {{name: s, format: gguf, type: {artifact.spec.kind}}}\n")))


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("size: 1MB", UsageError, r"small: size 1,000,000 bytes: .* can have [\d,]+ bytes to [\d,]+ bytes"),
        ("size: 1GB", UsageError, r"size 1,000,000,000 bytes: .* can have"),
        ("bits_per_weight: 1.5", UsageError, r"bits_per_weight 1.5: .* can have 2\.\d+ to 16.\d+"),
        ("bits_per_weight: 9, types: {'*': [q4_k, q5_k, q5_0]}", UsageError, r"can have 4\.\d+ to 5\.\d+"),
        ("size: 3MB, types: {attn_q: q8_0}", UsageError, "attn_q: fits no matrix"),
        ("size: 3MB, types: {'blk.*.ffn_down': [q4_k, q6_k]}", InputError, "rows of 544, and q4_k needs a multiple of 256"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_with_those_that_can(make_checkpoint, line, error, said):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=544))
    with pytest.raises(error, match=said):
        planned(checkpoint, line)
