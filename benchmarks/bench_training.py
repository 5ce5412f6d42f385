"""Pruning while training: what is lost after some steps, at most one epoch, and what a step costs.

A classifier is pruned and trained on its training sentences, but for those that share five words in a row with the
held-out ones: by our recipe (calibrated pruning first, then distillation from the dense model, with fixed masks), by
schedules with distillation (our default, magnitude, movement, RigL), and by plain magnitude pruning and fine-tuning
with the same budget. It is scored on dev and on held-out training sentences; drops are paired with the dense model.
Every run has a process of its own and is written to OUT/results.jsonl at once: an interrupted benchmark continues.

    python benchmarks/bench_training.py MODEL DATA --out training
    python benchmarks/bench_training.py MODEL DATA --out short --steps 400 --learning-rate 5e-5 --amounts 0.8
    python benchmarks/bench_training.py MODEL DATA --cost      # a step of ours beside one of the plain Trainer
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
from bench_accuracy import BEST, ENCODER

#: Settings of trainings that prune by a schedule, with distillation; the first one names no method.
SCHEDULED: dict[str, dict[str, Any]] = {
    "cubic": {},
    "cubic, magnitude": {"criterion": "magnitude"},
    "cubic, movement": {"criterion": "movement", "begin": 0.05},
    "rigl": {"criterion": "magnitude", "name": "rigl"},
}
METHODS = ("magnitude + fine-tuning", "calibrated + distillation", *SCHEDULED)
AMOUNTS = ("0.8", "0.9", "0.95", "2:4", "3x")
WORKLOAD = {"batch_size": 1, "length": 64}


def main() -> None:
    parser = harness.classifier_parser(__doc__, out="training", held_out=1000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS), help="a sparsity, N:M, or a speed-up such as 3x")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--every", type=int, default=20, help="steps from one update of a schedule to the next")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--float32", action="store_true", help="do not train in bfloat16")
    parser.add_argument("--cost", action="store_true", help="only the cost of a step")
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    if args.cost:
        cost(args)
        return
    results = harness.Results(args.out)
    results.measure([] if args.table else jobs(args), describe)
    print(table(args, results))


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each run."""
    keys = ("sentences", "min_words", "held_out", "epochs", "steps", "every", "batch_size", "learning_rate", "float32")
    base = {"model": Path(args.model).resolve().name, **{key: getattr(args, key) for key in keys}}
    yield {**base, "method": "dense", "amount": "0", "seed": 0}
    for seed in range(args.seeds):
        for amount in args.amounts:
            for method in args.methods:
                if not (amount.endswith("x") and method in SCHEDULED):  # which have no target speed-up
                    yield {**base, "method": method, "amount": amount, "seed": seed}


def describe(job: harness.Job, result: harness.Result) -> str:
    """A line about a new result."""
    return (
        f"{job['amount']:5} {job['method']:28} seed {job['seed']}: dev {harness.accuracy(result['dev']):.2f}, held out "
        f"{harness.accuracy(result['held out']):.2f}, {result['pruning']:.0f} s + {result['training']:.0f} s"
    )


# --- one run, in its own process ------------------------------------------------------------------------------


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Prune, train and score."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import load_classification, prune, shrink, text_batches

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    model = copy.deepcopy(dense)
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, rest = harness.split_sentences(train["sentence"], args.held_out, args.min_words)
    result: harness.Result = {"pruning": 0.0, "training": 0.0}
    if job["method"] != "dense":
        rows = harness.shuffled(rest, job["seed"])[: args.sentences]
        examples = train.select(harness.without_overlap(train["sentence"], held_out))
        start = time.perf_counter()
        settings: dict[str, Any] | None = settings_of(job)
        if job["method"] not in SCHEDULED:
            batches = text_batches([train[i]["sentence"] for i in rows], tokenizer)
            prune(model, seed=job["seed"], calibration=batches, **(settings or {}))
            if job["amount"].endswith("x"):
                shrink(model)
            settings = None
        result["pruning"] = time.perf_counter() - start
        start = time.perf_counter()
        result["steps"] = train_it(args, job, model, dense, examples, tokenizer, settings)
        result["training"] = time.perf_counter() - start
        if job["amount"].endswith("x"):
            from bench_structured import ratio

            result["measured"], *_ = ratio(dense, model, WORKLOAD)
    matrices = [p for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2]
    result["zeros"] = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return result | harness.score_splits(model.eval(), tokenizer, dev, train.select(held_out))


