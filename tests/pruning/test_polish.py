"""Polish: closer to the dense model, masks exact, everything else as it was, and said in the report."""

import copy
import json
import re
from unittest import mock

import pytest
import torch
from transformers import BertForQuestionAnswering, BertForTokenClassification, BertModel

from hf_prune.calibration.dense_outputs import DenseOutputs, _spread
from hf_prune.errors import CalibrationError, ConfigError, PlanError
from hf_prune.evaluation.sparsity_report import sparsity_report
from hf_prune.pipeline import prune
from hf_prune.planning.choices import POLISH_DEFAULTS
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning import polish as polish_module
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.calibration.test_statistics import Interrupted, state, unusual
from tests.models import assert_same_masks, assert_unchanged, same_bits, snapshot, tiny_batches
from tests.pruning.test_sequential import padded

QUICK = {"epochs": 4, "learning_rate": 1e-3}
BUILD = {**models.TRANSFORMERS, "vit": models.tiny_vit, "mlp": models.mlp}


def large(kind, seed=0):
    """A model whose layers matter."""
    model = BUILD[kind](seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_it_comes_closer_and_keeps_the_masks(kind):
    dense = large(kind)
    batches = tiny_batches(dense, sizes=(4,) * 10)
    model = copy.deepcopy(dense)
    modules = ".*convolution" if kind == "resnet" else "all-linear"
    plain = prune(copy.deepcopy(dense), 0.6, target_modules=modules)
    prune(model, 0.6, calibration=batches, polish=QUICK, target_modules=modules)
    store = MaskStore.of(model)
    assert store.masks.keys() == MaskStore.of(plain).masks.keys()
    for name, mask in MaskStore.of(plain).masks.items():
        assert torch.equal(mask, store.masks[name])
        assert not model.get_parameter(name)[~mask].any()
    record = store.polishes[-1]
    assert record.kept
    assert record.after < 0.9 * record.before
    assert (record.steps, record.epochs, record.examples) == (4 * 9, 4, 4 * 9)
    assert not all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "block", "outside"),
    [
        ("bert", "bert.encoder.layer", set()),
        ("gpt2", "transformer.h", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("llama", "model.layers", {"model.norm.weight"}),
        ("vit", "vit.layers", {"vit.layernorm.weight", "vit.layernorm.bias"}),
    ],
)
def test_targets_their_biases_and_the_norms_beside_them_are_trained_and_nothing_else(kind, block, outside):
    model = large(kind)
    before = snapshot(model)
    batches = tiny_batches(model, sizes=(4,) * 4)
    prune(model, 0.6, calibration=batches, polish=QUICK, target_modules=re.escape(block) + r"\.1\..*")
    changed = {name for name, parameter in model.named_parameters() if not same_bits(parameter, before[name])}
    expected = {name for name in dict(model.named_parameters()) if name.startswith(f"{block}.1.")} | outside
    assert expected - changed <= {name for name in expected if re.search(r"\bk(ey|_proj)\.bias$", name)}
    assert changed <= expected  # no embedding, pooler, classifier or other block
    store = MaskStore.of(model)
    sizes = [int(store.masks[n].sum()) if n in store.masks else model.get_parameter(n).numel() for n in expected]
    assert store.polishes[-1].trained == sum(sizes)


