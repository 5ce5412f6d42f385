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


def test_nothing_left_of_a_slice_is_refused(tmp_path):
    source = saved(tmp_path / "source")
    config = PruningConfig(1.0, scope="global", target_modules=["pos_conv_embed.conv"])
    with pytest.raises(PlanError, match="nothing would be left of"):
        load_native(str(source)).prune(config)
    with pytest.raises(PlanError, match="nothing would be left of"):
        prune_stream(source, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
