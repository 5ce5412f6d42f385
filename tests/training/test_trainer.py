"""Pruning while training: masks hold after every step, and a training can be interrupted anywhere."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_prune import (
    CheckpointError,
    ConfigError,
    Distillation,
    MaskError,
    MaskStore,
    PruningCallback,
    PruningConfig,
    PruningTrainer,
    Schedule,
    prune,
)
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks
from hf_prune.training.dropout import without_dropout
from hf_prune.training.state import STATE_FILE, save_training
from tests import models

STEPS = 12
CALIBRATION = [{"input_ids": torch.arange(4, 28).view(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}]


class Sentences(torch.utils.data.Dataset):
    """Random tokens; the label is whether the first one is even."""

    def __init__(self, n=96, length=6, causal=False):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(4, models.VOCAB, (n, length), generator=generator)
        self.causal = causal

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i]
        labels = ids if self.causal else ids[0] % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def arguments(folder, **settings):
    plain = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**plain, **settings})


def config(**settings):
    schedule = Schedule("cubic", begin=2, end=8, every=2)
    return PruningConfig(
        **{
            "sparsity": 0.75,
            "criterion": "magnitude",
            "target_modules": ("query", "dense"),
            "schedule": schedule,
            **settings,
        }
    )


def trainer(folder, model=None, pruning=None, training=None, **settings):
    return PruningTrainer(
        model=models.tiny_bert() if model is None else model,
        args=arguments(folder, **(training or {})),
        train_dataset=settings.pop("train_dataset", Sentences()),
        pruning_config=config() if pruning is None else pruning,
        **settings,
    )


def counts(model):
    store = MaskStore.of(model)
    gone = sum(int((~mask).sum()) for mask in store.masks.values())
    return gone, sum(mask.numel() for mask in store.masks.values())


class Watch(TrainerCallback):
    """Notes after each step what is zero."""

    def __init__(self):
        self.sparsities, self.masks = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        store = MaskStore.of(model)
        self.masks.append({} if store is None else {name: mask.clone() for name, mask in store.masks.items()})
        if store is None:
            self.sparsities.append(0.0)
            return
        for name, mask in store.masks.items():
            assert not model.get_parameter(name).detach()[~mask].any()
        gone, size = counts(model)
        self.sparsities.append(gone / size)


class SaveAt(TrainerCallback):
    """Writes a checkpoint after some steps, and none at the end."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


# --- schedules are kept, masks hold ----------------------------------------------------------------------


def test_sparsity_follows_the_schedule_and_is_logged(tmp_path):
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch])
    run.train()
    schedule = config().schedule
    expected = [schedule.sparsity(step, STEPS, 0.75) if step >= 4 else 0.0 for step in range(1, STEPS + 1)]
    for i in range(1, STEPS, 2):  # nothing happens between updates
        expected[i - 1] = expected[i - 2] if i > 1 else 0.0
    expected[8:] = [0.75] * 4
    assert watch.sparsities == pytest.approx(expected, abs=1e-3)
    logged = [entry["sparsity"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(watch.sparsities)
    assert counts(run.model)[0] == round(0.75 * counts(run.model)[1])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_gradients_of_removed_weights_do_not_count(tmp_path, optimizer):
    """Neither for clipping nor for the moments of Adam."""
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, mask in MaskStore.of(model).masks.items():
                assert not model.get_parameter(name).grad[~mask].any()
            kept = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.cat(kept).norm()))

    model = prune(models.tiny_bert(), 0.5)
    run = trainer(tmp_path, model, training={"max_grad_norm": 1e-3, "optim": optimizer}, callbacks=[Look()])
    run.pruning.config = None  # the masks that there are stay
    run.train()
    assert seen == pytest.approx([1e-3] * STEPS, rel=1e-3)
    if optimizer == "adamw_torch":
        for name, mask in MaskStore.of(model).masks.items():
            state = run.optimizer.state[model.get_parameter(name)]
            assert not state["exp_avg"][~mask].any()
            assert not state["exp_avg_sq"][~mask].any()
            assert state["exp_avg"][mask].any()


def test_masks_of_before_are_kept_without_a_config(tmp_path):
    model = prune(models.tiny_bert(), 0.5)
    before = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    run = PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    run.train()
    assert all(torch.equal(before[name], mask) for name, mask in MaskStore.of(model).masks.items())
    assert all(not model.get_parameter(name).detach()[~mask].any() for name, mask in before.items())