def settings_of(job: harness.Job) -> dict[str, Any]:
    """Fields of a config."""
    amount, plain = job["amount"], job["method"].startswith("magnitude")
    if amount.endswith("x"):
        units = {"granularity": ("head", "neuron"), "target_speedup": float(amount[:-1]), "workload": WORKLOAD}
        return {
            **units,
            **({"criterion": "magnitude"} if plain else {"criterion": "fisher", "repair": "least_squares"}),
        }
    size: dict[str, Any] = {"granularity": amount} if ":" in amount else {"sparsity": float(amount)}
    if job["method"] == "calibrated + distillation":
        best = {key: value for key, value in BEST.items() if ":" not in amount or key != "allocation"}
        return {**best, **size, "target_modules": ENCODER}
    own = {key: value for key, value in SCHEDULED.get(job["method"], {}).items() if key == "criterion"}
    return {**size, **({"criterion": "magnitude"} if plain else own), "target_modules": ENCODER}


def train_it(
    args: argparse.Namespace, job: harness.Job, model: Any, dense: Any, rows: Any, tokenizer: Any, settings: Any
) -> int:
    """One epoch; how many steps it had."""
    from transformers import DataCollatorWithPadding, Trainer

    from hf_prune import Distillation, MaskStore, PruningConfig, PruningTrainer, Schedule

    data = rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=128), batched=True)
    data = data.rename_column("label", "labels").remove_columns("sentence")
    distills = job["method"] != "magnitude + fine-tuning"
    curve = {key: value for key, value in SCHEDULED.get(job["method"], {}).items() if key != "criterion"}
    schedule = Schedule(**{"name": "cubic", "begin": 0, "end": 0.6, "every": args.every, **curve})
    config = None if settings is None else PruningConfig(schedule=schedule, **settings)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": model,
            "args": arguments(args, folder, job["seed"]),
            "train_dataset": data,
            "data_collator": DataCollatorWithPadding(tokenizer),
        }
        if not distills and config is None and MaskStore.of(model) is None:  # a shrunk model is like any other
            trainer = Trainer(**common)
        else:
            trainer = PruningTrainer(
                **common,
                pruning_config=config,
                teacher=copy.deepcopy(dense) if distills else None,
                distillation=Distillation(task=0.0, logits=1.0, hidden=1.0) if distills else None,
            )
        trainer.train()
        return int(trainer.state.global_step)


