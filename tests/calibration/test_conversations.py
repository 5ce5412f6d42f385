"""Conversations as calibration data: the chat template writes them out."""

import pytest
import torch
from datasets import Dataset

from hf_prune import prune, sparsity_report
from hf_prune.calibration.read import read_calibration
from hf_prune.errors import CalibrationError, DataError
from tests import models

CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6 w7"},
        {"role": "user", "content": "w8"},
    ],
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ 'w40' if m.role == 'user' else 'w41' }} {{ m.content }} w42 {% endfor %}"
)
WRITTEN = ["w40 w1 w2 w42 w41 w3 w42", "w40 w4 w42 w41 w5 w6 w7 w42 w40 w8 w42"]


@pytest.fixture
def tokenizer():
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


FORMS = {
    "list": CHATS,
    "rows": [{"messages": chat, "source": "web"} for chat in CHATS],
    "columns": {"conversations": CHATS, "id": [1, 2]},
    "dataset": Dataset.from_dict({"Messages": CHATS, "prompt": ["a", "b"], "answer": ["c", "d"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_written_out_by_the_template_and_get_no_other_special_tokens(form, tokenizer):
    (batch,) = read_calibration(models.tiny_llama(), FORMS[form], tokenizer)
    tokens = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in WRITTEN]
    assert [row.tolist() for row in tokens] == expected


def test_a_chat_model_is_pruned_on_conversations_and_learns_from_their_tokens(tokenizer):
    llama = prune(models.tiny_llama(), 0.5, calibration=FORMS["dataset"], tokenizer=tokenizer)
    assert sparsity_report(llama).target_sparsity == pytest.approx(0.5, abs=0.01)
    (batch,) = read_calibration(llama, CHATS, tokenizer, labels=True)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_long_conversations_are_cut_to_what_the_model_reads(tokenizer):
    chat = [{"role": "user", "content": "w1 " * 100}]
    (batch,) = read_calibration(models.tiny_llama(), [chat], tokenizer)
    assert batch["input_ids"].shape == (1, 24)


def test_what_cannot_be_written_out_is_refused(tokenizer):
    llama = models.tiny_llama()
    with pytest.raises(CalibrationError, match=r"holds conversations, and \S+ has no chat template"):
        prune(llama, 0.5, calibration=CHATS, tokenizer=models.tiny_tokenizer())
    with pytest.raises(DataError, match=r"row 2 of the data is 'w1', expected a conversation as in row 1"):
        prune(llama, 0.5, calibration={"messages": [CHATS[0], "w1"]}, tokenizer=tokenizer)
    system = [{"role": "system", "content": "w1"}]
    with pytest.raises(CalibrationError, match=r"does not take row 1 of the data \(no system here"):
        prune(llama, 0.5, calibration=[system], tokenizer=tokenizer)
    assert all(map(torch.equal, llama.parameters(), models.tiny_llama().parameters()))
