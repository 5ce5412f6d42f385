"""Structured pruning: methods by speed-ups; the target, predicted and measured speed-up, and what it cost in accuracy.

Heads and neurons of the encoder are removed until the model has the speed-up on the workload, on this machine, one
thread, dense and pruned in turns, in the same dtype; the shrunk model is then scored on dev and on held-out
training sentences. Calibration sees unlabelled training sentences of a minimum length. A drop is the mean over
the seeds, with its standard error paired over the sentences. Every measurement runs in a process of its own and is
written to OUT/results.jsonl at once: an interrupted run continues.

The peer, torch-pruning (``pip install torch-pruning``), is given the same speed-ups: its one ratio, of heads, of
neurons and of the hidden size alike, is found by bisection on the measured time. "+ distillation" trains the shrunk
model for one epoch to imitate the dense model, on all unlabelled training sentences that share no five words in a row
with the held-out ones.

    export OMP_NUM_THREADS=1
    python benchmarks/bench_structured.py MODEL DATA --out structured --image docs/images/structured.png
    python benchmarks/bench_structured.py MODEL DATA --speed      # bf16, and a model of DistilBERT's size; no scores
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

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
MEANS = ("predicted", "measured", "other", "parameters", "seconds", "distilled")


def main() -> None:
    parser = harness.classifier_parser(__doc__, out="structured", held_out=1000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--speedups", nargs="+", type=float, default=list(SPEEDUPS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument(
        "--other-batch", type=int, default=32, help="batch size at which the speed-up is measured as well"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the distillation")
    parser.add_argument("--image", type=Path, help="where to draw the table")
    parser.add_argument("--speed", action="store_true", help="only speeds: bf16, and a model of DistilBERT's size")
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    if args.speed:
        time_others(args)
        return
    results = harness.Results(args.out)
    results.measure([] if args.table else jobs(args), describe)
    print(table(args, results))
    if args.image:
        draw(args, results)


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each measurement."""
    settings = {name: getattr(args, name) for name in ("sentences", "min_words", "held_out", "batch_size", "length")}
    base = {"model": Path(args.model).resolve().name, **settings}
    yield {**base, "method": "dense", "speedup": 1.0, "seed": 0}
    for seed in range(args.seeds):
        for method in args.methods:
            for speedup in args.speedups:
                if seed == 0 or method not in SEEDLESS:
                    more = {"learning_rate": args.learning_rate} if "distillation" in method else {}
                    yield {**base, "method": method, "speedup": speedup, "seed": seed, **more}


def describe(job: harness.Job, result: harness.Result) -> str:
    """A line about a new result."""
    return (
        f"{job['method']:40} {job['speedup']:4} seed {job['seed']}: measured {result['measured']:.2f} "
        f"({result['other']:.2f} at the other batch), dev {harness.accuracy(result['dev']):.2f}, held out "
        f"{harness.accuracy(result['held out']):.2f}, {result['seconds']:.0f} s"
    )


# --- one measurement, in its own process --------------------------------------------------------------


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Prune once, time, and score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import PruningConfig, load_classification, prune, shrink, text_batches
    from hf_prune.pruning.mask_store import MaskStore

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    model = copy.deepcopy(dense)
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, rest = harness.split_sentences(train["sentence"], args.held_out, args.min_words)
    rows = harness.shuffled(rest, job["seed"])[: args.sentences]
    batches = text_batches([train[i]["sentence"] for i in rows], tokenizer)
    workload = {"batch_size": args.batch_size, "length": args.length}
    result: harness.Result = {"predicted": 1.0, "distilled": 0.0}
    start = time.perf_counter()
    if job["method"].startswith("torch-pruning"):
        model = torch_pruning(model, job, train.select(rows), tokenizer, workload)
    elif job["method"] != "dense":
        config = PruningConfig(
            target_speedup=job["speedup"], workload=workload, seed=job["seed"], **METHODS[job["method"]]
        )
        prune(model, config, calibration=batches if config.needs_data else None)
        result["predicted"] = MaskStore.of(model).speed.predicted  # type: ignore[union-attr]
        shrink(model)
    result["seconds"] = time.perf_counter() - start
    if "distillation" in job["method"]:
        sentences = train["sentence"]
        texts = [sentences[i] for i in harness.without_overlap(sentences, held_out)]
        start = time.perf_counter()
        distill(model, dense, texts, tokenizer, job["learning_rate"], job["seed"])
        result["distilled"] = time.perf_counter() - start
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["measured"], *_ = ratio(dense, model, workload)
    result["other"], *_ = ratio(dense, model, {**workload, "batch_size": args.other_batch})
    return result | harness.score_splits(model, tokenizer, dev, train.select(held_out))


def ratio(dense: Any, model: Any, workload: Mapping[str, int]) -> tuple[float, float, float]:
    """How many times as fast, with its interval."""
    from hf_prune.inference.speedup import measured_speedup, workload_inputs

    record = measured_speedup(dense, model, workload_inputs(dense, workload), workload)
    return record.measured, record.low, record.high


