"""The engine: what flows into each target on the pruned prefix, in which order, and a model that is as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.padding import _columns
from hf_prune.calibration.read import read_calibration
from hf_prune.calibration.statistics import collect_stats
from hf_prune.calibration.texts import text_batches
from hf_prune.criteria.base import INPUTS
from hf_prune.errors import CalibrationError, ConfigError, DataError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning import compute_masks as scoring
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.run import CalibrationRun, MemoryBudget
from hf_prune.pruning.sequential import prune_sequentially
from hf_prune.pruning.transaction import Transaction
from tests import models
from tests.calibration.test_statistics import Interrupted, failing, state, unusual
from tests.models import assert_same_masks, assert_unchanged, same_bits, snapshot, tiny_batches

KINDS = ["bert", "distilbert", "gpt2", "llama", "t5", "albert", "bert_mlm"]


def spied_grams(model: nn.Module, batches: list, names: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Mean of xxᵀ into each module, from plain hooks; all tokens count."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in names.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat(x).double().t() @ torch.cat(x).double() / len(torch.cat(x)) for name, x in rows.items() if x
    }


def holders(model: nn.Module, plan) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    return {t.target.name: modules[t.target.module] for t in plan.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_statistics_equal_plain_hooks(kind):
    model = models.TRANSFORMERS[kind]()
    batches = tiny_batches(model, sizes=(4, 1, 2))
    plan = make_plan(model, PruningConfig(criterion="alps", calibration_order="one_pass"))
    found = collect_stats(model, plan, batches)
    expected = spied_grams(model, batches, holders(model, plan))
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        torch.testing.assert_close(found[name].input_gram, gram.float(), rtol=1e-4, atol=1e-6)
        assert found[name].input_gram.dtype == torch.float32
    norms = collect_stats(model, make_plan(model, PruningConfig(criterion="wanda")), batches)
    for name, gram in expected.items():
        torch.testing.assert_close(norms[name].input_norm, gram.diagonal().sqrt().float(), rtol=1e-4, atol=1e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sequential_statistics_are_those_of_the_pruned_prefix(kind, reuse):
    """Each target sees what a model gives in which exactly the targets before it have been pruned."""
    model = models.TRANSFORMERS[kind](num_layers=3) if kind == "t5" else models.TRANSFORMERS[kind]()
    batches = tiny_batches(model, sizes=(4, 2))
    plan = make_plan(model, PruningConfig(criterion="alps"))
    with InputReader(model, targets_of(plan), batches, reuse=reuse) as reader:
        for step in reader.order():
            found = reader.gather(step, INPUTS)
            clone = copy.deepcopy(model)
            honest = spied_grams(clone, batches, holders(clone, plan))
            for target in step:
                name = target.name
                torch.testing.assert_close(found[name]["input_gram"], honest[name].float(), rtol=1e-3, atol=1e-6)
            for target in step:
                with torch.no_grad():  # far from the dense weights, so that a stale input would show
                    model.get_parameter(target.name).mul_(-1.5)
            reader.finish(step)
        replayed = [sequence.replayed for sequence in reader.replay.sequences]
    if kind != "albert":
        assert (sum(replayed) > 0) == reuse
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not models.forward_hooks(model)


def test_the_order_is_that_of_the_calls():
    def steps(model):
        targets = targets_of(make_plan(model, PruningConfig(criterion="alps")))
        with InputReader(model, targets, tiny_batches(model)) as reader:
            return [[t.module.rsplit(".", 1)[-1] for t in step] for step in reader.order()]

    block = [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]
    assert steps(models.tiny_bert()) == [*block, *block, ["dense"], ["classifier"]]
    assert steps(models.tiny_gpt2()) == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]] * 2
    llama = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert steps(models.tiny_llama()) == llama * 2
    attention = [["q", "k", "v"], ["o"]]
    assert steps(models.tiny_t5()) == [*attention, ["wi"], ["wo"], *attention, ["q"], ["k", "v"], ["o"], ["wi"], ["wo"]]


def padded(batch: dict, extra: int, left: bool = False) -> dict:
    """The same sentences with more padding, of a token that means something."""
    width = batch["input_ids"].shape[1] + extra
    out = {}
    for name, fill in (("input_ids", 7), ("attention_mask", 0)):
        tensor = torch.full((len(batch[name]), width), fill)
        tensor[:, extra if left else 0 : width if left else width - extra] = batch[name]
        out[name] = tensor
    return out


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "albert"])
def test_padding_changes_nothing(kind):
    model = models.TRANSFORMERS[kind]()
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in tiny_batches(model, length=5)]
    plan = make_plan(model, PruningConfig(criterion="alps", target_modules=r".*\.(\d|albert_layers)\..*"))
    first = collect_stats(model, plan, batches)
    second = collect_stats(model, plan, [padded(batch, 4) for batch in batches])
    for name, stats in first.items():
        torch.testing.assert_close(second[name].input_gram, stats.input_gram, rtol=1e-3, atol=1e-5)


def test_padding_of_encoder_and_decoder():
    """Cross-attention keys come from the encoder and are padded like it, everything else in a decoder like itself."""
    model = models.tiny_t5()
    torch.manual_seed(1)
    ids, out = torch.randint(1, 40, (3, 6)), torch.randint(1, 40, (3, 4))
    plain = {"input_ids": ids, "decoder_input_ids": out}
    batch = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(out), **plain}
    wide = padded({"input_ids": ids, "attention_mask": batch["attention_mask"]}, 3)
    decoder = padded({"input_ids": out, "attention_mask": batch["decoder_attention_mask"]}, 5)
    wide |= {f"decoder_{name}": tensor for name, tensor in decoder.items()}  # both 9 long: shapes tell nothing
    plan = make_plan(model, PruningConfig(criterion="alps"))
    first, second = (collect_stats(model, plan, [b]) for b in (batch, wide))
    for name, stats in first.items():
        torch.testing.assert_close(second[name].input_gram, stats.input_gram, rtol=1e-3, atol=1e-5)


def test_conv1d_equals_the_transposed_linear():
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Module):
        def __init__(self, conv: bool) -> None:
            super().__init__()
            self.fc = Conv1D(6, 8) if conv else nn.Linear(8, 6)

        def forward(self, x):
            return self.fc(x)

    conv, linear = models.fill(Model(True)), models.fill(Model(False))
    with torch.no_grad():
        linear.fc.weight.copy_(conv.fc.weight.t())
    batches = [{"x": torch.randn(3, 5, 8)} for _ in range(4)]
    for criterion in ("wanda", "sparsegpt", "alps"):
        a, b = copy.deepcopy(conv), copy.deepcopy(linear)
        prune(a, 0.5, criterion=criterion, repair="least_squares", calibration=batches)
        prune(b, 0.5, criterion=criterion, repair="least_squares", calibration=batches)
        torch.testing.assert_close(a.fc.weight.t(), b.fc.weight)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 3, 3, stride=2, padding=1),
        nn.Conv2d(4, 3, (2, 3), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect"),
        nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1)),
    ],
)
def test_columns_of_a_convolution_times_its_matrix_are_its_outputs(conv):
    model = nn.Sequential(conv)
    (tensor,) = make_plan(model, PruningConfig(target_modules=["0"])).tensors
    x = torch.randn(2, conv.in_channels, *[7] * len(conv.kernel_size))
    columns = _columns(conv, x)  # (positions, kernel * in)
    expected = conv(x).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(columns @ tensor.target.matrix(conv.weight).t() + conv.bias, expected)


def test_convolutions_are_pruned_in_order():
    model = models.tiny_resnet()
    config = PruningConfig(0.5, "sparsegpt", target_modules=".*(convolution|classifier.1)")
    prune(model, config, calibration=tiny_batches(model))
    assert sum(int((~m).sum()) for m in MaskStore.of(model).masks.values()) == sum(
        t.remove for t in make_plan(models.tiny_resnet(), config).tensors
    )


def test_a_shared_module_sums_over_all_its_calls():
    model = models.tiny_albert()
    batches = tiny_batches(model)
    plan = make_plan(model, PruningConfig(criterion="alps"))
    calls = [0]
    handle = model.albert.encoder.albert_layer_groups[0].register_forward_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    model(**batches[0])
    handle.remove()
    assert calls == [3]
    name = next(t.target.name for t in plan.tensors if "query" in t.target.name)
    expected = spied_grams(model, batches, {name: model.get_submodule(name.removesuffix(".weight"))})
    torch.testing.assert_close(collect_stats(model, plan, batches)[name].input_gram, expected[name].float())


def test_tied_weights_sum_over_both_modules():
    model = models.tied_linears()
    batches = tiny_batches(model, sizes=(8, 8))
    plan = make_plan(model, PruningConfig(criterion="alps"))
    apart = spied_grams(model, batches, {"first": model.first, "second": model.second})
    found = collect_stats(model, plan, batches)["first.weight"].input_gram
    torch.testing.assert_close(found, ((apart["first"] + apart["second"]) / 2).float())
    prune(model, 0.5, criterion="sparsegpt", calibration=batches)
    assert model.first.weight is model.second.weight
    assert int((model.first.weight == 0).sum()) == 32


@pytest.mark.parametrize("settings", [{"criterion": "sparsegpt"}, {"criterion": "taylor", "repair": "least_squares"}])
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_an_exception_midway_leaves_the_model_bit_for_bit(settings, error, monkeypatch):
    model = prune(unusual(models.tiny_bert()), 0.1)
    before, was, store = snapshot(model), state(model), MaskStore.of(model)
    gather, calls = InputReader.gather, [0]

    def stop(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 6:
            assert not all(same_bits(p, before[n]) for n, p in model.named_parameters())  # in the middle of it
            raise error
        return gather(*args, **kwargs)

    monkeypatch.setattr(InputReader, "gather", stop)
    with pytest.raises(error):
        prune(model, 0.5, **settings, calibration=tiny_batches(model))
    assert calls == [6]
    assert_unchanged(model, before)
    assert state(model) == was
    assert_same_masks(model, store)
    assert not models.forward_hooks(model)


@pytest.mark.parametrize("in_memory", [True, False])
def test_undo_gives_weights_back_bit_for_bit(in_memory):
    model = unusual(models.tiny_bert())
    before, was = snapshot(model), state(model)
    plan = make_plan(model, PruningConfig(criterion="alps"))

    def interrupted() -> None:
        with Transaction(model, keep_dense=in_memory) as change:
            run = CalibrationRun(model, plan, MemoryBudget.split(CACHE_BYTES, plan.config), tiny_batches(model))
            masks, weights = prune_sequentially(run, change)
            assert masks.keys() == {t.target.name for t in plan.tensors}
            assert not weights
            assert (change.backup.dense.keys() == masks.keys()) == in_memory
            assert not any(same_bits(model.get_parameter(name), before[name]) for name in masks)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert_unchanged(model, before)
    assert state(model) == was


def test_sequential_differs_from_one_pass_after_the_first_layer():
    masks = []
    for order in ("sequential", "one_pass"):
        model = models.tiny_llama()
        prune(model, 0.7, criterion="wanda", calibration_order=order, calibration=tiny_batches(model))
        masks.append(MaskStore.of(model).masks)
    same = {name: torch.equal(mask, masks[1][name]) for name, mask in masks[0].items()}
    assert all(equal for name, equal in same.items() if "layers.0.self_attn.q_proj" in name)
    assert not all(same.values())


@pytest.mark.parametrize("order", ["sequential", "one_pass"])
def test_experts_that_see_few_tokens_are_named(order):
    model = models.tiny_moe()
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if "expert_" in name and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, seen.get(name, 0) + args[0].shape[:-1].numel())
            )
    batches = tiny_batches(model, sizes=(4, 3, 3))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    few = {name for name, tokens in seen.items() if tokens < model.get_submodule(name).in_features}
    assert 0 < len(few) < len(seen)
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="fewer calibration tokens than they have inputs") as caught:
        prune(model, 0.5, criterion="alps", calibration=batches, calibration_order=order)
    (text,) = [str(w.message) for w in caught]
    first = next(name for name in seen if name in few)
    if order == "one_pass":  # on the pruned prefix, tokens take other ways
        assert text.startswith(f"{len(few)} of 44 targets")
        inputs = dense.get_submodule(first).in_features
        assert f"than they have inputs ({first}.weight: {seen[first]} for {inputs} inputs; " in text
    assert text.count(" inputs; ") == 3
    assert "exclude_modules" in text
    for name in few:
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert weight.norm() < 1.5 * dense.get_submodule(name).weight.norm()


def test_few_tokens_for_all_are_the_callers_choice(recwarn):
    model = models.tiny_moe(num_experts=1)
    prune(model, 0.5, criterion="wanda", calibration=tiny_batches(model, sizes=(2,), length=4))
    assert [str(w.message) for w in recwarn] == []


class Unreached(models.MLP):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "alps"])
def test_targets_that_no_batch_reaches_go_by_magnitude_with_a_warning(criterion):
    model = models.fill(Unreached())
    dense = model.idle.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"reached 1 of 3 targets \(idle.weight\): they are pruned as if all their"):
        prune(model, 0.5, criterion=criterion, calibration=tiny_batches(models.mlp()))
    kept = model.idle.weight != 0
    assert dense[kept].abs().min() > 0.98 * dense[~kept].abs().max()  # ALPS sees a difference below that as a tie
    torch.testing.assert_close(model.idle.weight[kept], dense[kept])


@pytest.mark.parametrize("settings", [{"criterion": "sparsegpt"}, {"repair": "least_squares"}])
@pytest.mark.parametrize("order", ["sequential", "one_pass"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"needs calibration data, and got none: pass calibration=, .* with the model's inputs\)$"),
        ([], r"calibration has no batches: expected at least one"),
        ([torch.ones(2, 8)], r"a calibration batch is a Tensor: expected a dict"),
        ([{"x": torch.full((2, 8), float("nan"))}], r"the inputs of fc1.weight are not finite: expected finite values"),
    ],
)
def test_unusable_batches_are_refused(settings, order, batches, message):
    model = unusual(models.mlp())
    before, was = snapshot(model), state(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, calibration=batches, calibration_order=order, **settings)
    assert_unchanged(model, before)
    assert state(model) == was


def test_a_generator_that_fails_changes_nothing():
    model = models.mlp()
    before = snapshot(model)
    with pytest.raises(Interrupted):
        prune(model, 0.5, criterion="alps", calibration=failing(tiny_batches(model)))
    assert_unchanged(model, before)
    prune(model, 0.5, criterion="alps", calibration=(b for b in tiny_batches(model)))  # a generator serves


def test_text_batches():
    tokenizer = models.tiny_tokenizer()
    batches = text_batches(["w1 w2 w3", "w4", "w5 w6"], tokenizer, batch_size=2, max_length=4)
    assert [b["input_ids"].tolist() for b in batches] == [
        [[2, 8, 3, 0], [2, 9, 10, 3]],
        [[2, 5, 6, 3]],
    ]  # shortest first
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    model = models.tiny_bert()
    prune(model, 0.5, criterion="sparsegpt", calibration=batches)
    assert MaskStore.of(model)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ("one text", {}, DataError, r"texts is 'one text': expected a list"),
        ([], {}, DataError, r"texts is \[\]: expected a list of texts, at least one"),
        (["", " \n"], {}, DataError, "all 2 texts are blank: expected at least one with words"),
        (["a", 3], {}, DataError, r"text 1 is 3: expected a string"),
        (["a"], {"batch_size": 0}, ConfigError, r"batch_size is 0: expected an integer of at least 1"),
        (["a"], {"max_length": True}, ConfigError, r"max_length is True"),
    ],
)
def test_texts_that_are_none(texts, settings, error, message):
    with pytest.raises(error, match=message):
        text_batches(texts, models.tiny_tokenizer(), **settings)


def test_blank_texts_are_left_out():
    tokenizer = models.tiny_tokenizer()
    (batch,) = text_batches(["", "w1 w2", " \n", "w4"], tokenizer)
    assert torch.equal(batch["input_ids"], text_batches(["w1 w2", "w4"], tokenizer)[0]["input_ids"])
    columns = {"text": ["w1 w2", " ", "w4"], "label": [0, 0, 1]}
    (batch,) = read_calibration(models.tiny_classifier(), columns, tokenizer, labels=True)
    assert (batch["input_ids"].shape[0], batch["labels"].tolist()) == (2, [1, 0])  # each keeps its label


def test_text_batches_need_a_padding_token():
    tokenizer = models.tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="the tokenizer has no padding token: set one"):
        text_batches(["w1"], tokenizer)


def test_a_target_does_not_cost_a_walk_through_the_model(monkeypatch):
    """Thousands of layers would cost its square."""
    model, batches = models.tiny_bert(), [{"input_ids": torch.arange(12).view(2, 6)}]
    compute, walks = scoring.compute_masks, []

    def guarded(model, *arguments, **more):
        with monkeypatch.context() as patch:
            for walk in ("named_parameters", "named_modules", "modules", "parameters"):
                patch.setattr(model, walk, lambda *_, walk=walk: walks.append(walk))
            return compute(model, *arguments, **more)

    monkeypatch.setattr(scoring, "compute_masks", guarded)
    prune(model, 0.5, criterion="wanda", repair="least_squares", calibration=batches)
    assert len(MaskStore.of(model).masks) > 2
    assert not walks
