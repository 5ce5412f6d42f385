"""Batches without labels, and the batches that stand for the others."""

import torch

from hf_prune.calibration.batches import batch_kinds, sample_batches, without_labels
from tests import models


def test_labels_are_dropped():
    batch = {"input_ids": torch.ones(1, 3), "labels": torch.zeros(1)}
    assert without_labels(models.tiny_bert(), batch).keys() == {"input_ids"}
    assert batch.keys() == {"input_ids", "labels"}


def test_labels_of_a_decoder_become_its_inputs_and_ignored_ones_padding():
    model = models.tiny_t5()
    labels = torch.tensor([[5, 6, -100]])
    inputs = without_labels(model, {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": labels})
    assert inputs.keys() == {"input_ids", "decoder_input_ids", "decoder_attention_mask"}
    assert inputs["decoder_input_ids"].tolist() == [[model.config.decoder_start_token_id, 5, 6]]
    assert inputs["decoder_attention_mask"].tolist() == [[1, 1, 0]]
    labels = torch.tensor([[5, 6, 7]])
    assert "decoder_attention_mask" not in without_labels(model, {"labels": labels})
    given = {"decoder_input_ids": labels, "labels": labels}
    assert without_labels(model, given).keys() == {"decoder_input_ids"}


def test_the_first_smallest_and_largest_batch_of_each_kind_are_samples():
    batches = [{"x": torch.ones(n)} for n in (3, 2, 5, 4)] + [{"x": torch.ones(n, 1)} for n in (2, 2)]
    kinds = batch_kinds(batches)
    assert kinds == [0, 0, 0, 0, 4, 4]
    assert sample_batches(batches, kinds) == [0, 1, 2, 4]