def test_tied_embeddings_stay_tied_and_as_they_were():
    model = large("bert_mlm")
    before = model.get_input_embeddings().weight.detach().clone()
    prune(model, 0.6, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same_bits(model.get_input_embeddings().weight.detach(), before)


def test_a_head_that_is_pruned_is_trained_on_the_logits():
    model = large("llama")
    before = model.lm_head.weight.detach().clone()
    prune(model, 0.6, target_modules=["lm_head"], calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    store = MaskStore.of(model)
    keep = store.masks["lm_head.weight"]
    assert store.polishes[-1].after < store.polishes[-1].before
    assert not torch.equal(model.lm_head.weight[keep], before[keep])
    assert not model.lm_head.weight[~keep].any()


def test_targets_that_are_embeddings_leave_nothing_to_train():
    model = large("gpt2")
    before = snapshot(model)
    batches = tiny_batches(model, sizes=(4,) * 4)
    with pytest.raises(PlanError, match="a polish has nothing to train: all targets are embeddings, which it leaves"):
        prune(model, 0.6, target_modules=["lm_head"], calibration=batches, polish=QUICK)
    assert_unchanged(model, before)


def token_classifier():
    return models._build(lambda: BertForTokenClassification(models._bert_config()), 0)


def question_answering():
    return models._build(lambda: BertForQuestionAnswering(models._bert_config()), 0)


def encoder():
    return models._build(lambda: BertModel(models._bert_config(), add_pooling_layer=False), 0)


@pytest.mark.parametrize(
    "build", [models.tiny_bert, token_classifier, question_answering, encoder, models.tiny_gpt2, models.tiny_bert_mlm]
)
def test_padding_does_not_count(build):
    model = build()
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in tiny_batches(model, sizes=(4,) * 3, length=5)]
    plan = make_plan(model, PruningConfig(polish="distill"))
    with (
        DenseOutputs(model, targets_of(plan), batches) as plain,
        DenseOutputs(model, targets_of(plan), [padded(b, 4) for b in batches]) as wide,
    ):
        torch.testing.assert_close(wide.sizes, plain.sizes, rtol=1e-3, atol=1e-6)
        assert plain.sizes.min() > 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
            with plain.running():
                first = sum(plain.distances(1))
            with wide.running():
                second = sum(wide.distances(1))
    assert first > 0.01
    torch.testing.assert_close(second, first, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_computes_no_logits_and_no_cache(kind):
    model = large(kind)
    batches = tiny_batches(model, sizes=(4,) * 3)
    seen = []
    with DenseOutputs(model, targets_of(make_plan(model, PruningConfig())), batches) as dense, dense.running():
        handle = model.register_forward_hook(lambda _, args, out: seen.append(out))
        list(dense.distances(0))
        handle.remove()
        assert dense.sizes[0] > 0
    assert seen[0].logits.shape[-1] == 1
    assert seen[0].past_key_values is None
    assert model(**batches[0]).logits.shape[-1] == model.config.vocab_size


def test_the_tokens_of_a_decoder_are_not_padded_where_the_encoder_is():
    """What an encoder-decoder puts out has the decoder's tokens, and the encoder's mask may have the same shape."""
    model = models.tiny_t5()
    batch = next(iter(tiny_batches(model, sizes=(4,), length=5)))
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 3:] = 0
    sizes = []
    plan = make_plan(model, PruningConfig(polish="distill"))
    for decoder in (None, 2):
        if decoder is not None:
            batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
            batch["decoder_attention_mask"][:, decoder:] = 0
        with DenseOutputs(model, targets_of(plan), [batch, batch]) as dense:
            sizes.append(len(dense._run(dense._windows(0)[0])[0]) / len(batch["labels"]) / model.config.d_model)
    assert sizes == [5, 2]


def test_the_distance_by_hand():
    """Of a model without blocks: the squared change of centred logits, relative to all of the dense ones."""
    model = models.mlp()
    batches = tiny_batches(model, sizes=(3, 4))
    with torch.no_grad():
        dense = [model(b["x"]).logits for b in batches]
        with DenseOutputs(model, targets_of(make_plan(model, PruningConfig())), batches) as outputs:
            model.fc2.weight[0, :4] = 0
            with outputs.running():
                found = sum(outputs.distances(1))
        now = model(batches[1]["x"]).logits
    centred = [z - z.mean(1, keepdim=True) for z in [*dense, now]]
    expected = (centred[2] - centred[1]).square().sum() / (centred[0].square().sum() + centred[1].square().sum())
    torch.testing.assert_close(found, expected)


def test_of_several_labels_each_logit_counts():
    outputs = []
    for problem in ("single_label_classification", "multi_label_classification"):
        model = models.tiny_bert(problem_type=problem)
        with torch.no_grad():
            model.classifier.weight[:] = model.classifier.weight[0]
            model.classifier.bias[:] = model.classifier.bias[0]
        with DenseOutputs(model, targets_of(make_plan(model, PruningConfig())), tiny_batches(model)) as dense:
            outputs.append(float(dense.sizes[0]))
    assert outputs[1] > 100 * outputs[0]


def test_of_deep_models_only_some_blocks_are_compared():
    for layers, expected in ((2, 3), (6, 7), (13, 7)):
        model = models.tiny_llama(num_hidden_layers=layers)
        with DenseOutputs(model, targets_of(make_plan(model, PruningConfig())), tiny_batches(model)) as dense:
            assert len(dense.sizes) == expected  # with what the output embedding gets
    blocks = [torch.nn.Linear(1, 1) for _ in range(13)]
    assert [blocks.index(block) for block in _spread(blocks, 6)] == [1, 3, 5, 8, 10, 12]


def test_labels_have_no_say():
    found = []
    for seed in (0, 1):
        model = large("bert")
        batches = tiny_batches(model, sizes=(4,) * 4)
        for batch in batches:
            batch["labels"] = torch.full_like(batch["labels"], seed)
        found.append(prune(model, 0.5, calibration=batches, polish=QUICK))
    assert_unchanged(found[0], snapshot(found[1]))


def test_more_training_than_helps_is_undone():
    """The weights of the best look at the held-out batches are kept, not the last ones."""
    model = large("bert")
    found = iter([1.0, 0.5, 0.2, 0.3, 0.4])
    weights = []

    def look(dense, batches):
        weights.append(snapshot(model))
        return next(found)

    with mock.patch.object(polish_module, "_distance", look):
        prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    record = MaskStore.of(model).polishes[-1]
    assert (record.before, record.after, record.kept) == (1.0, 0.2, True)
    assert_unchanged(model, weights[2])
    assert not all(same_bits(weights[2][name], weights[4][name]) for name in weights[2])


@pytest.mark.parametrize(("batches", "held"), [(2, [1]), (3, [1]), (14, [7]), (15, [7]), (40, [7, 22, 37])])
def test_some_batches_are_held_out(batches, held):
    assert list(polish_module.held_out(batches)) == held


def test_one_batch_is_refused():
    model = large("bert")
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="a polish got 1 batch: expected at least 2, of which one is held out"):
        prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,)), polish=QUICK)
    assert_unchanged(model, before)


