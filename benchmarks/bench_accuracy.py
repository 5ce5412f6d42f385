"""Accuracy of pruning in one shot: methods by sparsities, calibrated on unlabelled training sentences, no training.

The Linears of the encoder are pruned (pooler and classifier are left alone), and the dev split is scored. A drop is
the mean over the seeds, which choose the calibration sentences among the training rows with at least so many words
(most rows are phrases of a few words); its standard error is that of the mean over the dev sentences of what each of
them lost, averaged over the seeds, so it is paired. Methods without calibration do not depend on the seed. Held-out
training sentences are scored as well: methods are compared on them, dev is only reported.

Every measurement runs in a process of its own, and is written to OUT/results.jsonl at once: an interrupted run
continues. Seconds are those of pruning alone, calibration included. Memory is the largest resident size of that
process until pruning has ended, less that before it began, when the model, its tokenizer and the batches were loaded.

    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --seeds 3 --image docs/images/accuracy.png
    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --time     # layers, and a model of DistilBERT's size
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ENCODER = r".*\b(layer|layers|h|block)\.\d+\..*"
BEST = {"criterion": "alps", "repair": "least_squares", "objective": "loss", "allocation": "fisher"}
METHODS: dict[str, dict[str, Any]] = {
    "torch L1": {},
    "magnitude": {},
    "magnitude + least squares": {"repair": "least_squares"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda + least squares": {"criterion": "wanda", "scope": "row", "repair": "least_squares"},
    "fisher": {"criterion": "fisher", "scope": "global"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt, fisher allocation, loss": {**BEST, "criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "alps, objective loss": {"criterion": "alps", "repair": "least_squares", "objective": "loss"},
    "alps, fisher allocation": {"criterion": "alps", "allocation": "fisher"},
    "alps, owl allocation, loss": {**BEST, "allocation": "owl"},
    "best: alps, fisher allocation, loss": BEST,
    "best + polish": {**BEST, "polish": "distill"},
}
AMOUNTS = ("0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4:8", "16x1@0.5")


def settings_for(method: str, amount: str) -> dict[str, Any]:
    """Fields of a config: a sparsity such as ``0.5``, a granularity such as ``2:4``, or ``16x1@0.5`` for blocks."""
    settings = dict(METHODS[method], target_modules=ENCODER)
    if ":" in amount:  # brings its own pools and sparsity
        settings.pop("scope", None)
        settings.pop("allocation", None)
        return {**settings, "granularity": amount}
    block, _, sparsity = amount.rpartition("@")
    return {**settings, "sparsity": float(sparsity), **({"granularity": f"block:{block}"} if block else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a classifier")
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=512, help="for calibration")
    parser.add_argument("--min-words", type=int, default=15, help="of a calibration sentence")
    parser.add_argument("--polish-sentences", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=2000, help="training sentences that nothing is calibrated on")
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="folder for the results")
    parser.add_argument("--image", type=Path, help="where to draw the table")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--time", action="store_true", help="only time the best method on larger models")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args, json.loads(args.child))))
        return
    if args.time:
        time_layers(args)
        return
    results = Results(args)
    jobs = [
        (method, amount, seed)
        for seed in range(args.seeds)
        for method in args.methods
        for amount in args.amounts
        if (seed == 0 or method not in ("torch L1", "magnitude"))
        and not (method == "torch L1" and not is_number(amount))
    ]
    results.child("dense", "0", 0)
    for method, amount, seed in [] if args.table else jobs:
        results.child(method, amount, seed)
    print(results.table(args.methods, args.amounts))
    if args.image:
        results.draw(args.image, args.methods, [a for a in args.amounts if is_number(a)])


def is_number(amount: str) -> bool:
    return amount.replace(".", "", 1).isdigit()


# --- one measurement, in its own process --------------------------------------------------------------


def measure(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Prune once, and score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import PruningConfig, evaluate_classification, load_classification, prune, text_batches
    from hf_prune.planning.make_plan import make_plan

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, pool = split(args, train["sentence"])
    drawn = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(job["seed"]))]

    def batches(n: int) -> list[dict[str, Any]]:
        return text_batches([train[i]["sentence"] for i in drawn[:n]], tokenizer)

    found: dict[str, Any] = {}
    if job["method"] != "dense":
        settings = settings_for(job["method"], job["amount"])
        config = PruningConfig(**settings)
        calibration = batches(args.sentences) if config.needs_data else None
        polish_data = batches(args.polish_sentences) if config.polish is not None else None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        if job["method"] == "torch L1":
            torch_l1(model, config)
        else:
            prune(model, config, calibration=calibration, polish_data=polish_data)
        found["seconds"] = time.perf_counter() - start
        found["memory"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        zeros = sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, torch.nn.Linear))
        found["of all Linears"] = zeros / sum(
            m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)
        )
    else:
        plan = make_plan(model, PruningConfig(0.5, target_modules=ENCODER))
        found |= {"weights": len(plan.tensors), "prunable": plan.target_parameters, "all": plan.total_parameters}
        found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, data in (("dev", dev), ("held out", train.select(held_out))):
        score = evaluate_classification(model, tokenizer, data)
        found[name] = "".join(str(int(p == y)) for p, y in zip(score.predictions, score.labels, strict=True))
    return found


def split(args: argparse.Namespace, sentences: Sequence[str]) -> tuple[list[int], list[int]]:
    """Training rows that are held out, and those that calibration draws from: they share no five words in a row."""
    import torch

    from hf_prune.evaluation.data.overlap import overlapping

    long = [i for i, text in enumerate(sentences) if len(text.split()) >= args.min_words]
    order = [long[i] for i in torch.randperm(len(long), generator=torch.Generator().manual_seed(2**31))]
    held_out, rest = order[: args.held_out], order[args.held_out :]
    known = overlapping([sentences[i] for i in rest], [sentences[i] for i in held_out])
    return held_out, [i for i, shared in zip(rest, known, strict=True) if not shared]


def torch_l1(model: Any, config: Any) -> None:
    """The baseline: torch.nn.utils.prune on the same modules."""
    from torch.nn.utils import prune as torch_prune

    from hf_prune.planning.targets import resolve_targets

    modules = dict(model.named_modules())
    for target in resolve_targets(model, config):
        torch_prune.l1_unstructured(modules[target.module], "weight", amount=config.sparsity)
        torch_prune.remove(modules[target.module], "weight")


# --- all of them --------------------------------------------------------------------------------------


class Results:
    """What has been measured, in a file of JSON lines."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = args.out / "results.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.found = {self.key(r): r for r in map(json.loads, lines)}

    @staticmethod
    def key(record: dict[str, Any]) -> str:
        """What tells measurements apart."""
        return json.dumps({k: v for k, v in record.items() if k != "found"}, sort_keys=True)

    def job(self, method: str, amount: str, seed: int) -> dict[str, Any]:
        """What says which measurement it is."""
        names = ("sentences", "min_words", "held_out", *(("polish_sentences",) if "polish" in method else ()))
        settings = {name: getattr(self.args, name) for name in names}
        model, data = Path(self.args.model).resolve().name, Path(self.args.data).resolve().name
        return {"method": method, "amount": amount, "seed": seed, "model": model, "data": data, **settings}

    def get(self, method: str, amount: str) -> list[dict[str, Any]]:
        """All seeds of one cell."""
        keys = [self.key(self.job(method, amount, seed)) for seed in range(self.args.seeds)]
        return [self.found[key]["found"] for key in keys if key in self.found]

    def child(self, method: str, amount: str, seed: int) -> None:
        """Measure, unless that has been done."""
        job = self.job(method, amount, seed)
        if self.key(job) in self.found:
            return
        done = subprocess.run(
            [sys.executable, *sys.argv, "--child", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
        )
        record = {**job, "found": json.loads(done.stdout.splitlines()[-1])}
        self.found[self.key(job)] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if method != "dense":
            drop, error = self.drop(method, amount)
            held, _ = self.drop(method, amount, "held out")
            seconds = record["found"]["seconds"]
            print(f"{method:36} {amount:>8} seed {seed}: drop {drop:5.2f} ± {error:.2f}, ", end="")
            print(f"held out {held:5.2f}; {seconds:.1f} s", flush=True)

    def drop(self, method: str, amount: str, data: str = "dev") -> tuple[float, float]:
        """Mean drop over the seeds, in points, and its paired standard error."""
        dense = [int(x) for x in self.get("dense", "0")[0][data]]
        runs = [[int(x) for x in found[data]] for found in self.get(method, amount)]
        lost = [d - statistics.mean(r) for d, r in zip(dense, zip(*runs, strict=True), strict=True)]
        return 100 * statistics.mean(lost), 100 * statistics.stdev(lost) / len(lost) ** 0.5

    def table(self, methods: Iterable[str], amounts: Sequence[str]) -> str:
        """What was measured, a method a row."""
        from hf_prune.utils.formatting import format_table

        dense = self.get("dense", "0")[0]
        lines = []
        for data, title in (("dev", "dev"), ("held out", "held-out training sentences")):
            score = statistics.mean(int(x) for x in dense[data])
            rows = []
            for method in methods:
                cells = [self.get(method, amount) for amount in amounts]
                if not any(cells):
                    continue
                every = [found for cell in cells for found in cell]
                row = [method, str(max(map(len, cells)))]
                for amount, cell in zip(amounts, cells, strict=True):
                    row.append("{:.2f} ± {:.2f}".format(*self.drop(method, amount, data)) if cell else "-")
                row.append(f"{statistics.median(f['seconds'] for f in every):.1f} s")
                row.append(f"{max(f['memory'] for f in every) / 1e6:.0f} MB")
                rows.append(row)
            lines.append(f"drop in points on {title}; dense: {100 * score:.2f} of {len(dense[data])}")
            lines.append(format_table(["", "seeds", *amounts, "median time", "most memory"], rows, left=1) + "\n")
        share = dense["prunable"]
        lines.append(
            f"{share:,} weights of {dense['weights']} Linears are pruned, {100 * share / dense['all']:.1f} % of all "
            f"parameters; {dense['threads']} thread(s), torch {dense['torch']}; {self.args.sentences} calibration "
            f"sentences of at least {self.args.min_words} words"
        )
        for amount in amounts:
            best = self.get("magnitude", amount)
            if best:
                lines.append(f"{amount} of these is {100 * best[0]['of all Linears']:.1f} % of all Linears.")
        return "\n".join(lines)

    def draw(self, path: Path, methods: Iterable[str], amounts: Sequence[str]) -> None:
        """Accuracy on dev against sparsity, a line a method."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        dense = self.get("dense", "0")[0]["dev"]
        score = 100 * statistics.mean(int(x) for x in dense)
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(score, color="black", linewidth=1, linestyle=":", label=f"dense, {score:.2f} %")
        for i, method in enumerate(methods):
            points = [(100 * float(a), *self.drop(method, a)) for a in amounts if self.get(method, a)]
            if len(points) < 2:
                continue
            x, drops, errors = zip(*points, strict=True)
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
        axes.set_xlabel("share of the encoder's weights that is zero, %")
        axes.set_ylabel(f"accuracy on SST-2 dev, % (n = {len(dense)})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        print(f"Drawn: {path}")


# --- time -----------------------------------------------------------------------------------------------


def time_layers(args: argparse.Namespace) -> None:
    """Seconds and memory of the best method: layers of MiniLM's size, and a model of DistilBERT's; random weights."""
    code = "import sys; sys.path.insert(0, {here!r}); import bench_accuracy as b; b.time_one({kind!r}, {layers}, {n})"
    here = str(Path(__file__).parent)
    for kind, layers in (("minilm", 3), ("minilm", 6), ("minilm", 12), ("distilbert", 6)):
        done = code.format(here=here, kind=kind, layers=layers, n=args.sentences)
        subprocess.run([sys.executable, "-c", done], check=True)


def time_one(kind: str, layers: int, sentences: int) -> None:
    """Time one model in this process."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from hf_prune import PruningConfig, prune

    torch.manual_seed(0)
    width, inner = (384, 1536) if kind == "minilm" else (768, 3072)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if kind != "minilm" else 12,
    )
    model = BertForSequenceClassification(config).eval()
    lengths = torch.randint(12, 40, (sentences,)).sort().values
    batches = []
    for part in lengths.split(32):
        ids = torch.randint(0, 1000, (len(part), int(part.max())))
        mask = (torch.arange(ids.shape[1]) < part[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    prune(model, PruningConfig(0.8, target_modules=ENCODER, **BEST), calibration=batches)
    seconds = time.perf_counter() - start
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{kind}, {layers} layers of width {width}: {seconds:.1f} s ({seconds / layers:.1f} a layer), ", end="")
    print(f"{memory / 1e6:.0f} MB beyond the model's own {dense / 1e6:.0f} MB; ", end="")
    print(f"{int(lengths.sum()):,} tokens, {torch.get_num_threads()} thread(s)", flush=True)


if __name__ == "__main__":
    main()
