"""What removing units costs, against brute force."""

import itertools

import pytest
import torch

from hf_prune.kernels.least_squares import damped
from hf_prune.structured.loss_curves import Curve, additive_curve, fisher_curve, reconstruction_curve, redundancy_curve


def test_additive_by_hand():
    curve = additive_curve(torch.tensor([3.0, 1.0, 1.0, 2.0]))
    assert curve.order.tolist() == [1, 2, 3, 0]
    assert curve.losses.tolist() == [0, 1, 2, 4, 7]
    assert curve.kept(2).tolist() == [0, 3]
    assert curve.kept(0).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_fisher_losses_are_those_of_the_sets(seed):
    gradients = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).double()
    matrix = gradients.t() @ gradients / 7
    curve = fisher_curve(matrix)
    assert sorted(curve.order.tolist()) == list(range(6))
    highest = 0.0
    for n in range(1, 7):
        gone = curve.order[:n]
        highest = max(highest, float(matrix[gone][:, gone].sum()))
        assert float(curve.losses[n]) == pytest.approx(highest)
    assert int(curve.order[0]) == int(matrix.diagonal().argmin())


def test_units_that_cancel_go_together_and_twins_do_not():
    opposite = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0, 0.0, 1.5]])
    assert fisher_curve(opposite).order.tolist() == [2, 0, 1]
    assert fisher_curve(opposite).losses.tolist() == [0, 1.5, 3.5, 3.5]
    twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
    assert fisher_curve(twins).order.tolist() == [0, 2, 1]


def _least_error(weight, gram, outputs, gone):
    """The least error of the outputs without some columns, by solving for the others."""
    stay = [j for j in range(weight.shape[1]) if j not in gone]
    a = gram[stay][:, stay]
    b = gram[stay] @ weight.t()
    found = torch.linalg.solve(a, b).t() if stay else torch.zeros(len(weight), 0).double()
    change = weight.clone()
    change[:, stay] -= found
    return float((((change @ gram) * change).sum(1) * outputs).sum())


@pytest.mark.parametrize("width", [1, 2])
def test_reconstruction_losses_are_those_of_least_squares(width):
    generator = torch.Generator().manual_seed(width)
    units = 4
    weight = torch.randn(3, units * width, generator=generator)
    x = torch.randn(50, units * width, generator=generator) @ torch.randn(
        units * width, units * width, generator=generator
    )
    gram, outputs = x.t() @ x / 50, torch.tensor([1.0, 0.1, 3.0])
    curve = reconstruction_curve(weight, gram, outputs, units)
    solid = damped(gram.double())

    def error(gone):
        columns = [u * width + i for u in gone for i in range(width)]
        return _least_error(weight.double(), solid, outputs.double(), columns)

    for n in range(units + 1):
        gone = curve.order[:n].tolist()
        assert float(curve.losses[n]) == pytest.approx(error(gone), rel=1e-3)
    assert int(curve.order[0]) == min(range(units), key=lambda u: error([u]))
    best = min(itertools.combinations(range(units), 2), key=error)
    assert error(curve.order[:2].tolist()) <= 1.5 * error(best)


def test_reconstruction_in_chunks_is_close_to_one_by_one(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 40, generator=generator), torch.randn(200, 40, generator=generator)
    gram, outputs = x.t() @ x / 200, torch.ones(6)
    exact = reconstruction_curve(weight, gram, outputs, 40)
    monkeypatch.setattr("hf_prune.structured.loss_curves._STEPS", 10)
    coarse = reconstruction_curve(weight, gram, outputs, 40)
    assert sorted(coarse.order.tolist()) == list(range(40))
    assert bool((coarse.losses.diff() >= 0).all())
    assert float(coarse.losses[20]) == pytest.approx(float(exact.losses[20]), rel=0.2)
    assert float(coarse.losses[-1]) == pytest.approx(float(exact.losses[-1]), rel=1e-3)


def test_a_unit_that_nothing_reads_costs_nothing():
    weight = torch.tensor([[1.0, 0.0, 2.0]])
    curve = reconstruction_curve(weight, torch.eye(3), torch.ones(1), 3)
    assert int(curve.order[0]) == 1
    assert float(curve.losses[1]) == 0


def test_no_units_at_all():
    assert reconstruction_curve(torch.zeros(2, 0), torch.zeros(0, 0), torch.ones(2), 0).losses.tolist() == [0]
    assert Curve(torch.zeros(0, dtype=torch.int64), torch.zeros(1)).kept(0).tolist() == []


@pytest.mark.parametrize("width", [1, 2])
def test_redundancy_is_the_share_of_the_variance_that_others_do_not_explain(width):
    generator = torch.Generator().manual_seed(width)
    units = 5
    x = torch.randn(300, units * width, generator=generator)
    x = x @ torch.randn(units * width, units * width, generator=generator)
    gram, fisher = x.t() @ x / 300, torch.rand(units, generator=generator) + 0.1
    solid = damped(gram.double())
    curve = redundancy_curve(fisher, gram, units)

    def unexplained(unit, others):
        own = [unit * width + i for i in range(width)]
        rest = [u * width + i for u in others for i in range(width)]
        left = solid[own][:, own]
        if rest:
            left = left - solid[own][:, rest] @ torch.linalg.solve(solid[rest][:, rest], solid[rest][:, own])
        return float(left.diagonal().sum() / gram[own][:, own].diagonal().double().sum())

    alive, total = list(range(units)), 0.0
    for n, unit in enumerate(curve.order.tolist()):
        scores = {u: float(fisher[u]) * min(1.0, unexplained(u, [v for v in alive if v != u])) for u in alive}
        assert scores[unit] == pytest.approx(min(scores.values()), rel=1e-3)
        total += scores[unit]
        assert float(curve.losses[n + 1]) == pytest.approx(total, rel=1e-3)
        alive.remove(unit)


def test_of_twins_one_goes_first_and_the_other_last():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    curve = redundancy_curve(torch.tensor([9.0, 9.0, 1.0, 1.0]), x.t() @ x / 100, 4)
    assert curve.order.tolist()[0] in (0, 1)
    assert curve.order.tolist()[-1] in (0, 1)
