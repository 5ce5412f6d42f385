"""Conversations as the data of a language model on the command line: the chat template writes them out."""

import json
import math

import pytest
import torch

from hf_prune import evaluate_perplexity, prune
from hf_prune.auto import load_native
from hf_prune.calibration.texts import token_windows
from hf_prune.errors import DataError
from hf_prune.evaluation.tasks import LanguageModelingTask
from tests import models
from tests.calibration.test_conversations import TEMPLATE


def _chats(n):
    """Conversations of a question and an answer; every other one has a name that the others lack."""
    chats = []
    for i in range(n):
        asked = " ".join(f"w{(i * 7 + j) % 40}" for j in range(6))
        answered = " ".join(f"w{(i * 3 + j) % 40}" for j in range(8))
        name = {"name": "w9"} if i % 2 else {}
        chats.append([{"role": "user", "content": asked, **name}, {"role": "assistant", "content": answered}])
    return chats


CHATS = _chats(48)
NAMED = TEMPLATE.replace("{{ m.content }}", "{% if 'name' in m %}{{ m.name }} {% endif %}{{ m.content }}")


def _written(chats):
    tokens = []
    for chat in chats:
        for message in chat:
            role = "w40" if message["role"] == "user" else "w41"
            tokens += [role, *message.get("name", "").split(), *message["content"].split(), "w42"]
    return models.tiny_tokenizer()(" ".join(tokens), add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    tokenizer = models.tiny_tokenizer()
    models.tiny_llama().save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    tokenizer.chat_template = NAMED
    models.tiny_llama().save_pretrained(root / "chat")
    tokenizer.save_pretrained(root / "chat")
    rows = [{"prompt_id": str(i), "title": "a title", "messages": chat} for i, chat in enumerate(CHATS)]
    (root / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "splits").mkdir()
    for split in ("train", "validation"):
        (root / "splits" / f"{split}.jsonl").write_text((root / "chat.jsonl").read_text())
    return root


def _tokenizer():
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = NAMED
    return tokenizer


def test_windows_are_cut_from_what_the_template_writes(root):
    task = LanguageModelingTask(str(root / "chat.jsonl"))
    written = _written(CHATS)
    windows = token_windows(task.load("train"), _tokenizer(), n=1000, length=10, batch_size=1000)[0]["input_ids"]
    every = [written[i : i + 10] for i in range(0, len(written) - 9, 10)]
    assert sorted(windows.tolist()) == sorted(every)


def test_pruning_and_scoring(hf_prune, root, tmp_path):
    data, model, out = root / "chat.jsonl", root / "chat", tmp_path / "out"
    hf_prune("prune", model, "--criterion", "wanda", "--scope", "row", "--data", data, "--window", 16, "--out", out)
    expected = models.tiny_llama()
    windows = token_windows(CHATS, _tokenizer(), n=128, length=16)
    prune(expected, 0.5, criterion="wanda", scope="row", calibration=windows)
    found = load_native(str(out))
    weights = found.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())

    options = ["--data", data, "--window", 16, "--prompts", 4, "--new-tokens", 4]
    scores = json.loads(hf_prune("evaluate", out, "--against", model, *options, "--json"))
    score = evaluate_perplexity(found, _tokenizer(), CHATS, window=16)
    assert scores["evaluation"]["perplexity"] == pytest.approx(score.perplexity)
    assert scores["evaluation"]["n"] == len(_written(CHATS)) // 16
    generation = scores["generation"]["evaluation"]
    assert generation["chat"]
    for prompt in generation["prompts"]:
        assert prompt.startswith("w40")
        assert prompt.endswith("w42")  # of the question: the answer is the model's


def test_a_sweep(hf_prune, root, tmp_path):
    options = ["--sparsity", "0.5", "--criterion", "wanda", "--out", tmp_path / "sweep", "--json"]
    result = json.loads(hf_prune("sweep", root / "chat", "--data", root / "splits", *options))
    assert result["dense"]["n"] == len(_written(CHATS)) // 24


def test_a_search_holds_out_the_last_quarter(hf_prune, root, tmp_path):
    options = [
        "--goal",
        "sparser",
        "--presets",
        "fast",
        "--max-drop",
        1000,
        "--held-out",
        8,
        "--calibration-samples",
        8,
        "--out",
        tmp_path / "out",
    ]
    hf_prune("auto", root / "chat", "--data", root / "chat.jsonl", *options)
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    dense = json.loads((tmp_path / "out" / "results.json").read_text())["dense_score"]
    held_out = evaluate_perplexity(models.tiny_llama(), _tokenizer(), CHATS[-12:], window=24, limit=8)
    assert dense == pytest.approx(held_out.perplexity, abs=1e-9)
    options = [
        "--max-drop",
        99,
        "--held-out",
        4,
        "--window",
        16,
        "--criterion",
        "wanda",
        "--json",
        "--out",
        tmp_path / "most",
    ]
    found = json.loads(hf_prune("prune", root / "chat", "--data", root / "splits", "--split", "dev", *options))
    held_out = evaluate_perplexity(models.tiny_llama(), _tokenizer(), CHATS[-12:], window=16, limit=4)
    assert math.exp(-found["search"]["dense"]["value"]) == pytest.approx(held_out.perplexity, abs=1e-4)


def test_a_model_without_a_chat_template_is_refused(hf_prune, root, tmp_path):
    data, model = root / "chat.jsonl", root / "plain"
    message = "the data holds conversations, and TokenizersBackend has no chat template"
    pruned = ["prune", model, "--criterion", "wanda", "--data", data, "--out", tmp_path / "out"]
    swept = ["sweep", model, "--data", root / "splits", "--out", tmp_path / "sweep"]
    for command in (pruned, swept, ["evaluate", model, "--data", data]):
        assert message in " ".join(hf_prune(*command, code=1).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"messages": CHATS[0]}, {"messages": []}], None, r"row 2 of .*: 'messages' is \[\], expected a conversation"),
        (
            [{"conversations": [{"from": "human", "value": "w1"}]}],
            None,
            r"row 1 of .*'conversations' is .*, expected a",
        ),
        ([{"messages": CHATS[0]}], "chat", r"no column 'chat' \(found: messages\): name it with text_column"),
        ([{"chat": CHATS[0]}], None, r"has the columns chat, and none with a usual name for texts"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, rows, column, message):
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=message):
        LanguageModelingTask(str(tmp_path / "chat.jsonl"), column).load("train")


def test_texts_come_first_and_other_columns_are_named(tmp_path):
    chat = [{"role": "user", "content": "w1"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "w5", "messages": chat, "conversation": "w6"}))
    assert LanguageModelingTask(str(path)).load("train") == ["w5"]
    assert LanguageModelingTask(str(path), "messages").load("train") == [chat]
    path.write_text(json.dumps({"conversation": "w6", "title": "w7"}))
    assert LanguageModelingTask(str(path)).load("train") == ["w7"]  # strings are no conversations
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(DataError, match="is a single conversation: expected more, some to learn from and others"):
        LanguageModelingTask(str(path)).learned_and_held_out()
