"""PruningCallback in a Trainer of another library."""

import pytest
from datasets import Dataset

from hf_prune import MaskStore, PruningCallback, PruningConfig, Schedule
from tests import models

trl = pytest.importorskip("trl", reason="needs trl")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_fine_tuning_by_trl(tmp_path):
    model, tokenizer = models.tiny_llama(), models.tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    callback = PruningCallback(PruningConfig(0.75, criterion="movement", schedule=Schedule("cubic", begin=2, end=8)))
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "max_length": 16, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_dict({"text": models.tiny_sentences(64)["sentence"]}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    masks = MaskStore.of(model).masks
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert gone == round(0.75 * sum(mask.numel() for mask in masks.values()))
    assert not any(model.get_parameter(name).detach()[~mask].any() for name, mask in masks.items())
    assert [e["sparsity"] for e in trainer.state.log_history if "loss" in e][-1] == pytest.approx(0.75)
