"""Structured pruning: methods by speed-ups; what was asked for, foretold and measured, and what it cost in accuracy.

Heads and neurons of the encoder are removed until the model is so many times as fast on the workload, on this machine,
one thread, dense and pruned in turns, in the same dtype; the shrunk model is then scored on dev and on held-out
training sentences. Calibration sees unlabelled training sentences of at least so many words. A drop is the mean over
the seeds, with its standard error paired over the sentences. Every measurement runs in a process of its own and is
written to OUT/results.jsonl at once: an interrupted run continues.

The peer, torch-pruning (``pip install torch-pruning``), is given the same speed-ups: its one ratio, of heads, of
neurons and of the hidden size alike, is found by bisection on the measured time. "+ distillation" trains the shrunk
model for one epoch on all unlabelled training sentences that share no five words in a row with the held-out ones, to
put out what the dense model does.

    export OMP_NUM_THREADS=1
    python benchmarks/bench_structured.py MODEL DATA --out structured --image docs/images/structured.png
    python benchmarks/bench_structured.py MODEL DATA --speed      # bf16, and a model of DistilBERT's size; no scores
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_accuracy import split

UNITS = {"granularity": ("head", "neuron")}
BEST = {**UNITS, "criterion": "fisher", "repair": "least_squares"}
METHODS: dict[str, dict[str, Any]] = {
    "random": {**UNITS, "criterion": "random"},
    "magnitude": {**UNITS, "criterion": "magnitude"},
    "torch-pruning, magnitude": {},
    "torch-pruning, taylor": {},
    "taylor": {**UNITS, "criterion": "taylor"},
    "fisher": {**UNITS, "criterion": "fisher"},
    "reconstruction + least squares": {**UNITS, "criterion": "reconstruction", "repair": "least_squares"},
    "best: fisher + least squares": BEST,
    "best + distillation": BEST,
}
SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
SEEDLESS = ("magnitude", "torch-pruning, magnitude")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a classifier")
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--speedups", nargs="+", type=float, default=list(SPEEDUPS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=512, help="for calibration")
    parser.add_argument("--min-words", type=int, default=15, help="of a calibration sentence")
    parser.add_argument("--held-out", type=int, default=1000, help="training sentences that nothing is calibrated on")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument(
        "--other-batch", type=int, default=32, help="batch size at which the speed-up is measured as well"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the distillation")
    parser.add_argument("--out", type=Path, default=Path("structured"), help="folder for the results")
    parser.add_argument("--image", type=Path, help="where to draw the table")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--speed", action="store_true", help="only speeds: bf16, and a model of DistilBERT's size")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args, json.loads(args.child))))
        return
    if args.speed:
        time_others(args)
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
            print(
                f"{job['method']:40} {job['speedup']:4} seed {job['seed']}: {brief(records[-1]['found'])}", flush=True
            )
    print(table(args, records))
    if args.image:
        draw(args, records)


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What says which measurement it is."""
    settings = {name: getattr(args, name) for name in ("sentences", "min_words", "held_out", "batch_size", "length")}
    base = {"model": Path(args.model).resolve().name, **settings}
    yield {**base, "method": "dense", "speedup": 1.0, "seed": 0}
    for seed in range(args.seeds):
        for method in args.methods:
            for speedup in args.speedups:
                if seed == 0 or method not in SEEDLESS:
                    more = {"learning_rate": args.learning_rate} if "distillation" in method else {}
                    yield {**base, "method": method, "speedup": speedup, "seed": seed, **more}


def brief(found: Mapping[str, Any]) -> str:
    """One line."""
    right = {name: 100 * statistics.mean(map(int, found[name])) for name in ("dev", "held out")}
    return (
        f"measured {found['measured']:.2f} ({found['other']:.2f} at the other batch), dev {right['dev']:.2f}, held out "
        f"{right['held out']:.2f}, {found['seconds']:.0f} s"
    )


# --- one measurement, in its own process --------------------------------------------------------------


