"""LoRA on a sparse model: zeros stay zeros, in training and when the adapters are merged."""

import copy

import pytest
import torch

from hf_prune import MaskError, MaskStore, PruningTrainer, merge_lora, prune
from tests import models
from tests.test_trainer import Sentences, arguments

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft


def adapted(model):
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


def test_training_and_merging_keep_the_zeros(tmp_path):
    model = prune(models.tiny_bert(), 0.5)
    masks = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    wrapped = adapted(model)
    PruningTrainer(model=wrapped, args=arguments(tmp_path), train_dataset=Sentences()).train()
    batch = models.tiny_batches(model)[0]
    plain = copy.deepcopy(wrapped).merge_and_unload()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert plain.get_parameter(name)[~masks[name]].any()  # merging fills them

    scores = []

    def evaluate(scored):
        with torch.no_grad():
            scores.append(float(scored.eval()(**batch).logits.sum()))
        return scores[-1]

    report = merge_lora(wrapped, evaluate=evaluate)
    merged = report.model
    for key, mask in masks.items():
        weight = merged.get_parameter(key).detach()
        assert not weight[~mask].any()
        torch.testing.assert_close(weight[mask], plain.get_parameter(key).detach()[mask])
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert 0 < report.kept < 1
    assert (report.before, report.after) == tuple(scores)
    assert f"{report.after:.4f}" in str(report)
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "pruning_masks.safetensors").exists()


def test_what_cannot_be_merged():
    with pytest.raises(MaskError, match="expected a PeftModel"):
        merge_lora(models.tiny_bert())
    with pytest.raises(MaskError, match="has no masks"):
        merge_lora(adapted(models.tiny_bert()))
    assert "was not measured" in str(merge_lora(adapted(prune(models.tiny_bert(), 0.5))))