def arguments(args: argparse.Namespace, folder: str, seed: int, **more: Any) -> Any:
    """The Trainer's arguments."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": args.epochs,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "group_by_length",
        "bf16": not args.float32,
        "use_cpu": True,
        "logging_steps": 200,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
    return TrainingArguments(**{**settings, **more})


# --- all of them ------------------------------------------------------------------------------------------------


def table(args: argparse.Namespace, results: harness.Results) -> str:
    """What was measured."""
    from hf_prune.utils.formatting import format_table

    dense = results.where(method="dense")[0]
    rows = []
    for amount in args.amounts:
        for method in args.methods:
            if not (runs := results.where(method=method, amount=amount)):
                continue
            mean = {name: statistics.mean(run[name] for run in runs) for name in ("pruning", "training", "zeros")}
            speedup = statistics.mean(run["measured"] for run in runs) if "measured" in runs[0] else None
            drops = [harness.paired_drop(dense[data], [run[data] for run in runs]) for data in ("dev", "held out")]
            rows.append(
                [
                    amount,
                    method,
                    str(len(runs)),
                    f"{100 * mean['zeros']:.1f} %" if speedup is None else f"{speedup:.2f}x",
                    *(f"{drop:.2f} ± {error:.2f}" for drop, error in drops),
                    f"{mean['pruning']:.0f} s + {mean['training']:.0f} s",
                ]
            )
    header = ["asked", "method", "seeds", "zeros, faster", "drop on dev", "on held-out", "time"]
    note = (
        f"Drops in points: dev {harness.accuracy(dense['dev']):.2f} dense, n = {len(dense['dev'])}; held-out training "
        f"sentences {harness.accuracy(dense['held out']):.2f}, n = {len(dense['held out'])}. Zeros: of the encoder's "
        f"matrices."
    )
    return format_table(header, rows, left=2) + "\n" + note


# --- what a step costs ------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> None:
    """Time steps of the plain Trainer, and of ours with fixed masks or with a schedule, in turns."""
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer

    from hf_prune import PruningConfig, PruningTrainer, Schedule

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (args.batch_size, 64), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(ids)]
    settings = {"target_modules": ENCODER, "sparsity": 0.8, "criterion": "magnitude"}
    kinds: dict[str, Any] = {
        "plain Trainer": None,
        "ours, masks from the start": PruningConfig(**settings),
        "ours, cubic, an update every 50 steps": PruningConfig(
            schedule=Schedule("cubic", end=1.0, every=50), **settings
        ),
        "ours, movement, an update every 50 steps": PruningConfig(
            schedule=Schedule("cubic", begin=10, end=1.0, every=50), **{**settings, "criterion": "movement"}
        ),
    }
    first, steps = 10, 111  # the steps before are not counted
    turns = Turns(len(kinds))
    trainers = []
    with tempfile.TemporaryDirectory() as folder:
        for number, config in enumerate(kinds.values()):
            more = {} if config is None else {"pruning_config": config}
            trainers.append(
                (Trainer if config is None else PruningTrainer)(
                    model=AutoModelForSequenceClassification.from_pretrained(args.model),
                    args=arguments(args, f"{folder}/{number}", 0, max_steps=steps, logging_steps=1000),
                    train_dataset=rows * steps,
                    callbacks=[turns.clock(number)],
                    **more,
                )
            )
        turns.run([trainer.train for trainer in trainers])
    plain = turns.times[0][first:]
    for name, times in zip(kinds, turns.times, strict=True):
        counted = times[first:]
        ratios = statistics.quantiles([a / b for a, b in zip(counted, plain, strict=True)], n=4)
        print(
            f"{name:42} {1000 * statistics.mean(counted):7.1f} ms of CPU a step, "
            f"{sum(counted) / sum(plain):.3f} of plain (quartiles of single steps {ratios[0]:.3f} to {ratios[2]:.3f}; "
            f"{len(counted)} steps in turns)"
        )


class Turns:
    """Trainings that run in threads and take turns, a step each, so that other load on the machine affects them alike.

    A step is timed from its start to the start of the next one, in CPU time of its thread, which covers everything
    when torch has one thread.

    Args:
        n: How many trainings.
    """

    def __init__(self, n: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(n)]
        self.running = list(range(n))
        self.now = 0
        self.changed = threading.Condition()

    def wait(self, number: int) -> None:
        """Wait until it is this training's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.now == number)

    def go_on(self, number: int, *, for_good: bool = False) -> None:
        """Hand over to the next training, for good if this one has ended."""
        with self.changed:
            if for_good:
                self.running.remove(number)
            following = sorted(self.running, key=lambda n: (n <= number, n))
            self.now = following[0] if following else -1
            self.changed.notify_all()

    def clock(self, number: int) -> Any:
        """A callback that times steps and hands over after each."""
        from transformers import TrainerCallback

        turns = self

        class Clock(TrainerCallback):
            start: float | None = None

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if self.start is not None:
                    turns.times[number].append(time.thread_time() - self.start)
                turns.go_on(number)
                turns.wait(number)
                self.start = time.thread_time()

        return Clock()

    def run(self, trainings: Sequence[Callable[[], Any]]) -> None:
        """Run all trainings to their ends."""
        failed = []

        def one(number: int) -> None:
            self.wait(number)
            try:
                trainings[number]()
            except BaseException as error:
                failed.append(error)
            finally:
                self.go_on(number, for_good=True)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(trainings))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]


if __name__ == "__main__":
    main()
