"""Models in bfloat16 are pruned in bfloat16, on statistics that are gathered in float32."""

import copy
import dataclasses

import pytest
import torch

from hf_prune import CRITERIA, PruningConfig, prune, sparsity_report
from hf_prune.pruning import compute_masks as module
from tests import models
from tests.models import tiny_batches

_REPAIRED = {"repair": "least_squares"}
CALIBRATED = [name for name in CRITERIA.names() if CRITERIA.get(name).needs - {"training_score"}]
METHODS = {
    **{name: {"criterion": name, **({"scope": "row"} if name == "wanda" else {})} for name in CALIBRATED},
    "magnitude, repaired": {"criterion": "magnitude", **_REPAIRED},
    "alps, for the loss": {"criterion": "alps", "objective": "loss", "allocation": "fisher", **_REPAIRED},
    "wanda, for the loss": {"criterion": "wanda", "objective": "loss", **_REPAIRED},
}


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_float32_and_decide_as_those_of_the_same_weights_in_float32(method, monkeypatch):
    config = PruningConfig(0.5, **METHODS[method])
    half = models.tiny_llama(initializer_range=0.3).bfloat16()
    single = copy.deepcopy(half).float()
    batches = tiny_batches(half)
    seen = []
    compute = module.compute_masks

    def watch(model, plan, stats, *args, **kwargs):
        for of_weight in stats.values():
            values = (getattr(of_weight, field.name) for field in dataclasses.fields(of_weight))
            seen.extend(value.dtype for value in values if isinstance(value, torch.Tensor))
        return compute(model, plan, stats, *args, **kwargs)

    monkeypatch.setattr(module, "compute_masks", watch)
    prune(half, config, calibration=batches)
    prune(single, config, calibration=batches)
    assert set(seen) <= {torch.float32}
    assert seen or config.needs & {"fisher"}  # whose blocks go another way
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert sparsity_report(half).target_sparsity == pytest.approx(0.5, abs=0.01)
    names = [name for name, _ in half.named_parameters() if name.endswith("proj.weight")]
    pairs = [(half.get_parameter(name) == 0, single.get_parameter(name) == 0) for name in names]
    agree = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert agree > 0.85  # of weights as small as these, whose scores are close to one another
