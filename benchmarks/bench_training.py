"""Pruning while training: what is lost after at most one epoch of training, and what a step costs.

A classifier is pruned and trained for one epoch on its training sentences, but for those that share five words in a row
with the held-out ones: by our recipe (calibrated pruning first, then distillation from the dense model, with fixed
masks; or a cubic schedule with distillation), and by plain magnitude pruning and fine-tuning with the same budget. It
is scored on dev and on held-out training sentences, drops paired with the dense model. Every run is a process of its
own and is written to OUT/results.jsonl at once: an interrupted benchmark continues.

    python benchmarks/bench_training.py MODEL DATA --out training
    python benchmarks/bench_training.py MODEL DATA --cost      # a step of ours beside one of the plain Trainer
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_accuracy import BEST, ENCODER, split

METHODS = ("magnitude + fine-tuning", "cubic + distillation", "calibrated + distillation")
AMOUNTS = ("0.8", "0.9", "0.95", "2:4", "3x")
WORKLOAD = {"batch_size": 1, "length": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a classifier")
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS), help="a sparsity, N:M, or a speed-up such as 3x")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=512, help="for calibration")
    parser.add_argument("--min-words", type=int, default=15, help="of a calibration sentence")
    parser.add_argument("--held-out", type=int, default=1000, help="training sentences that nothing is trained on")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--float32", action="store_true", help="do not train in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder for the results")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--cost", action="store_true", help="only the cost of a step")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args, json.loads(args.child))))
        return
    if args.cost:
        cost(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for job in [] if args.table else jobs(args):
        if not any(record["job"] == job for record in records):
            run = [sys.executable, *sys.argv, "--child", json.dumps(job)]
            done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
            records.append({"job": job, "found": json.loads(done.stdout.splitlines()[-1])})
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            found = records[-1]["found"]
            right = [f"{name} {100 * statistics.mean(map(int, found[name])):.2f}" for name in ("dev", "held out")]
            print(
                f"{job['amount']:5} {job['method']:28} seed {job['seed']}: {', '.join(right)}, "
                f"{found['pruning']:.0f} s + {found['training']:.0f} s",
                flush=True,
            )
    print(table(args, records))


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What says which run it is."""
    keys = ("sentences", "min_words", "held_out", "epochs", "batch_size", "learning_rate", "float32")
    base = {"model": Path(args.model).resolve().name, **{key: getattr(args, key) for key in keys}}
    yield {**base, "method": "dense", "amount": "0", "seed": 0}
    for seed in range(args.seeds):
        for amount in args.amounts:
            for method in args.methods:
                if not (amount.endswith("x") and method.startswith("cubic")):  # a speed-up is not a schedule's goal
                    yield {**base, "method": method, "amount": amount, "seed": seed}


# --- one run, in its own process ------------------------------------------------------------------------------


def measure(args: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """Prune, train and score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import evaluate_classification, load_classification, prune, shrink, text_batches
    from hf_prune.evaluation.data.overlap import overlapping

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    model = copy.deepcopy(dense)
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, pool = split(args, train["sentence"])
    found: dict[str, Any] = {"pruning": 0.0, "training": 0.0}
    if job["method"] != "dense":
        drawn = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(job["seed"]))]
        every = train["sentence"]
        known = overlapping(every, [every[i] for i in held_out])
        rows = train.select([i for i, shared in enumerate(known) if not shared])
        start = time.perf_counter()
        settings = settings_of(job)
        if job["method"] != "cubic + distillation":
            batches = text_batches([train[i]["sentence"] for i in drawn[: args.sentences]], tokenizer)
            prune(model, seed=job["seed"], calibration=batches, **settings)
            if job["amount"].endswith("x"):
                shrink(model)
            settings = None
        found["pruning"] = time.perf_counter() - start
        start = time.perf_counter()
        found["steps"] = train_it(args, job, model, dense, rows, tokenizer, settings)
        found["training"] = time.perf_counter() - start
        if job["amount"].endswith("x"):
            from bench_structured import ratio

            found["measured"], *_ = ratio(dense, model, WORKLOAD)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2)
    found["zeros"] = zeros / sum(p.numel() for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    for name, data in (("dev", dev), ("held out", train.select(held_out))):
        score = evaluate_classification(model.eval(), tokenizer, data)
        found[name] = "".join(str(int(p == y)) for p, y in zip(score.predictions, score.labels, strict=True))
    return found


def settings_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config."""
    amount, plain = job["amount"], job["method"].startswith("magnitude")
    if amount.endswith("x"):
        units = {"granularity": ("head", "neuron"), "target_speedup": float(amount[:-1]), "workload": WORKLOAD}
        return {**units, **({} if plain else {"criterion": "fisher", "repair": "least_squares"})}
    size = {"granularity": amount} if ":" in amount else {"sparsity": float(amount)}
    if job["method"] == "calibrated + distillation":
        best = {key: value for key, value in BEST.items() if ":" not in amount or key != "allocation"}
        return {**best, **size, "target_modules": ENCODER}
    return {**size, "target_modules": ENCODER}


def train_it(
    args: argparse.Namespace, job: Mapping[str, Any], model: Any, dense: Any, rows: Any, tokenizer: Any, settings: Any
) -> int:
    """One epoch; how many steps it had."""
    from transformers import DataCollatorWithPadding, Trainer

    from hf_prune import Distillation, MaskStore, PruningConfig, PruningTrainer, Schedule

    data = rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=128), batched=True)
    data = data.rename_column("label", "labels").remove_columns("sentence")
    distills = "distillation" in job["method"]
    config = None if settings is None else PruningConfig(schedule=Schedule("cubic", end=0.6, every=20), **settings)
    with tempfile.TemporaryDirectory() as folder:
        pieces = {
            "model": model,
            "args": arguments(args, folder, job["seed"]),
            "train_dataset": data,
            "data_collator": DataCollatorWithPadding(tokenizer),
        }
        if not distills and config is None and MaskStore.of(model) is None:  # a shrunk model is like any other
            trainer = Trainer(**pieces)
        else:
            trainer = PruningTrainer(
                **pieces,
                pruning_config=config,
                teacher=copy.deepcopy(dense) if distills else None,
                distillation=Distillation(task=0.0, logits=1.0, hidden=1.0) if distills else None,
            )
        trainer.train()
        return int(trainer.state.global_step)