def test_data_without_a_polish_is_refused():
    model = models.tiny_bert()
    with pytest.raises(ConfigError, match="polish_data is given, but there is no polish: set polish='distill'"):
        prune(model, 0.5, polish_data=tiny_batches(model))


def test_n_m_patterns_are_kept():
    model = large("llama")
    prune(model, granularity="2:4", calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    assert "2:4" in sparsity_report(model).nm_patterns
    assert MaskStore.of(model).polishes[-1].kept


def test_masks_of_an_earlier_pruning_hold():
    model = prune(large("bert"), 0.3)
    old = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    batches = tiny_batches(model, sizes=(4,) * 4)
    prune(model, 0.5, target_modules=["query"], criterion="wanda", calibration=batches, polish=QUICK)
    assert MaskStore.of(model).masks.keys() == old.keys()
    for name, mask in MaskStore.of(model).masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert not (mask & ~old[name]).any()


def test_random_numbers_and_flags_are_as_before():
    model = large("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    was, drawn = state(model), torch.get_rng_state()
    prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    assert state(model) == was
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_shuffles_the_batches():
    orders = [polish_module._order(range(9), 2, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(i for group in orders[0] for i in group) == sorted([*range(9)] * 2)


def test_each_process_has_a_batch_of_its_own_in_each_step():
    with mock.patch.object(polish_module, "rank_and_world_size", return_value=(0, 2)):
        order = polish_module._order([0, 1, 2, 4, 5], 1, 0)
    assert sorted(map(sorted, order)) == [[0, 1], [2, 5], [4]]


def test_nothing_removed_is_nothing_to_do():
    """The distance to itself is next to nothing, and the weights stay about where they are."""
    model = models.tiny_bert()
    before = snapshot(model)
    prune(model, 0.0, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    record = MaskStore.of(model).polishes[-1]
    assert record.before < 1e-3
    assert record.after <= record.before or not record.kept
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0.05, msg=name)


def test_a_polish_that_makes_it_worse_is_given_up():
    model = large("bert")
    batches = tiny_batches(model, sizes=(4,) * 20)
    plain = prune(copy.deepcopy(model), 0.5)
    prune(model, 0.5, calibration=batches, polish={"epochs": 1, "learning_rate": 0.9})
    record = MaskStore.of(model).polishes[-1]
    assert not record.kept
    assert record.after >= record.before
    assert_unchanged(model, snapshot(plain))
    assert "the distance on held-out batches did not fall; nothing was kept" in str(sparsity_report(model))


@pytest.mark.parametrize("settings", [{"criterion": "alps", "objective": "loss"}, {"criterion": "taylor"}, {}])
def test_dense_weights_come_back(settings):
    model = large("bert")
    before = snapshot(model)
    prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 8), polish=QUICK, keep_dense=True, **settings)
    assert MaskStore.of(model).polishes[-1].kept
    assert any(not same_bits(p, before[n]) for n, p in model.named_parameters() if "LayerNorm" in n)
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)


def test_other_data_than_for_the_statistics():
    model = large("bert")
    batches, more = tiny_batches(model), tiny_batches(model, sizes=(4,) * 20, seed=1)
    found = prune(model, 0.5, criterion="wanda", calibration=batches, polish_data=more, polish=QUICK)
    assert MaskStore.of(found).polishes[-1].examples == 4 * 19
    expected = prune(large("bert"), 0.5, criterion="wanda", calibration=batches)
    assert all(torch.equal(MaskStore.of(found).masks[n], m) for n, m in MaskStore.of(expected).masks.items())


def test_the_same_call_gives_the_same_weights():
    found = [
        prune(large("bert"), 0.5, calibration=tiny_batches(large("bert"), sizes=(4,) * 6), polish=QUICK)
        for _ in range(2)
    ]
    assert_unchanged(found[0], snapshot(found[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(dtype):
    model = large("bert").to(dtype)
    prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 6), polish=QUICK)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert MaskStore.of(model).polishes[-1].after < MaskStore.of(model).polishes[-1].before


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("settings", [{}, {"criterion": "sparsegpt", "repair": "least_squares"}])
def test_an_exception_midway_leaves_the_model_bit_for_bit(error, settings, monkeypatch):
    model = prune(unusual(large("bert")), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, was, store = snapshot(model), state(model), MaskStore.of(model)
    distance, calls = DenseOutputs.distances, [0]

    def stop(*args):
        calls[0] += 1
        if calls[0] == 6:
            raise error
        return distance(*args)

    monkeypatch.setattr(DenseOutputs, "distances", stop)
    with pytest.raises(error):
        prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK, **settings)
    assert_unchanged(model, before)
    assert state(model) == was
    assert_same_masks(model, store)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert not models.forward_hooks(model)


def test_a_distance_that_is_not_finite_is_refused(monkeypatch):
    model = large("bert")
    before = snapshot(model)
    distances = DenseOutputs.distances
    monkeypatch.setattr(DenseOutputs, "distances", lambda *a: (part * float("nan") for part in distances(*a)))
    with pytest.raises(
        CalibrationError, match=r"the polish diverged at step 1 of 4: lower its learning rate, now 0\.001"
    ):
        prune(model, 0.5, calibration=tiny_batches(model), polish=QUICK)
    assert_unchanged(model, before)


def test_dense_outputs_that_are_not_finite_are_refused():
    model = large("mlp")
    batches = tiny_batches(model)
    batches[1]["x"][0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(
        CalibrationError, match="the outputs of the dense model for the batches of the polish are not finite"
    ):
        prune(model, 0.5, calibration=batches, polish=QUICK)
    assert_unchanged(model, before)


def test_it_needs_batches():
    with pytest.raises(CalibrationError, match="polish needs calibration data, and got none"):
        prune(models.tiny_bert(), 0.5, polish="distill")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("distil", r"unknown polish 'distil': expected one of distill. Did you mean 'distill'"),
        (3, r"polish is 3: expected None, 'distill', or settings such as"),
        ({"epoch": 3}, r"unknown setting of polish 'epoch': expected one of epochs, learning_rate. Did you mean"),
        ({"epochs": 0}, r"polish\['epochs'\] is 0: expected an integer of at least 1"),
        ({"learning_rate": 0}, r"polish\['learning_rate'\] is 0: expected a number between 0 and 1"),
        ({"learning_rate": "fast"}, r"polish\['learning_rate'\] is 'fast': expected a number"),
    ],
)
def test_settings_that_make_no_sense(value, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(polish=value)


def test_settings_round_trip():
    config = PruningConfig(polish="distill")
    assert config.polish == dict(POLISH_DEFAULTS)
    assert PruningConfig.from_json(config.to_json()) == config
    assert PruningConfig(polish={"epochs": 1}).polish == {**POLISH_DEFAULTS, "epochs": 1}
    assert hash(config) == hash(PruningConfig(polish={}))
    assert "then trained (polish" in str(make_plan(models.tiny_bert(), config))


def test_the_report_says_what_was_done(tmp_path):
    from hf_prune import AutoPrunedModelForSequenceClassification, prunable

    model = prunable(large("bert"))
    model.prune(0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    text = model.sparsity_report().polish
    assert text.startswith("Polished: ")
    assert "parameters were trained for 12 steps and " in text
    assert "on 12 unlabelled examples (72 tokens), 4 times; on held-out batches the distance fell from" in text
    assert json.loads(model.sparsity_report().to_json())["polish"] == text
    model.save_pretrained(tmp_path)
    again = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)
    assert MaskStore.of(again).polishes == MaskStore.of(model).polishes
    assert text in again.sparsity_report().summary()
    again.prune(0.6)  # the weights have been trained all the same
    assert again.sparsity_report().polish == text
    again.prune(0.7, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    assert again.sparsity_report().polish.count("Polished: ") == 2
    assert prune(models.tiny_bert(), 0.5) is not None
    assert sparsity_report(prune(models.tiny_bert(), 0.5)).polish == ""


def test_bfloat16_is_only_asked_of_processors_that_have_it(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not polish_module.has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert polish_module.has_bf16(torch.device("cpu"))