@pytest.mark.parametrize(
    ("settings", "finally_gone"),
    [
        ({"granularity": "2:4"}, 0.5),
        ({"granularity": "block:2x4"}, 0.75),
        ({"granularity": "row", "sparsity": 0.5}, 0.5),
        ({"criterion": "taylor"}, 0.75),
        ({"criterion": "taylor", "granularity": "2:4"}, 0.5),
        ({"criterion": "movement"}, 0.75),
        ({"criterion": "movement", "scope": "global"}, 0.75),
        ({"criterion": "movement", "granularity": "2:4"}, 0.5),
        ({"criterion": "movement", "granularity": "block:2x4"}, 0.75),
        ({"criterion": "soft_movement"}, 0.75),
        ({"criterion": "random"}, 0.75),
        ({"schedule": "one_shot"}, 0.75),
        ({"schedule": Schedule("iterative", every=3)}, 0.75),
        ({"schedule": Schedule("linear", end=9)}, 0.75),
        ({"schedule": Schedule("rigl", every=2, end=10)}, 0.75),
        ({"schedule": None}, 0.75),
    ],
)
def test_every_criterion_and_granularity(tmp_path, settings, finally_gone):
    if settings.get("granularity") == "2:4":
        settings = {"sparsity": None, **settings}
    watch = Watch()
    run = trainer(tmp_path, pruning=config(**settings), callbacks=[watch])
    run.train()
    gone, size = counts(run.model)
    assert gone == round(finally_gone * size)
    assert watch.sparsities[-1] == pytest.approx(finally_gone, abs=1e-3)
    if settings.get("granularity") == "2:4":
        for mask in MaskStore.of(run.model).masks.values():
            assert set(mask.reshape(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
def test_heads_and_neurons_while_training(tmp_path, criterion):
    pruning = PruningConfig(0.5, criterion, ("head", "neuron"), schedule=Schedule("linear", begin=2, end=8, every=2))
    run = trainer(tmp_path, pruning=pruning)
    run.train()
    model = run.model
    before = model.num_parameters()
    inputs = models.tiny_batches(model)[0]
    with torch.no_grad():
        masked = model.eval()(**inputs).logits
        model.shrink()
        torch.testing.assert_close(model(**inputs).logits, masked, rtol=0, atol=1e-5)
    assert model.num_parameters() < before


def test_calibrated_criteria_prune_while_training(tmp_path):
    model = models.tiny_bert()
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in models.tiny_batches(model)]
    pruning = config(criterion="sparsegpt", schedule=Schedule("one_shot", begin=3))
    run = trainer(tmp_path, model, pruning, calibration=batches)
    run.train()
    gone, size = counts(model)
    assert gone == round(0.75 * size)


# --- what each criterion learns ------------------------------------------------------------------------------


def test_movement_is_the_sum_of_weight_times_gradient_of_the_dense_weight(tmp_path):
    """Straight-through: the value of a removed weight counts, though the model computes with zero."""
    pruning = config(criterion="movement", schedule=Schedule("linear", begin=2, end=6, every=2))
    run = trainer(tmp_path, pruning=pruning, training={"max_steps": 6, "max_grad_norm": 0.0})
    expected, values = {}, {}

    class Twin(TrainerCallback):
        """The same by hand, from the gradients before they are cleared."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            pruner = run.pruning.pruner
            original = pruner.after_backward

            def after(step, scale=1.0):
                for name in pruner.targets:
                    parameter = model.get_parameter(name)
                    value = values.get(name, parameter.detach().clone())
                    expected[name] = expected.get(name, 0) - value * parameter.grad
                original(step, scale)

            pruner.after_backward = after

        def on_step_end(self, args, state, control, model=None, **kwargs):
            store = MaskStore.of(model)
            for name in run.pruning.pruner.targets:
                now = model.get_parameter(name).detach()
                latent = run.pruning.pruner.learned.latent.get(name)
                values[name] = now.clone() if latent is None else now + latent
                if store is not None:
                    assert not latent[store.masks[name]].any()

    run.add_callback(Twin())
    run.train()
    for name, score in run.pruning.pruner.learned.scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-8)
    store = MaskStore.of(run.model)
    for name, mask in store.masks.items():
        assert expected[name][mask].min() >= expected[name][~mask].max()  # by the scores of the last update


def test_movement_lets_weights_come_back_with_their_values(tmp_path):
    watch = Watch()
    pruning = config(criterion="movement", schedule=Schedule("linear", begin=1, end=11, every=1))
    run = trainer(tmp_path, pruning=pruning, callbacks=[watch], training={"learning_rate": 5e-2})
    run.train()
    back = sum(
        int((~before[name] & after[name]).sum())
        for before, after in zip(watch.masks, watch.masks[1:], strict=False)
        for name in before
    )
    assert back > 0


def test_taylor_is_a_running_average(tmp_path):
    run = trainer(tmp_path, pruning=config(criterion="taylor"), training={"max_steps": 8})
    by_hand = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            original = run.pruning.pruner.after_backward

            def after(step, scale=1.0):
                for name in run.pruning.pruner.targets:
                    gradient = model.get_parameter(name).grad.abs()
                    by_hand[name] = 0.9 * by_hand.get(name, torch.zeros_like(gradient)) + 0.1 * gradient
                original(step, scale)

            run.pruning.pruner.after_backward = after

    run.add_callback(Look())
    run.train()
    for name, score in run.pruning.pruner.learned.scores.items():
        torch.testing.assert_close(score, by_hand[name])


def test_rigl_exchanges_the_smallest_for_those_with_the_largest_gradients(tmp_path):
    pruning = config(schedule=Schedule("rigl", begin=0, end=8, every=4))
    watch = Watch()
    gradients = {}
    run = trainer(tmp_path, pruning=pruning, callbacks=[watch])

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            original = run.pruning.pruner.after_backward

            def after(step, scale=1.0):
                if step == 4:
                    gradients.update({n: model.get_parameter(n).grad.clone() for n in run.pruning.pruner.targets})
                original(step, scale)

            run.pruning.pruner.after_backward = after

    run.add_callback(Look())
    run.train()
    assert len(set(watch.sparsities)) == 1
    changed = 0
    for name, old in watch.masks[2].items():
        new = watch.masks[3][name]
        come, gone = new & ~old, old & ~new
        share = Schedule("rigl", begin=0, end=8, every=4).exchange(4, STEPS)
        assert int(come.sum()) == int(gone.sum()) == int(share * old.sum())
        size = gradients[name].abs()
        assert size[come].min() >= size[~old & ~new].max()
        changed += int(come.sum())
    assert changed > 0
    assert all(torch.equal(watch.masks[8][n], watch.masks[-1][n]) for n in watch.masks[-1])


# --- going on from a checkpoint ------------------------------------------------------------------------------

VARIANTS = {
    "plain": ({}, {}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, {}),
    "bf16": ({}, {"bf16": True}, {}),
    "checkpointing": ({}, {"activation_checkpointing": True}, {}),
    "distillation": ({}, {}, {"distillation": Distillation(hidden=0.5)}),
    "movement": ({"criterion": "movement"}, {}, {}),
    "soft_movement": ({"criterion": "soft_movement"}, {}, {}),
    "taylor": ({"criterion": "taylor"}, {}, {}),
    "rigl": ({"schedule": Schedule("rigl", end=10, every=2)}, {}, {}),
    "heads": ({"granularity": ("head", "neuron"), "target_modules": "all-linear"}, {}, {}),
    "calibrated": ({"criterion": "sparsegpt"}, {}, {"calibration": CALIBRATION}),
    "best": ({}, {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}, {}),
}


def facts(run):
    """All that a training leaves behind."""
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    masks = {f"mask {name}": mask.clone() for name, mask in MaskStore.of(run.model).masks.items()}
    moments = {
        f"{i} {key}": value for i, state in run.optimizer.state_dict()["state"].items() for key, value in state.items()
    }
    keys = ("loss", "grad_norm", "learning_rate", "sparsity", "eval_loss", "step")
    logs = [
        {k: v for k, v in entry.items() if k in keys} for entry in run.state.log_history if "train_loss" not in entry
    ]
    return {**weights, **masks, **{k: torch.as_tensor(v) for k, v in moments.items()}}, logs


def make(folder, variant, *saved):
    """A training that writes a checkpoint after each step of ``saved``."""
    pruning, training, more = VARIANTS[variant]
    if variant == "distillation":
        more = {**more, "teacher": models.tiny_bert(seed=9)}
    if variant == "best":
        training = {**training, "save_strategy": "steps", "save_steps": 4}
        more = {"eval_dataset": Sentences(16)}
    elif saved:
        more = {**more, "callbacks": [SaveAt(*saved)]}
    return trainer(folder, pruning=config(**pruning), training=training, **more)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A plain training with checkpoints from before the schedule, in its middle and after its end."""
    with torch.random.fork_rng(devices=[]):
        run = make(tmp_path_factory.mktemp("begun"), "plain", 1, 5, 10, 11)
        run.train()
    return run


@pytest.fixture
def copied(begun, tmp_path):
    """A folder of one's own with the checkpoints of the plain training."""
    return shutil.copytree(begun.args.output_dir, tmp_path / "begun")


def assert_same_end(whole, again):
    tensors, logs = facts(whole)
    found, found_logs = facts(again)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert models.same_bits(found[name], tensor), name
    assert found_logs == logs


@pytest.mark.parametrize("step", [1, 5, 10])
def test_resumed_at_any_step_is_uninterrupted_bit_for_bit(begun, tmp_path, step):
    again = make(tmp_path, "plain")
    again.train(resume_from_checkpoint=f"{begun.args.output_dir}/checkpoint-{step}")
    assert_same_end(begun, again)
    assert (Path(begun.args.output_dir) / f"checkpoint-{step}" / STATE_FILE).exists()


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"plain"}))
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, variant):
    name = "checkpoint-4" if variant == "best" else "checkpoint-5"
    whole = make(tmp_path / "whole", variant, 5)
    whole.train()
    again = make(tmp_path / "again", variant)
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "again" / name)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / name))
    assert_same_end(whole, again)
    if variant == "best":  # one that is pruned to the end
        assert int(again.state.best_model_checkpoint.rpartition("-")[2]) >= 8
        gone, size = counts(again.model)
        assert gone == round(0.75 * size)
        assert sum(int((p == 0).sum()) for p in again.model.parameters()) >= gone