def measure(args: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """Prune once, time, and score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import PruningConfig, evaluate_classification, load_classification, prune, shrink, text_batches
    from hf_prune.pruning.mask_store import MaskStore

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    model = copy.deepcopy(dense)
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, pool = split(args, train["sentence"])
    drawn = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(job["seed"]))]
    batches = text_batches([train[i]["sentence"] for i in drawn[: args.sentences]], tokenizer)
    workload = {"batch_size": args.batch_size, "length": args.length}
    found: dict[str, Any] = {"predicted": 1.0, "distilled": 0.0}
    start = time.perf_counter()
    if job["method"].startswith("torch-pruning"):
        model = torch_pruning(model, job, batches, train.select(drawn[: args.sentences]), tokenizer, workload)
    elif job["method"] != "dense":
        config = PruningConfig(
            target_speedup=job["speedup"], workload=workload, seed=job["seed"], **METHODS[job["method"]]
        )
        prune(model, config, calibration=batches if config.needs_data else None)
        found["predicted"] = MaskStore.of(model).speed.predicted  # type: ignore[union-attr]
        shrink(model)
    found["seconds"] = time.perf_counter() - start
    if "distillation" in job["method"]:
        from hf_prune.evaluation.data.overlap import overlapping

        every = train["sentence"]
        known = overlapping(every, [every[i] for i in held_out])
        texts = [text for text, shared in zip(every, known, strict=True) if not shared]
        start = time.perf_counter()
        distill(model, dense, texts, tokenizer, job["learning_rate"], job["seed"])
        found["distilled"] = time.perf_counter() - start
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["measured"], found["low"], found["high"] = ratio(dense, model, workload)
    found["other"], *_ = ratio(dense, model, {**workload, "batch_size": args.other_batch})
    for name, data in (("dev", dev), ("held out", train.select(held_out))):
        score = evaluate_classification(model, tokenizer, data)
        found[name] = "".join(str(int(p == y)) for p, y in zip(score.predictions, score.labels, strict=True))
    return found


def ratio(dense: Any, model: Any, workload: Mapping[str, int]) -> tuple[float, float, float]:
    """How many times as fast, with its interval."""
    from hf_prune.inference.speedup import measured_speedup, workload_inputs

    record = measured_speedup(dense, model, workload_inputs(dense, workload), workload)
    return record.measured, record.low, record.high


def torch_pruning(
    model: Any,
    job: Mapping[str, Any],
    batches: Sequence[Any],
    labelled: Any,
    tokenizer: Any,
    workload: Mapping[str, int],
) -> Any:
    """The peer, whose ratio is found by bisection so that the measured speed-up is the one asked for."""
    import torch
    import torch_pruning as tp

    from hf_prune.inference.speedup import measured_speedup, workload_inputs

    given = workload_inputs(model, workload)

    def at(share: float) -> Any:
        twin = copy.deepcopy(model)
        layers = twin.base_model.encoder.layer
        attentions = [layer.attention.self for layer in layers]
        heads = {m: a.num_attention_heads for a in attentions for m in (a.query, a.key, a.value)}
        taylor = job["method"].endswith("taylor")
        pruner = tp.pruner.MetaPruner(
            twin,
            {k: v[:1] for k, v in given.items()},
            importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            head_pruning_ratio=share,
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads=heads,
            ignored_layers=[twin.classifier],
            output_transform=lambda out: out.logits.sum(),
        )
        if taylor:
            for start in range(0, 256, 32):
                rows = labelled[start : start + 32]
                inputs = tokenizer(rows["sentence"], padding=True, return_tensors="pt")
                twin(**inputs, labels=torch.tensor(rows["label"])).loss.backward()
        pruner.step()
        for layer in layers:
            own = layer.attention.self
            own.num_attention_heads = pruner.num_heads[own.query]
            own.all_head_size = own.query.out_features
        return twin.eval()

    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        share = (low + high) / 2
        twin = at(share)
        measured = measured_speedup(model, twin, given, workload).measured
        if best is None or abs(measured / job["speedup"] - 1) < best[0]:
            best = (abs(measured / job["speedup"] - 1), twin)
        low, high = (share, high) if measured < job["speedup"] else (low, share)
    assert best is not None
    return best[1]


def distill(student: Any, teacher: Any, texts: Sequence[str], tokenizer: Any, rate: float, seed: int) -> None:
    """One epoch on unlabelled texts: logits with temperature 2, and the last hidden states; embeddings stay."""
    import torch
    from torch.nn import functional as F

    from hf_prune.evaluation.data.texts import text_batches

    batches = text_batches(list(texts), tokenizer, batch_size=32)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    for parameter in student.base_model.embeddings.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm = len(order) // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (len(order) - step) / (len(order) - warm)))
    )
    student.eval()
    for index in order:
        batch = batches[index]
        with torch.no_grad():
            goal = teacher(**batch, output_hidden_states=True)
        own = student(**batch, output_hidden_states=True)
        soft = F.kl_div(
            (own.logits / 2).log_softmax(-1), (goal.logits / 2).log_softmax(-1), reduction="batchmean", log_target=True
        )
        mask = batch["attention_mask"][..., None]
        wanted = goal.hidden_states[-1]
        hidden = ((own.hidden_states[-1] - wanted) * mask).square().sum() / (wanted * mask).square().sum()
        (4 * soft + hidden).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for parameter in student.parameters():
        parameter.requires_grad_(True)


# --- all of them --------------------------------------------------------------------------------------


def cell(records: Sequence[Mapping[str, Any]], method: str, speedup: float) -> list[Mapping[str, Any]]:
    """All seeds of one method and speed-up."""
    return [r["found"] for r in records if (r["job"]["method"], r["job"]["speedup"]) == (method, speedup)]


def drop(records: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], data: str) -> tuple[float, float]:
    """Mean drop over the seeds, in points, and its paired standard error."""
    dense = [int(x) for x in cell(records, "dense", 1.0)[0][data]]
    runs = [[int(x) for x in each[data]] for each in found]
    lost = [d - statistics.mean(r) for d, r in zip(dense, zip(*runs, strict=True), strict=True)]
    return 100 * statistics.mean(lost), 100 * statistics.stdev(lost) / len(lost) ** 0.5


def table(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> str:
    """What was measured."""
    import torch

    from hf_prune.utils.formatting import format_table

    dense = cell(records, "dense", 1.0)[0]
    scores = {name: 100 * statistics.mean(map(int, dense[name])) for name in ("dev", "held out")}
    rows = []
    for speedup in args.speedups:
        for method in args.methods:
            found = cell(records, method, speedup)
            if found:
                mean = {
                    k: statistics.mean(f[k] for f in found)
                    for k in ("predicted", "measured", "other", "seconds", "distilled")
                }
                rows.append(
                    [
                        f"{speedup:g}x",
                        method,
                        str(len(found)),
                        "-" if "torch-pruning" in method else f"{mean['predicted']:.2f}",
                        f"{mean['measured']:.2f}",
                        f"{mean['other']:.2f}",
                        f"{100 * statistics.mean(f['parameters'] for f in found) / dense['parameters']:.0f} %",
                        *("{:.2f} ± {:.2f}".format(*drop(records, found, name)) for name in ("dev", "held out")),
                        f"{mean['seconds']:.0f} s" + (f" + {mean['distilled']:.0f} s" if mean["distilled"] else ""),
                    ]
                )
    header = [
        "asked",
        "method",
        "seeds",
        "foretold",
        "measured",
        f"batch {args.other_batch}",
        "parameters",
        "drop on dev",
    ]
    lines = [
        format_table([*header, "on held-out", "time"], rows, left=2),
        f"Speed-ups: batch {args.batch_size} x {args.length} tokens, float32, one thread, dense and pruned in turns, "
        f"medians (dense against itself: {dense['measured']:.2f}, {dense['other']:.2f}); torch {torch.__version__}. "
        f"Drops in points: dev {scores['dev']:.2f} dense, n = {len(dense['dev'])}; held-out training sentences "
        f"{scores['held out']:.2f} dense, n = {len(dense['held out'])}. {args.sentences} unlabelled calibration "
        f"sentences of at least {args.min_words} words.",
    ]
    return "\n".join(lines)


def draw(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy on dev against the measured speed-up, a line a method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    dense = cell(records, "dense", 1.0)[0]
    score = 100 * statistics.mean(map(int, dense["dev"]))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(score, color="black", linewidth=1, linestyle=":", label=f"dense, {score:.2f} %")
    for i, method in enumerate(args.methods):
        cells = [cell(records, method, s) for s in args.speedups]
        points = [
            (statistics.mean(f["measured"] for f in found), *drop(records, found, "dev")) for found in cells if found
        ]
        if len(points) < 2:
            continue
        x, drops, errors = zip(*sorted(points), strict=True)
        strong = method.startswith("best")
        axes.errorbar(
            x,
            [score - d for d in drops],
            errors,
            label=method,
            color=colormaps["tab20"](i),
            marker="o",
            markersize=4,
            linewidth=2.5 if strong else 1.2,
            capsize=2,
            zorder=3 if strong else 2,
        )
    axes.set_xlabel(f"measured speed-up, batch {args.batch_size} x {args.length} tokens, one thread")
    axes.set_ylabel(f"accuracy on SST-2 dev, % (n = {len(dense['dev'])})")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    args.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.image, dpi=120)
    print(f"Drawn: {args.image}")


def time_others(args: argparse.Namespace) -> None:
    """Speed-ups in bf16, and at DistilBERT's size with random weights; no scores."""
    import torch
    from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

    from hf_prune import PruningConfig, prune
    from hf_prune.pruning.mask_store import MaskStore

    torch.set_num_threads(1)
    torch.manual_seed(0)
    distilbert = DistilBertForSequenceClassification(DistilBertConfig()).eval()
    minilm = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    for name, model in (("MiniLM", minilm), ("DistilBERT's size, random weights", distilbert)):
        for dtype in (torch.float32, torch.bfloat16):
            for batch in (args.batch_size, args.other_batch):
                for speedup in args.speedups:
                    workload = {"batch_size": batch, "length": args.length}
                    config = PruningConfig(criterion="magnitude", target_speedup=speedup, workload=workload, **UNITS)
                    twin = copy.deepcopy(model).to(dtype)
                    try:
                        prune(twin, config)
                    except ValueError as error:
                        print(f"{name}, {dtype}, batch {batch}, {speedup:g}x: {error}", flush=True)
                        continue
                    print(f"{name}: {MaskStore.of(twin).speed}", flush=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
