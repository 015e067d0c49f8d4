"""The search of group scales: near the best of a dense scan, never worse than min-max, whatever the groups hold."""

import pytest
import torch

from qquant.errors import InputError
from qquant.kernels.group_search import group_search
from tests.worlds.interpreter_cases import weighted_error


def scan(weight, importance, width, levels, symmetric):
    """The least error of every group over a dense scan."""
    grouped = weight.view(len(weight), -1, width)
    if symmetric:
        span, zero = 2 * grouped.abs().amax(-1) / (levels - 1), torch.full(grouped.shape[:2], levels // 2.0)
        trials = [(span * f * sign, zero) for f in torch.linspace(0.4, 1.15, 150).tolist() for sign in (1, -1)]
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        span = (high - low) / (levels - 1)
        zero = (-low / span.clamp_min(1e-12)).round()
        trials = [
            (span * f, (zero + shift).clamp(0, levels - 1))
            for f in torch.linspace(0.4, 1.15, 75).tolist()
            for shift in range(-2, 3)
        ]
    errors = [
        weighted_error(weight, s.half().clamp(-65504, 65504) + (s == 0), z, importance, width, levels)
        for s, z in trials
    ]
    return torch.stack(errors).amin(0)


def minmax(weight, importance, width, levels, symmetric):
    grouped = weight.view(len(weight), -1, width)
    if symmetric:
        scale, zero = 2 * grouped.abs().amax(-1) / (levels - 1), torch.full(grouped.shape[:2], levels // 2.0)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (levels - 1)
        zero = (-low / scale.half().float()).round().clamp(0, levels - 1)
    return weighted_error(weight, scale.half(), zero, importance, width, levels)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [32, 128])
def test_group_search_is_nearly_the_best(symmetric, width):
    weight = torch.distributions.StudentT(4.0).sample((40, 256)) * 0.02
    importance = torch.exp(torch.randn(256))
    scales, zeros = group_search(weight, importance, width, 16, symmetric)
    found = weighted_error(weight, scales, zeros, importance, width, 16)
    assert found.sum() <= 1.02 * scan(weight, importance, width, 16, symmetric).sum()
    assert (found <= minmax(weight, importance, width, 16, symmetric) * (1 + 1e-5)).all()
    assert ((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_search_at_eight_bits_is_no_worse_than_minmax(symmetric):
    weight = torch.randn(64, 512) * 0.02
    importance = torch.exp(torch.randn(512))
    scales, zeros = group_search(weight, importance, 128, 256, symmetric)
    found = weighted_error(weight, scales, zeros, importance, 128, 256)
    assert (found <= minmax(weight, importance, 128, 256, symmetric) * (1 + 1e-4)).all()
    assert found.sum() <= 0.95 * minmax(weight, importance, 128, 256, symmetric).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_search_survives_odd_groups(symmetric):
    weight = torch.randn(6, 64) * 0.02
    weight[0], weight[1], weight[2], weight[3], weight[4] = 0, 0.5, -0.5, weight[3] * 1e-8, weight[4] * 1e8
    scales, zeros = group_search(weight, torch.ones(64), 32, 16, symmetric)
    assert torch.isfinite(scales).all()
    assert (scales != 0).all()
    assert (scales[0] == 1).all()
    constant = weighted_error(weight, scales, zeros, torch.ones(64), 32, 16)[1:3]
    assert (constant <= 32 * (0.5 * 2**-10) ** 2).all(), "a constant group is one level, up to float16"


def test_group_search_does_not_depend_on_the_company():
    """Rows are searched in chunks; a row's result must not depend on where it falls."""
    weight, importance = torch.randn(1500, 256) * 0.02, torch.rand(256) + 0.1
    scales, zeros = group_search(weight, importance, 128, 16, False)
    some = torch.tensor([3, 700, 1499])
    alone = group_search(weight[some], importance, 128, 16, False)
    errors = [weighted_error(weight[some], *pair, importance, 128, 16) for pair in (alone, (scales[some], zeros[some]))]
    assert torch.allclose(*errors, rtol=1e-6)


def test_group_search_with_a_gram_matrix():
    weight = torch.randn(40, 96) * 0.02
    x = torch.randn(500, 96) @ (torch.eye(96) + 0.5 * torch.randn(96, 96))
    whole = (x.T @ x / len(x)).double()
    blocks = torch.stack([whole[i : i + 32, i : i + 32] for i in range(0, 96, 32)]).float()

    def output_error(scales, zeros):
        grouped = weight.double().view(40, 3, 32)
        scale, zero = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
        e = grouped - scale * ((grouped / scale + zero).round().clamp(0, 15) - zero)
        return torch.einsum("ngk,gkl,ngl->ng", e, blocks.double(), e)

    with_blocks = output_error(*group_search(weight, blocks, 32, 16, True))
    with_diagonal = output_error(*group_search(weight, whole.diagonal().float(), 32, 16, True))
    assert with_blocks.sum() < with_diagonal.sum()
    diagonal_blocks = torch.diag_embed(whole.diagonal().float().view(3, 32))
    assert torch.equal(
        group_search(weight, diagonal_blocks, 32, 16, True)[0],
        group_search(weight, whole.diagonal().float(), 32, 16, True)[0],
    )


def test_group_search_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="do not divide"):
        group_search(torch.randn(4, 100), torch.ones(100), 32, 16, True)
    with pytest.raises(InputError, match="importance of shape"):
        group_search(torch.randn(4, 96), torch.ones(95), 32, 16, True)
