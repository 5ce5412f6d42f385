"""Accuracy of pruning in one shot: methods by sparsities, calibrated on unlabelled training sentences, no training.

The Linears of the encoder are pruned (pooler and classifier are left alone), and the dev split is scored. A drop is
the mean over the seeds, which choose the calibration sentences among the training rows of a minimum length (most rows
are phrases of a few words), with its standard error, paired over the dev sentences. Methods without calibration do not
depend on the seed. Held-out training sentences are scored as well: methods are compared on them, dev is only reported.

Every measurement runs in a process of its own and is written to OUT/results.jsonl at once: an interrupted run
continues. Seconds are those of pruning alone, calibration included. Memory is the growth of that process's largest
resident size while it prunes, with the model, its tokenizer and the batches loaded before.

    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --seeds 3 --image docs/images/accuracy.png
    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --time     # layers, and a model of DistilBERT's size
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

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
    parser = harness.classifier_parser(__doc__, out="accuracy", held_out=2000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--polish-sentences", type=int, default=4096)
    parser.add_argument("--image", type=Path, help="where to draw the table")
    parser.add_argument("--time", action="store_true", help="only time the best method on larger models")
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    if args.time:
        time_layers(args)
        return
    table = Table(args)
    table.results.measure([table.job("dense", "0", 0)], lambda *_: None)
    table.results.measure([] if args.table else table.jobs(), table.line)
    print(table)
    if args.image:
        table.draw(args.image)


def is_number(amount: str) -> bool:
    return amount.replace(".", "", 1).isdigit()


# --- one measurement, in its own process --------------------------------------------------------------


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Prune once, and score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_prune import PruningConfig, load_classification, prune, text_batches
    from hf_prune.planning.make_plan import make_plan

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, dev = load_classification(args.data, "train"), load_classification(args.data, "validation")
    held_out, rest = harness.split_sentences(train["sentence"], args.held_out, args.min_words)
    rows = harness.shuffled(rest, job["seed"])

    def batches(n: int) -> list[dict[str, Any]]:
        return text_batches([train[i]["sentence"] for i in rows[:n]], tokenizer)

    result: harness.Result = {}
    if job["method"] != "dense":
        config = PruningConfig(**settings_for(job["method"], job["amount"]))
        calibration = batches(args.sentences) if config.needs_data else None
        polish_data = batches(args.polish_sentences) if config.polish is not None else None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        if job["method"] == "torch L1":
            torch_l1(model, config)
        else:
            prune(model, config, calibration=calibration, polish_data=polish_data)
        result["seconds"] = time.perf_counter() - start
        result["memory"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        result["of all Linears"] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    else:
        plan = make_plan(model, PruningConfig(0.5, target_modules=ENCODER))
        result |= {"weights": len(plan.tensors), "prunable": plan.target_parameters, "all": plan.total_parameters}
        result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return result | harness.score_splits(model, tokenizer, dev, train.select(held_out))


def torch_l1(model: Any, config: Any) -> None:
    """The baseline: torch.nn.utils.prune on the same modules."""
    from torch.nn.utils import prune as torch_prune

    from hf_prune.planning.targets import resolve_targets

    modules = dict(model.named_modules())
    for target in resolve_targets(model, config):
        torch_prune.l1_unstructured(modules[target.module], "weight", amount=config.sparsity)
        torch_prune.remove(modules[target.module], "weight")


# --- all of them --------------------------------------------------------------------------------------


class Table:
    """All results as a table of methods by amounts.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = harness.Results(args.out)

    def job(self, method: str, amount: str, seed: int) -> dict[str, Any]:
        """What identifies a measurement."""
        names = ("sentences", "min_words", "held_out", *(("polish_sentences",) if "polish" in method else ()))
        settings = {name: getattr(self.args, name) for name in names}
        model, data = Path(self.args.model).resolve().name, Path(self.args.data).resolve().name
        return {"method": method, "amount": amount, "seed": seed, "model": model, "data": data, **settings}

    def jobs(self) -> Iterator[dict[str, Any]]:
        """All measurements but that of the dense model."""
        for seed in range(self.args.seeds):
            for method in self.args.methods:
                for amount in self.args.amounts:
                    repeats = seed > 0 and method in ("torch L1", "magnitude")  # their result has no seed
                    if not repeats and (method != "torch L1" or is_number(amount)):
                        yield self.job(method, amount, seed)

    def cell(self, method: str, amount: str) -> list[harness.Result]:
        """The results of all seeds."""
        results = [self.results.get(self.job(method, amount, seed)) for seed in range(self.args.seeds)]
        return [result for result in results if result is not None]

    def line(self, job: harness.Job, result: harness.Result) -> str:
        """A line about a new result."""
        method, amount = job["method"], job["amount"]
        drop, error = self.drop(method, amount)
        held_out, _ = self.drop(method, amount, "held out")
        return (
            f"{method:36} {amount:>8} seed {job['seed']}: drop {drop:5.2f} ± {error:.2f}, held out {held_out:5.2f}; "
            f"{result['seconds']:.1f} s"
        )

    def drop(self, method: str, amount: str, data: str = "dev") -> tuple[float, float]:
        """Mean drop over the seeds, in points, and its paired standard error."""
        return harness.paired_drop(
            self.cell("dense", "0")[0][data], [result[data] for result in self.cell(method, amount)]
        )

    def __str__(self) -> str:
        from hf_prune.utils.formatting import format_table

        amounts, dense = self.args.amounts, self.cell("dense", "0")[0]
        lines = []
        for data, title in (("dev", "dev"), ("held out", "held-out training sentences")):
            rows = []
            for method in self.args.methods:
                cells = [self.cell(method, amount) for amount in amounts]
                if not any(cells):
                    continue
                results = [result for cell in cells for result in cell]
                row = [method, str(max(map(len, cells)))]
                for amount, cell in zip(amounts, cells, strict=True):
                    row.append("{:.2f} ± {:.2f}".format(*self.drop(method, amount, data)) if cell else "-")
                row.append(f"{statistics.median(r['seconds'] for r in results):.1f} s")
                row.append(f"{max(r['memory'] for r in results) / 1e6:.0f} MB")
                rows.append(row)
            score = harness.accuracy(dense[data])
            lines.append(f"drop in points on {title}; dense: {score:.2f} of {len(dense[data])}")
            lines.append(format_table(["", "seeds", *amounts, "median time", "most memory"], rows, left=1) + "\n")
        share = dense["prunable"]
        lines.append(
            f"{share:,} weights of {dense['weights']} Linears are pruned, {100 * share / dense['all']:.1f} % of all "
            f"parameters; {dense['threads']} thread(s), torch {dense['torch']}; {self.args.sentences} calibration "
            f"sentences of at least {self.args.min_words} words"
        )
        for amount in amounts:
            for result in self.cell("magnitude", amount)[:1]:
                lines.append(f"{amount} of these is {100 * result['of all Linears']:.1f} % of all Linears.")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Accuracy on dev against sparsity, a line a method."""
        dense = self.cell("dense", "0")[0]["dev"]
        amounts = [amount for amount in self.args.amounts if is_number(amount)]
        curves = {
            method: [(100 * float(a), *self.drop(method, a)) for a in amounts if self.cell(method, a)]
            for method in self.args.methods
        }
        harness.draw_curves(
            path,
            harness.accuracy(dense),
            curves,
            "share of the encoder's weights that is zero, %",
            f"accuracy on SST-2 dev, % (n = {len(dense)})",
        )


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
