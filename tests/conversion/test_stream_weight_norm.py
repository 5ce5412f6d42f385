"""Weights that weight norm computes are streamed with the lengths of what is left of them."""

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from hf_prune import PlanError, PruningConfig, prune_stream
from hf_prune.auto import load_native
from tests.models import assert_unchanged, snapshot
from tests.test_models_as_they_come import WAVES

POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"


def saved(folder):
    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**WAVES)).eval()
    with torch.no_grad():
        model.get_parameter(f"{POSITIONS}.original1")[..., :2] *= 100  # without an effect on the outputs
    model.save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"scope": "global"}, {"criterion": "random", "scope": "global"}, {"criterion": "wanda"}],
    ids=lambda settings: "-".join(settings.values()) or "layer",
)
def test_like_in_memory_and_what_stays_keeps_its_values(settings, tmp_path):
    source, config = saved(tmp_path / "source"), PruningConfig(0.5, **settings)
    data = [{"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}]
    batches = data if config.needs else None
    model = load_native(str(source))
    module = model.get_submodule(POSITIONS.removesuffix(".parametrizations.weight"))
    dense = module.weight.detach().clone()
    model.prune(config, calibration=batches)
    report = prune_stream(source, config, tmp_path / "out", calibration=batches)
    assert report.to_dict()["nonzero"] == model.sparsity_report().to_dict()["nonzero"]
    assert f"{POSITIONS}.original1" in model.masks
    kept = module.weight != 0
    assert bool((~kept).any())
    assert torch.allclose(module.weight[kept], dense[kept], rtol=1e-5)
    assert_unchanged(load_native(str(tmp_path / "out")), snapshot(model))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["fisher_diagonal", "taylor"])
def test_gradients_are_those_of_the_directions(criterion, scope, tmp_path):
    """The convolution before the blocks learns with the first one, and lengths stay as they are."""
    source = saved(tmp_path / "source")
    some = ["original1", "projection", "k_proj", "output_dense", "classifier"]
    config = PruningConfig(0.5, criterion=criterion, scope=scope, target_modules=some)
    batches = [{"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}]
    batches[0]["labels"] = torch.tensor([0, 1])
    model = load_native(str(source))
    model.prune(config, calibration=batches)
    prune_stream(source, config, tmp_path / "out", calibration=batches)
    found = load_native(str(tmp_path / "out")).state_dict()
    assert f"{POSITIONS}.original1" in model.masks
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name] == 0, weight == 0), name
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_nothing_left_of_a_slice_is_refused(tmp_path):
    source = saved(tmp_path / "source")
    config = PruningConfig(1.0, scope="global", target_modules=["pos_conv_embed.conv"])
    with pytest.raises(PlanError, match="nothing would be left of"):
        load_native(str(source)).prune(config)
    with pytest.raises(PlanError, match="nothing would be left of"):
        prune_stream(source, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