def test_without_restoring_masks_momentum_undoes_them(begun, tmp_path, monkeypatch):
    """Late in training one step of Adam alone fills every zero: what restoring the masks is for."""
    sparse = counts(begun.model)[0]
    again = make(tmp_path, "plain")
    monkeypatch.setattr(PruningCallback, "_restore", lambda self, folder: None)
    again.train(resume_from_checkpoint=f"{begun.args.output_dir}/checkpoint-11")  # the schedule has ended by then
    zeros = sum(int((p == 0).sum()) for p in again.model.parameters())
    assert zeros < sparse / 2


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / STATE_FILE).unlink(), f"has no {STATE_FILE}"),
        (lambda f: (f / MASK_FILE).unlink(), f"lacks {MASK_FILE}"),
        (lambda f: shutil.copy(f.parent / "checkpoint-5" / MASK_FILE, f / MASK_FILE), f"{MASK_FILE} is not the file"),
        (
            lambda f: shutil.copy(f.parent / "checkpoint-5" / "model.safetensors", f),
            "model.safetensors is not the file",
        ),
        (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "optimizer.pt is not the file"),
        (lambda f: (f / STATE_FILE).write_bytes(b"no"), "is damaged"),
        (lambda f: shutil.copy(f.parent / "checkpoint-5" / STATE_FILE, f / STATE_FILE), "is not the file"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(copied, tmp_path, damage, match):
    damage(copied / "checkpoint-10")
    again = make(tmp_path / "again", "plain")
    with pytest.raises((CheckpointError, RuntimeError), match=match):
        again.train(resume_from_checkpoint=str(copied / "checkpoint-10"))


def test_other_settings_are_refused_when_going_on(begun, tmp_path):
    again = trainer(tmp_path, pruning=config(sparsity=0.5))
    with pytest.raises(CheckpointError, match=r"pruning_config: sparsity was 0\.75, now 0\.5"):
        again.train(resume_from_checkpoint=f"{begun.args.output_dir}/checkpoint-10")


class Noisy(Sentences):
    """Other tokens each time."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "input_ids": sample["input_ids"] + torch.randint(0, 2, (1,))}


def test_another_training_is_not_gone_on_with(copied):
    """Whatever changes the result is compared before anything is loaded, and may differ only if one says so."""

    def going_on(model=None, **settings):
        return trainer(copied, model, **settings)

    begun = str(copied / "checkpoint-10")
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    reached = BertForSequenceClassification.from_pretrained(begun)
    for settings, match in (
        ({"training": {"learning_rate": 1e-3}}, r"arguments: learning_rate was 0\.01, now 0\.001"),
        ({"training": {"seed": 7}}, "arguments: seed was 3, now 7"),
        ({"training": {"weight_decay": 0.3}}, "weight_decay was 0.0, now 0.3"),
        ({"training": {"lr_scheduler_type": "constant"}}, "lr_scheduler_type was 'linear', now 'constant'"),
        ({"training": {"optim": "sgd"}}, "optim was"),
        ({"training": {"per_device_train_batch_size": 2}}, "per_device_train_batch_size was 4, now 2"),
        ({"training": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps was 1, now 2"),
        ({"train_dataset": Sentences(length=7)}, "data: samples was"),
        ({"train_dataset": Sentences(90)}, "data: length was 96, now 90"),
        ({"train_dataset": Noisy()}, "data: samples was '[0-9a-f]*', now None"),
        ({"model": models.tiny_bert(seed=4)}, "weights was"),
        (
            {"model": models.tiny_bert(hidden_dropout_prob=0.5)},
            r"config: hidden_dropout_prob was 0\.\d+, now 0\.5",
        ),
        ({"teacher": models.tiny_bert(seed=4)}, "teacher was None"),
        ({"processing_class": models.tiny_tokenizer()}, "tokenizer was None"),
    ):
        again = going_on(**settings)
        weights = [parameter.clone() for parameter in again.model.parameters()]
        with pytest.raises(CheckpointError, match=match):
            again.train(resume_from_checkpoint=begun)
        assert all(map(torch.equal, again.model.parameters(), weights))
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == files
    shutil.rmtree(copied / "checkpoint-11")
    going_on(reached, callbacks=[SaveAt(11)]).train(resume_from_checkpoint=begun)  # weights of the checkpoint
    again = going_on()  # and it still says how the training began
    again.train(resume_from_checkpoint=str(copied / "checkpoint-11"))
    again.train(resume_from_checkpoint=str(copied / "checkpoint-11"))  # a model that was trained in the meantime
    going_on(training={"seed": 7, "logging_steps": 2}, allow_changes=True).train(resume_from_checkpoint=begun)


def test_the_callback_alone_refuses_another_training(tmp_path):
    def make_it(**settings):
        callbacks = [PruningCallback(config()), SaveAt(8)]
        return Trainer(
            models.tiny_bert(), arguments(tmp_path, **settings), train_dataset=Sentences(), callbacks=callbacks
        )

    make_it().train()
    with pytest.raises(CheckpointError, match=r"weight_decay was 0\.0, now 0\.1"):
        make_it(weight_decay=0.1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    make_it().train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_that_does_not_say_its_training_is_gone_on_with_and_warned_of(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            "hf_prune.training.callback.save_training",
            lambda folder, store, state, facts: save_training(
                folder, store, state, {k: v for k, v in facts.items() if k not in ("run", "weights_now")}
            ),
        )
        make(tmp_path, "plain", 10).train()
    with pytest.warns(UserWarning, match="does not say what it was trained with"):
        make(tmp_path, "plain").train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path, monkeypatch):
    """An interruption before that leaves the old one, and the new one is refused."""
    limited = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    run = trainer(tmp_path, training=limited)
    save = PruningCallback.save

    def interrupted(self, folder, writes):
        if folder.name == "checkpoint-8":
            raise KeyboardInterrupt
        save(self, folder, writes)

    monkeypatch.setattr(PruningCallback, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    monkeypatch.undo()
    again = trainer(tmp_path, training=limited)
    with pytest.raises(CheckpointError, match="saving was interrupted"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [p.name for p in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]


def test_what_a_longer_run_left_behind_does_not_push_out_the_newest_checkpoint(tmp_path, monkeypatch):
    """Where times of files do not tell which one is new, as after a copy or within a second."""
    (tmp_path / "checkpoint-99").mkdir()
    monkeypatch.setattr(os.path, "getmtime", lambda path: 0.0)
    trainer(tmp_path, training={"save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}).train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-99", f"checkpoint-{STEPS}"}


def test_saved_models_load_with_plain_transformers(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "out"))
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    masks = MaskStore.of(run.model).masks
    assert all(not dense.get_parameter(name).detach()[~mask].any() for name, mask in masks.items())
    assert (tmp_path / "out" / MASK_FILE).exists()


# --- shrinking on the way ---------------------------------------------------------------------------------------

UNITS = {"granularity": ("head", "neuron"), "target_modules": "all-linear", "sparsity": 0.5}


@pytest.mark.parametrize("uniform", [True, False])
def test_shrinking_on_the_way_changes_nothing_but_sizes(tmp_path, uniform):
    """The same steps, with the zeros in or out, also where the config can tell the sizes and where it cannot."""
    pruning = config(**UNITS, scope="layer" if uniform else "global")
    runs = {}
    for at in (None, 9):
        run = trainer(tmp_path / str(at), still(), pruning, shrink_at=at)
        run.train()
        runs[at] = run
    batch = models.tiny_batches(runs[9].model)[0]
    with torch.no_grad():
        whole, small = (runs[at].model.eval()(**batch).logits for at in (None, 9))
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5)
    assert runs[9].model.num_parameters() < runs[None].model.num_parameters()
    held = {id(p) for group in runs[9].optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in runs[9].model.parameters()}
    for parameter in runs[9].model.parameters():
        assert runs[9].optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    logged = [[e["sparsity"] for e in run.state.log_history if "loss" in e] for run in runs.values()]
    assert logged[0] == logged[1]
    runs[None].model.shrink()
    assert runs[None].model.num_parameters() == runs[9].model.num_parameters()


@pytest.mark.parametrize(("criterion", "steps"), [("magnitude", (11,)), ("movement", (7, 9))])
def test_resuming_around_shrinking(tmp_path, criterion, steps):
    def make_it(folder, *saved):
        pruning = config(**UNITS, scope="global", criterion=criterion)
        return trainer(folder, pruning=pruning, shrink_at=9, callbacks=[SaveAt(*saved)])

    whole = make_it(tmp_path / "whole", *steps)
    whole.train()
    for step in steps:
        again = make_it(tmp_path / str(step))
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in whole.model.state_dict().items():
            assert models.same_bits(again.model.state_dict()[name], value), (step, name)
        assert again.state.log_history[-2] == whole.state.log_history[-2]


def test_shrinking_too_early_or_in_company_is_refused(tmp_path, monkeypatch):
    for at, match in ((5, "expected one from 8"), (99, "to 12"), (0.1, "is step 1")):
        with pytest.raises(ConfigError, match=match):
            trainer(tmp_path, pruning=config(**UNITS), shrink_at=at).train()
    monkeypatch.setattr("hf_prune.training.callback.rank_and_world_size", lambda: (0, 2))
    with pytest.raises(ConfigError, match="with several processes"):
        trainer(tmp_path, pruning=config(**UNITS), shrink_at=9).train()


# --- any Trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "taylor"])
def test_the_callback_alone_does_the_same(tmp_path, criterion):
    pruning = config(criterion=criterion)
    ours = trainer(tmp_path / "a", pruning=pruning)
    ours.train()
    for saved, begin in ((6, None), (0, str(tmp_path / "b" / "checkpoint-6"))):
        plain = Trainer(
            model=models.tiny_bert(),
            args=arguments(tmp_path / "b"),
            train_dataset=Sentences(),
            callbacks=[PruningCallback(pruning), SaveAt(saved)],
        )
        plain.train(resume_from_checkpoint=begin)
        assert_same_end(ours, plain)


# --- distillation ---------------------------------------------------------------------------------------------


def still(seed=0):
    """Without dropout, which would draw other numbers."""
    return models.tiny_bert(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_accumulation_changes_nothing(tmp_path):
    """Classification averages over examples, language models over all tokens of the step."""
    for name, model, causal in (("bert", still, False), ("llama", models.tiny_llama, True)):
        found = []
        for size, accumulation in ((8, 1), (2, 4)):
            student = model()
            run = trainer(
                tmp_path / name / str(size),
                student,
                pruning=PruningConfig(0.5),
                teacher=model(seed=4),
                train_dataset=Sentences(causal=causal),
                training={
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": accumulation,
                    "max_steps": 1,
                    "max_grad_norm": 0.0,
                    "optim": "sgd",
                    "learning_rate": 1.0,
                },
            )
            student.config.use_cache = False
            run.train()
            found.append({n: p.detach().clone() for n, p in student.named_parameters()})
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_teacher_teaches(tmp_path):
    """Labels say nothing here, and the student comes close to its teacher all the same."""
    teacher = still(seed=9)
    run = trainer(
        tmp_path,
        still(),
        config(sparsity=0.5),
        teacher=teacher,
        distillation=Distillation(task=0.0),
        training={"max_steps": 40, "learning_rate": 3e-2},
    )
    batch = models.tiny_batches(teacher)[0]

    def distance():
        with torch.no_grad():
            own, goal = run.model.eval()(**batch).logits, teacher(**batch).logits
            return float((own.log_softmax(-1) - goal.log_softmax(-1)).abs().mean())

    before = distance()
    run.train()
    assert distance() < before / 20
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in run.model.named_parameters())


@pytest.mark.parametrize("keep", [False, True])
def test_a_student_of_a_teacher_has_no_dropout_unless_it_is_asked_for(tmp_path, keep):
    """Its steps are those of a model that has none."""
    found = []
    for rate in (0.4, 0.0):
        student = models.tiny_bert(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        run = trainer(tmp_path / str(rate), student, teacher=still(seed=9), distillation=Distillation(dropout=keep))
        run.train()
        found.append({name: p.detach().clone() for name, p in student.named_parameters()})
        probabilities = {module.p for module in student.modules() if isinstance(module, nn.Dropout)}
        assert probabilities == {rate}
        assert student.config.hidden_dropout_prob == rate
    assert all(models.same_bits(found[0][name], found[1][name]) for name in found[0]) != keep


def test_each_of_several_trainings_is_without_dropout(tmp_path):
    """As in a search for hyperparameters, where every trial has a new model."""
    seen = []
    built = []

    def new():
        built.append(models.tiny_bert(hidden_dropout_prob=0.4))
        drop = next(module for module in built[-1].modules() if isinstance(module, nn.Dropout) and module.p == 0.4)
        drop.register_forward_hook(lambda module, *_: seen.append((len(built), module.p)) if module.training else None)
        return built[-1]

    run = PruningTrainer(
        model_init=new,
        args=arguments(tmp_path),
        train_dataset=Sentences(),
        pruning_config=config(),
        teacher=still(seed=9),
    )
    run.train()
    run.train()
    assert {p for _, p in seen} == {0.0}
    assert len({number for number, _ in seen}) == 2


def drop_rates(model):
    """Every probability of dropout, by the names of these models."""
    names = ("p", "dropout", "attention_dropout", "activation_dropout", "attention_probs_dropout_prob", "resid_pdrop")
    owners = [*model.modules(), model.config]
    return [(vars(owner), name) for owner in owners for name in names if isinstance(vars(owner).get(name), float)]


@pytest.mark.parametrize("build", [models.tiny_bart, models.tiny_llama, models.tiny_vit, models.tiny_gpt2])
def test_without_dropout_a_model_in_training_returns_what_it_returns_in_evaluation(build):
    model = build()
    rates = drop_rates(model)
    assert rates
    for values, name in rates:
        values[name] = 0.5
    batch = models.tiny_batches(model)[0]
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert not torch.equal(model.train()(**batch).logits, expected)
        with without_dropout(model):
            torch.testing.assert_close(model(**batch).logits, expected)
    assert {values[name] for values, name in rates} == {0.5}


def test_dropout_is_back_after_a_step_that_failed():
    model = models.tiny_bert(hidden_dropout_prob=0.3)

    def step():
        with without_dropout(model):
            assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} >= {0.3}


def test_a_shrunk_student_learns_by_a_map_of_layers(tmp_path):
    teacher = models.tiny_bert(num_hidden_layers=3)
    student = copy.deepcopy(teacher)
    prune(student, granularity=("head", "neuron"), sparsity=0.5, scope="global")
    run = trainer(
        tmp_path,
        student,
        pruning=config(sparsity=0.3),
        teacher=teacher,
        distillation=Distillation(layers={1: 2, -1: -1}),
    )
    run.model.shrink()
    run.train()
    assert run.state.global_step == STEPS


def test_distillation_by_hand():
    own = {"logits": torch.tensor([[1.0, 0.0]]), "hidden_states": (torch.tensor([[[1.0, 1.0]]]),)}
    goal = {"logits": torch.tensor([[0.0, 0.0]]), "hidden_states": (torch.tensor([[[2.0, 0.0]]]),)}

    class Outputs(dict):
        __getattr__ = dict.get

    student, teacher = Outputs(own), Outputs(goal)
    soft = 4 * nn.functional.kl_div(
        (own["logits"] / 2).log_softmax(-1), (goal["logits"] / 2).softmax(-1), reduction="batchmean"
    )
    found = Distillation(task=0, logits=1, hidden=0).loss(student, teacher, {})
    torch.testing.assert_close(found, soft)
    found = Distillation(task=0, logits=0, hidden=1).loss(student, teacher, {})
    assert float(found) == pytest.approx(2 / 4)
    with pytest.raises(ConfigError, match="names number 3"):
        Distillation(layers={3: 0}).loss(student, teacher, {})


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruning", "more", "match"),
    [
        (config(criterion="wanda"), {}, "looks at data: pass calibration"),
        (config(schedule=Schedule("linear", begin=2, end=50)), {}, "from step 2 to step 50, and the training has 12"),
        (PruningConfig(0.5, granularity=("head", "layer"), scope="global"), {}, "granularity 'layer'"),
        (config(schedule="rigl", granularity="2:4", sparsity=None), {}, "exchanges single weights"),
        (
            PruningConfig(granularity=("neuron",), target_params=0.5, schedule="cubic"),
            {},
            "needs a sparsity to grow to",
        ),
        (config(polish="distill"), {}, "polish is a training of its own"),
        (config(criterion="taylor", schedule=Schedule("one_shot", begin=0)), {}, "has seen no gradient"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, pruning, more, match):
    run = trainer(tmp_path, pruning=pruning, **more)
    before = models.snapshot(run.model)
    with pytest.raises(ConfigError, match=match):
        run.train()
    models.assert_unchanged(run.model, before)


def test_trainers_that_cannot_work(tmp_path):
    model = models.tiny_bert()
    with pytest.raises(ConfigError, match="no teacher"):
        trainer(tmp_path, model, distillation=Distillation())
    with pytest.raises(ConfigError, match="the teacher is the model itself"):
        trainer(tmp_path, model, teacher=model)
    plain = Trainer(model=model, args=arguments(tmp_path), train_dataset=Sentences(), callbacks=[PruningCallback()])
    with pytest.raises(ConfigError, match="the model has no masks"):
        plain.train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    plain = Trainer(
        model=model,
        args=arguments(tmp_path, save_steps=1, **best),
        train_dataset=Sentences(),
        eval_dataset=Sentences(8),
        callbacks=[PruningCallback(config())],
    )
    with pytest.raises(ConfigError, match="use a PruningTrainer"):
        plain.train()
    with pytest.raises(ConfigError, match="is for a training: give it to a PruningTrainer"):
        prune(model, config())
    with pytest.raises(ConfigError, match="watches a training"):
        prune(model, config(criterion="movement", schedule=None))


def test_something_that_fills_zeros_is_noticed(tmp_path):
    class Vandal(TrainerCallback):
        """Writes after the last step."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == STEPS:
                name, mask = next(iter(MaskStore.of(model).masks.items()))
                with torch.no_grad():
                    model.get_parameter(name).copy_(torch.ones(mask.shape))

    run = trainer(tmp_path, callbacks=[Vandal()])
    with pytest.raises(MaskError, match="non-zero weights that its mask removes"):
        run.train()


def test_masks_that_change_behind_our_back_are_noticed(tmp_path):
    class Vandal(TrainerCallback):
        """Forgets a mask, with its zeros."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == STEPS:
                store = MaskStore.of(model)
                store.masks.popitem()
                store.attach(model)

    with pytest.raises(MaskError, match="and the last update left"):
        trainer(tmp_path, callbacks=[Vandal()]).train()


def test_weights_that_are_not_found_any_more_are_noticed(tmp_path):
    model = prune(models.tiny_bert(), 0.5)
    run = PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    model.classifier = torch.nn.Linear(16, 2)
    with pytest.raises(MaskError, match=r"classifier\.weight has a mask, and the model has no such weight"):
        run.train()


def test_wrappers_inside_the_model_do_not_hide_weights(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = prune(models.tiny_bert(), 0.5)
    layers = model.bert.encoder.layer
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    run = PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    run.train()
    gone = counts(model)[0]
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= gone


def test_an_interrupted_training_leaves_no_hooks(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 10:
                raise KeyboardInterrupt

    model = models.tiny_bert()
    pieces = {"model": model, "args": arguments(tmp_path), "train_dataset": Sentences()}
    with pytest.raises(KeyboardInterrupt):
        Trainer(**pieces, callbacks=[PruningCallback(config()), Stop()]).train()
    model.make_permanent()
    Trainer(**pieces).train()
    assert sum(int((p == 0).sum()) for p in model.parameters()) < 10


def test_masks_made_after_the_trainer_count(tmp_path):
    model = models.tiny_bert()
    run = PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    prune(model, 0.5)
    run.train()
    assert all(not model.get_parameter(n).detach()[~m].any() for n, m in MaskStore.of(model).masks.items())
    with pytest.raises(ConfigError, match="the model has no masks"):
        PruningTrainer(model=models.tiny_bert(), args=arguments(tmp_path), train_dataset=Sentences()).train()


@pytest.mark.parametrize(
    ("first", "settings", "finally_gone"),
    [
        (0.5, {"schedule": Schedule("rigl", begin=0, end=8, every=2)}, 0.75),
        (0.5, {}, 0.75),
        (0.5, {"criterion": "movement"}, 0.75),
        (0.75, {}, 0.75),
    ],
)
def test_a_model_that_is_pruned_already_gets_sparser(tmp_path, first, settings, finally_gone):
    model = prune(models.tiny_bert(), first, target_modules=("query", "dense"))
    watch = Watch()
    run = trainer(tmp_path, model, config(**settings), callbacks=[watch])
    run.train()
    assert min(watch.sparsities) >= first - 0.01
    gone, size = counts(model)
    assert gone == round(finally_gone * size)


def test_less_than_there_is_is_refused_before_the_first_step(tmp_path):
    model = prune(models.tiny_bert(), 0.9, target_modules=("query", "dense"))
    with pytest.raises(ConfigError, match=r"sparsity=0\.75 is below the 0\.8996"):
        trainer(tmp_path, model).train()
    with pytest.raises(ConfigError, match=r"starts at a sparsity of 0\.8 and ends at 0\.75"):
        trainer(tmp_path, pruning=config(schedule=Schedule("cubic", initial=0.8))).train()
    dense = prune(models.tiny_bert(), 0.5, keep_dense=True)
    with pytest.raises(ConfigError, match="keep_dense=True"):
        trainer(tmp_path, dense).train()


def test_soft_movement_never_goes_beyond_the_schedule(tmp_path):
    watch = Watch()
    pruning = config(criterion="soft_movement", schedule=Schedule("linear", begin=1, end=36, every=4))
    trainer(tmp_path, pruning=pruning, callbacks=[watch], training={"max_steps": 40}).train()
    allowed = [0.75 * min(1, step / 36) for step in range(1, 41)]
    assert all(found <= most + 0.01 for found, most in zip(watch.sparsities, allowed, strict=True))
    assert watch.sparsities[30] > 0.3  # the threshold does something before the end
    assert watch.sparsities[-1] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("criterion", ["magnitude", "fisher", "taylor"])
def test_calibrated_heads_and_neurons_with_a_repair(tmp_path, criterion):
    model = models.tiny_bert()
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in models.tiny_batches(model)]
    pruning = PruningConfig(
        0.5,
        criterion,
        ("head", "neuron"),
        "global",
        repair="least_squares",
        schedule=Schedule("one_shot", begin=3),
    )
    run = trainer(tmp_path, model, pruning, calibration=batches)
    run.train()
    assert run.pruning.pruner.sparsity > 0.3


def test_gradients_that_overflow_teach_nothing(tmp_path):
    """float16 multiplies the loss; scores are those of the loss itself."""
    found = {}
    for scale in (1.0, 1024.0):
        run = trainer(tmp_path / str(scale), still(), config(criterion="movement"), training={"max_steps": 8})

        class Scale(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, trainer=run, factor=scale, **kwargs):
                pruner = trainer.pruning.pruner
                original = pruner.after_backward

                def after(step, scale=1.0):
                    gradients = [p.grad for p in model.parameters() if p.grad is not None]
                    torch._foreach_mul_(gradients, factor)
                    original(step, factor)
                    torch._foreach_div_(gradients, factor)

                pruner.after_backward = after

        run.add_callback(Scale())
        run.train()
        found[scale] = run.pruning.pruner.learned.scores
    for name, score in found[1.0].items():
        torch.testing.assert_close(found[1024.0][name], score, rtol=1e-4, atol=1e-12)
    before = {name: score.clone() for name, score in found[1024.0].items()}
    for name in before:
        run.model.get_parameter(name).grad = torch.full_like(run.model.get_parameter(name), float("inf"))
    run.pruning.pruner.after_backward(8, 1024.0)
    assert all(torch.equal(before[name], found[1024.0][name]) for name in before)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed"):
        PruningCallback(config()).on_train_begin(args, None, None, model=models.tiny_bert())


def test_labels_are_shifted_only_where_the_model_shifts_them():
    class Outputs(dict):
        __getattr__ = dict.get

    labels = torch.tensor([[-100, -100, -100, 5]])
    states = torch.zeros(1, 4, 2)
    states[0, 3] = torch.tensor([7.0, 0.0])
    student = Outputs(logits=torch.zeros(1, 4, 3), hidden_states=(states,))
    teacher = Outputs(logits=torch.zeros(1, 4, 3), hidden_states=(torch.ones(1, 4, 2),))
    only_hidden = Distillation(task=0, logits=0, hidden=1)
    plain = only_hidden.loss(student, teacher, {"labels": labels})
    shifted = only_hidden.loss(student, teacher, {"labels": labels}, shifts=True)
    assert float(plain) == pytest.approx((36 + 1) / 2)  # position 3 is labelled
    assert float(shifted) == pytest.approx(1.0)  # position 2 foretells it
    assert copy.deepcopy(only_hidden) == only_hidden


def test_distillation_settings():
    for settings, match in (
        ({"task": -1}, "task of the distillation is -1"),
        ({"temperature": 0}, "expected a temperature"),
        ({"task": 0, "logits": 0, "hidden": 0}, "one weight above 0"),
        ({"layers": {}}, "layers of the distillation"),
    ):
        with pytest.raises(ConfigError, match=match):
            Distillation(**settings)


def test_the_config_with_its_schedule_is_in_the_checkpoint(begun):
    assert load_masks(Path(begun.args.output_dir) / "checkpoint-10" / MASK_FILE).config == config()
    assert json.loads(json.dumps(config().to_dict()))["schedule"]["name"] == "cubic"


def test_a_distillation_that_an_earlier_version_began_goes_on_with_dropout(tmp_path):
    def going_on(folder, **settings):
        more = {"teacher": models.tiny_bert(seed=9), "distillation": Distillation(**settings)}
        return trainer(tmp_path / folder, callbacks=[SaveAt(10)], **more)

    going_on("begun", dropout=True).train()
    checkpoint = tmp_path / "begun" / "checkpoint-10"
    with safe_open(checkpoint / STATE_FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    [(key, header)] = [(key, json.loads(text)) for key, text in metadata.items() if "facts" in text]
    del header["facts"]["run"]["distillation"]["dropout"]
    save_file(tensors, checkpoint / STATE_FILE, {**metadata, key: json.dumps(header)})
    with pytest.raises(CheckpointError, match="distillation: dropout was True, now False"):
        going_on("again").train(resume_from_checkpoint=str(checkpoint))
    going_on("as it was", dropout=True).train(resume_from_checkpoint=str(checkpoint))