def arguments(args: argparse.Namespace, folder: str, seed: int, **more: Any) -> Any:
    """Of the Trainer."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": args.epochs,
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


def drop(dense: Mapping[str, Any], found: Sequence[Mapping[str, Any]], data: str) -> str:
    """Mean over the seeds, in points, with its paired standard error."""
    runs = [[int(x) for x in each[data]] for each in found]
    lost = [int(d) - statistics.mean(r) for d, r in zip(dense[data], zip(*runs, strict=True), strict=True)]
    return f"{100 * statistics.mean(lost):.2f} ± {100 * statistics.stdev(lost) / len(lost) ** 0.5:.2f}"


def table(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> str:
    """What was measured."""
    from hf_prune.utils.formatting import format_table

    dense = next(record["found"] for record in records if record["job"]["method"] == "dense")
    rows = []
    for amount in args.amounts:
        for method in args.methods:
            found = [r["found"] for r in records if (r["job"]["amount"], r["job"]["method"]) == (amount, method)]
            if found:
                mean = {key: statistics.mean(f[key] for f in found) for key in ("pruning", "training", "zeros")}
                faster = statistics.mean(f["measured"] for f in found) if "measured" in found[0] else None
                rows.append(
                    [
                        amount,
                        method,
                        str(len(found)),
                        f"{faster:.2f}x" if faster else f"{100 * mean['zeros']:.1f} %",
                        drop(dense, found, "dev"),
                        drop(dense, found, "held out"),
                        f"{mean['pruning']:.0f} s + {mean['training']:.0f} s",
                    ]
                )
    header = ["asked", "method", "seeds", "zeros, faster", "drop on dev", "on held-out", "time"]
    right = {name: 100 * statistics.mean(map(int, dense[name])) for name in ("dev", "held out")}
    note = (
        f"Drops in points: dev {right['dev']:.2f} dense, n = {len(dense['dev'])}; held-out training sentences "
        f"{right['held out']:.2f}, n = {len(dense['held out'])}. Zeros: of the encoder's matrices."
    )
    return format_table(header, rows, left=2) + "\n" + note


# --- what a step costs ------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> None:
    """A step of the plain Trainer, one of ours with masks that stay, one of ours with a schedule, and again."""
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer

    from hf_prune import PruningConfig, PruningTrainer, Schedule

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (args.batch_size, 64), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(ids)]
    settings = {"target_modules": ENCODER, "sparsity": 0.8}
    kinds: dict[str, Any] = {
        "plain Trainer": None,
        "ours, masks from the start": PruningConfig(**settings),
        "ours, cubic, an update every 50 steps": PruningConfig(
            schedule=Schedule("cubic", end=1.0, every=50), **settings
        ),
        "ours, movement, an update every 50 steps": PruningConfig(
            criterion="movement", schedule=Schedule("cubic", begin=10, end=1.0, every=50), **settings
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
        found = times[first:]
        ratios = statistics.quantiles([a / b for a, b in zip(found, plain, strict=True)], n=4)
        print(
            f"{name:42} {1000 * statistics.mean(found):7.1f} ms of CPU a step, {sum(found) / sum(plain):.3f} of plain "
            f"(quartiles of single steps {ratios[0]:.3f} to {ratios[2]:.3f}; {len(found)} steps in turns)"
        )


class Turns:
    """Trainings that run in threads, one at a time, a step each: what else the machine does hits all of them alike.

    A step is timed from its beginning to that of the next one, in CPU time of its thread, which with one thread of
    torch has everything in it.

    Args:
        n: How many trainings.
    """

    def __init__(self, n: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(n)]
        self.left = list(range(n))
        self.now = 0
        self.changed = threading.Condition()

    def wait(self, number: int) -> None:
        """Until it is this one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.now == number)

    def go_on(self, number: int, *, for_good: bool = False) -> None:
        """To the next one, for good if this one has ended."""
        with self.changed:
            if for_good:
                self.left.remove(number)
            following = sorted(self.left, key=lambda n: (n <= number, n))
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
        """All of them, to their ends."""
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
