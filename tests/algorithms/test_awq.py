"""AWQ: the block's function does not change, and the search minimises what it says."""

import pytest
import torch

from qquant.algorithms.awq import Tie, _candidates, awq
from qquant.algorithms.gptq import factorize, on_searched_scales
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import UniformGrid, nearest, value_of
from qquant.algorithms.problem import unstacked
from qquant.families.decoder import Block, embed
from qquant.solve.solver import rounding_of
from qquant.source.checkpoint import Checkpoint

GRID = UniformGrid(4, 32, symmetric=False, search="minmax")


def norms(checkpoint):
    return [stage.norm for stage in checkpoint.family.stages if stage.norm]


def observed(folder):
    """Block 0 of a checkpoint, its inputs with outlier channels, and its Gram matrices."""
    checkpoint = Checkpoint.open(folder)
    weights = checkpoint.block(0)
    for norm in norms(checkpoint):
        weights[norm][::9] *= 12
    block = Block(checkpoint.family, checkpoint.config, weights, torch.float32)
    x = embed(checkpoint, torch.randint(0, 8192, (200,)), torch.float32)
    inputs = checkpoint.family.inputs(checkpoint.config, 0)
    grams = {stage: Gram.zeros(columns) for stage, columns in inputs.items()}
    block.forward(x, lambda stage, value: grams[stage].add(value))
    return checkpoint, weights, block, x, grams


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_function_of_the_block_is_unchanged(make_checkpoint, kv_heads):
    require_the_same_function(make_checkpoint(num_key_value_heads=kv_heads))


def test_function_of_the_block_is_unchanged_in_every_family(family, make_checkpoint):
    require_the_same_function(make_checkpoint(family=family))


def require_the_same_function(folder):
    checkpoint, weights, block, x, grams = observed(folder)
    scaled = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: GRID, 20)
    assert {choice.stage for choice in scaled.choices if choice.ratio is not None} == {
        stage.name for stage in checkpoint.family.stages
    }
    before, after = (
        block.forward(x),
        Block(checkpoint.family, checkpoint.config, scaled.weights, torch.float32).forward(x),
    )
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for norm in norms(checkpoint):
        assert not torch.equal(scaled.weights[norm], weights[norm].float())
        assert torch.equal(scaled.weights[norm], scaled.weights[norm].bfloat16().float()), (
            "a stored norm must lose nothing"
        )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_statistics_follow_the_scaling(make_checkpoint, kv_heads):
    """H' = S^-1 H S^-1 equals the Gram matrix measured on the scaled block."""
    checkpoint, weights, _, x, grams = observed(make_checkpoint(num_key_value_heads=kv_heads))
    scaled = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: GRID, 20)
    measured = {name: Gram.zeros(len(gram.absolute)) for name, gram in grams.items()}
    Block(checkpoint.family, checkpoint.config, scaled.weights, torch.float32).forward(
        x, lambda s, v: measured[s].add(v)
    )
    for name, gram in scaled.grams.items():
        assert torch.allclose(
            gram.matrix, measured[name].matrix, rtol=2e-3, atol=2e-3 * float(gram.matrix.abs().max())
        ), name
        assert torch.allclose(gram.absolute, measured[name].absolute, rtol=2e-3), name


def test_loss_is_the_output_error_over_all_tokens(make_checkpoint):
    """The recorded loss is ||X (W - Q(Ws)/s)'||^2 / ||X W'||^2 computed from the tokens, and below the unscaled one."""
    checkpoint, weights, block, x, grams = observed(make_checkpoint())
    inputs = {}
    block.forward(x, inputs.__setitem__)
    scaled = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: GRID, 20)
    choice = next(choice for choice in scaled.choices if choice.stage == "gate_up")
    error = energy = plain = 0.0
    scale = weights["post_attention_layernorm.weight"].float() / scaled.weights["post_attention_layernorm.weight"]
    for linear in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        weight = weights[linear].float()
        wide = weight * scale
        levels = GRID.fit(wide).step_and_offset()
        rounded = value_of(nearest(wide, *levels, GRID), *levels, GRID) / scale
        error += float((inputs["gate_up"] @ (rounded - weight).T).square().sum())
        levels = GRID.fit(weight).step_and_offset()
        plain += float(
            (inputs["gate_up"] @ (value_of(nearest(weight, *levels, GRID), *levels, GRID) - weight).T).square().sum()
        )
        energy += float((inputs["gate_up"] @ weight.T).square().sum())
    assert choice.loss == pytest.approx(error / energy, rel=0.05)  # the norm's rounding moves s a little
    assert choice.unscaled == pytest.approx(plain / energy, rel=0.01)
    assert choice.loss < choice.unscaled


def test_a_pair_that_gains_nothing_is_left_alone(make_checkpoint):
    checkpoint, weights, _, _, grams = observed(make_checkpoint())
    exact = UniformGrid(8, 32, symmetric=False, search="minmax")
    for stage in checkpoint.family.stages:  # weights already on the grid: rounding costs nothing without scaling
        for linear in stage.linears:
            levels = exact.fit(weights[f"{linear}.weight"].float()).step_and_offset()
            weights[f"{linear}.weight"] = value_of(
                nearest(weights[f"{linear}.weight"].float(), *levels, exact), *levels, exact
            )
    scaled = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: exact, 4)
    untouched = [choice for choice in scaled.choices if choice.ratio is None]
    assert untouched
    assert all(choice.loss == choice.unscaled for choice in untouched)


def test_the_scale_is_chosen_by_the_loss_of_what_will_be_written(make_checkpoint, monkeypatch):
    """Of every candidate, solved by GPTQ for its own inputs and held against the tokens, the chosen one is the best or nearly so, and its loss is as recorded."""
    checkpoint, weights, block, x, grams = observed(make_checkpoint())
    inputs = {}
    block.forward(x, inputs.__setitem__)
    grid, rounding = UniformGrid(4, 32, symmetric=False, search="importance"), rounding_of(0.01)
    scaled = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: grid, 10, rounding)
    choice = next(choice for choice in scaled.choices if choice.stage == "qkv")
    stage = checkpoint.family.stage("qkv")
    linears = {linear: weights[f"{linear}.weight"].float() for linear in stage.linears}
    gram, grids = grams["qkv"], dict.fromkeys(linears, grid)
    energy = sum(float((inputs["qkv"] @ w.T).square().sum()) for w in linears.values())
    losses = {}
    for ratio, scale in _candidates(linears, grids, gram, 10, Tie(1, 1, 64)):
        wide, inverse = {name: w * scale for name, w in linears.items()}, factorize(gram.scaled(scale), 0.01)
        codes, params = on_searched_scales(wide, inverse, gram.tokens, grid)
        split = unstacked(wide, codes).items()
        values = {name: value_of(code, *params[name].step_and_offset(), grid) for name, code in split}
        error = sum(float((inputs["qkv"] @ (values[n] / scale - w).T).square().sum()) for n, w in linears.items())
        losses[ratio] = error / energy
    assert choice.loss == pytest.approx(losses[choice.ratio], rel=1e-3)
    assert choice.unscaled == pytest.approx(losses[None], rel=1e-3)
    assert choice.loss <= 1.05 * min(losses.values())
    monkeypatch.setattr("qquant.algorithms.awq.ROWS", 16)
    by_some = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: grid, 10, rounding).choices[0]
    assert by_some.loss != choice.loss
    assert losses[by_some.ratio] <= 1.1 * min(losses.values())
    nearest_choice = awq(checkpoint.family, checkpoint.config, weights, grams, lambda *_: grid, 10).choices[0]
    assert choice.loss < nearest_choice.loss