def torch_pruning(
    model: Any,
    job: harness.Job,
    labelled: Any,
    tokenizer: Any,
    workload: Mapping[str, int],
) -> Any:
    """The peer, whose ratio is found by bisection so that the measured speed-up is the one asked for."""
    import torch
    import torch_pruning as tp

    from hf_prune.inference.speedup import measured_speedup, workload_inputs

    inputs = workload_inputs(model, workload)

    def at(share: float) -> Any:
        twin = copy.deepcopy(model)
        layers = twin.base_model.encoder.layer
        attentions = [layer.attention.self for layer in layers]
        heads = {m: a.num_attention_heads for a in attentions for m in (a.query, a.key, a.value)}
        taylor = job["method"].endswith("taylor")
        pruner = tp.pruner.MetaPruner(
            twin,
            {k: v[:1] for k, v in inputs.items()},
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
                batch = tokenizer(rows["sentence"], padding=True, return_tensors="pt")
                twin(**batch, labels=torch.tensor(rows["label"])).loss.backward()
        pruner.step()
        for layer in layers:
            attention = layer.attention.self
            attention.num_attention_heads = pruner.num_heads[attention.query]
            attention.all_head_size = attention.query.out_features
        return twin.eval()

    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        share = (low + high) / 2
        twin = at(share)
        measured = measured_speedup(model, twin, inputs, workload).measured
        if best is None or abs(measured / job["speedup"] - 1) < best[0]:
            best = (abs(measured / job["speedup"] - 1), twin)
        low, high = (share, high) if measured < job["speedup"] else (low, share)
    assert best is not None
    return best[1]


def distill(student: Any, teacher: Any, texts: Sequence[str], tokenizer: Any, rate: float, seed: int) -> None:
    """One epoch on unlabelled texts: logits with temperature 2, and the last hidden states; embeddings stay."""
    import torch
    from torch.nn import functional as F

    from hf_prune.calibration.texts import text_batches

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
            target = teacher(**batch, output_hidden_states=True)
        output = student(**batch, output_hidden_states=True)
        ours, theirs = ((model.logits / 2).log_softmax(-1) for model in (output, target))
        soft = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        mask = batch["attention_mask"][..., None]
        wanted = target.hidden_states[-1]
        hidden = ((output.hidden_states[-1] - wanted) * mask).square().sum() / (wanted * mask).square().sum()
        (4 * soft + hidden).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for parameter in student.parameters():
        parameter.requires_grad_(True)


# --- all of them --------------------------------------------------------------------------------------


def table(args: argparse.Namespace, results: harness.Results) -> str:
    """What was measured."""
    import torch

    from hf_prune.utils.formatting import format_table

    dense = results.where(method="dense")[0]
    rows = []
    for speedup in args.speedups:
        for method in args.methods:
            if not (runs := results.where(method=method, speedup=speedup)):
                continue
            mean = {name: statistics.mean(run[name] for run in runs) for name in MEANS}
            drops = [harness.paired_drop(dense[data], [run[data] for run in runs]) for data in ("dev", "held out")]
            rows.append(
                [
                    f"{speedup:g}x",
                    method,
                    str(len(runs)),
                    "-" if "torch-pruning" in method else f"{mean['predicted']:.2f}",
                    f"{mean['measured']:.2f}",
                    f"{mean['other']:.2f}",
                    f"{100 * mean['parameters'] / dense['parameters']:.0f} %",
                    *(f"{drop:.2f} ± {error:.2f}" for drop, error in drops),
                    f"{mean['seconds']:.0f} s" + (f" + {mean['distilled']:.0f} s" if mean["distilled"] else ""),
                ]
            )
    header = ["asked", "method", "seeds", "predicted", "measured", f"batch {args.other_batch}", "parameters"]
    lines = [
        format_table([*header, "drop on dev", "on held-out", "time"], rows, left=2),
        f"Speed-ups: batch {args.batch_size} x {args.length} tokens, float32, one thread, dense and pruned in turns, "
        f"medians (dense against itself: {dense['measured']:.2f}, {dense['other']:.2f}); torch {torch.__version__}. "
        f"Drops in points: dev {harness.accuracy(dense['dev']):.2f} dense, n = {len(dense['dev'])}; held-out training "
        f"sentences {harness.accuracy(dense['held out']):.2f} dense, n = {len(dense['held out'])}. {args.sentences} "
        f"unlabelled calibration sentences of at least {args.min_words} words.",
    ]
    return "\n".join(lines)


def draw(args: argparse.Namespace, results: harness.Results) -> None:
    """Accuracy on dev against the measured speed-up, a line a method."""
    dense = results.where(method="dense")[0]["dev"]
    curves = {}
    for method in args.methods:
        cells = [results.where(method=method, speedup=speedup) for speedup in args.speedups]
        curves[method] = sorted(
            (statistics.mean(run["measured"] for run in runs), *harness.paired_drop(dense, [r["dev"] for r in runs]))
            for runs in cells
            if runs
        )
    harness.draw_curves(
        args.image,
        harness.accuracy(dense),
        curves,
        f"measured speed-up, batch {args.batch_size} x {args.length} tokens, one thread",
        f"accuracy on SST-2 dev, % (n = {len(dense)})",
    )


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
