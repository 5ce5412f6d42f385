"""What pruning in one shot costs: methods by sparsities, calibrated on unlabelled training sentences, no training.

The Linears of the encoder are pruned (pooler and classifier are left alone); presets prune what they prune by default.
Methods are told apart on 10,000 training sentences that share no five words in a row with any that calibration or a
polish may see, by how far the predictions move from the dense model's: the mean Kullback-Leibler divergence, and the
share of answers that change. The accuracy on the dev split is only reported.

The seeds choose the calibration sentences, among training rows of a minimum length (most rows are phrases of a few
words). Methods without calibration do not depend on the seed. Standard errors add that over the sentences and that over
the seeds; differences between methods (``--against``) are paired by both.

Every measurement, a cell of the tables with a seed, runs in a process of its own and is a line of OUT/results.jsonl: an
interrupted run continues, and cells that are there are not measured again. Seconds are CPU seconds of the pruning,
calibration included. Memory is the growth of that process's largest resident size while it prunes.

    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --image docs/images/accuracy.png
    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --cells 'best* / 0.5' 'alps / 2:4'  # only these
    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --table --against alps   # print what there is
    python benchmarks/bench_accuracy.py MODEL DATA --out presets --sentences 128 --cells 'preset *'
    python benchmarks/bench_accuracy.py MODEL DATA --out accuracy --time     # layers, and a model of DistilBERT's size
"""

from __future__ import annotations

import argparse
import fnmatch
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
import ruler

ENCODER = r".*\b(layer|layers|h|block)\.\d+\..*"
BEST = {"criterion": "alps", "repair": "least_squares", "objective": "loss", "allocation": "fisher"}
DRAWN = (
    "magnitude",
    "wanda + least squares",
    "sparsegpt",
    "alps",
    "best: alps, fisher allocation, loss",
    "best + polish",
)
METHODS: dict[str, dict[str, Any]] = {
    "torch L1": {},
    "magnitude": {},
    "magnitude + least squares": {"repair": "least_squares"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda + least squares": {"criterion": "wanda", "scope": "row", "repair": "least_squares"},
    "fisher": {"criterion": "fisher", "scope": "global"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt, fisher allocation, loss": {"criterion": "sparsegpt", "objective": "loss", "allocation": "fisher"},
    "alps": {"criterion": "alps"},
    "alps, objective loss": {"criterion": "alps", "repair": "least_squares", "objective": "loss"},
    "alps, fisher allocation": {"criterion": "alps", "allocation": "fisher"},
    "alps, owl allocation, loss": {**BEST, "allocation": "owl"},
    "best: alps, fisher allocation, loss": BEST,
    "best + polish": {**BEST, "polish": "distill"},
}
AMOUNTS = ("0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "16x1 at 0.5")
PRESETS = tuple(f"preset {name}" for name in ("fast", "balanced", "best", "best+polish"))
PRESET_AMOUNTS = ("0.8", "0.6 of the parameters")
SEEDLESS = ("torch L1", "magnitude", "preset fast")  # their result does not depend on the seed
MEASURES = (  # of a table: split, what is measured, digits, title
    ("held out", "kl", 4, "KL divergence from the dense model, nats, on held-out sentences"),
    ("held out", "flips", 2, "answers that changed, %, on held-out sentences"),
    ("held out", "drop", 2, "drop of the accuracy in points, on held-out sentences"),
    ("dev", "drop", 2, "drop of the accuracy in points, on dev"),
)


def settings_for(method: str, amount: str) -> dict[str, Any]:
    """Fields of a config, for ``0.5``, ``2:4``, ``16x1 at 0.5`` (blocks) and ``0.6 of the parameters``."""
    settings = {"preset": method.removeprefix("preset ")} if method in PRESETS else dict(METHODS[method])
    if method not in PRESETS:
        settings["target_modules"] = ENCODER
    if amount.endswith("of the parameters"):
        return {**settings, "target_params": float(amount.split()[0])}
    if ":" in amount:  # brings its own pools and sparsity
        settings.pop("scope", None)
        settings.pop("allocation", None)
        return {**settings, "granularity": amount}
    block, _, sparsity = amount.rpartition(" at ")
    return {**settings, "sparsity": float(sparsity), **({"granularity": f"block:{block}"} if block else {})}


def main() -> None:
    parser = harness.classifier_parser(__doc__, out="accuracy", held_out=10_000)
    parser.add_argument("--cells", nargs="+", help="only cells whose 'METHOD / AMOUNT' fits one of these patterns")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--polish-sentences", type=int, default=ruler.POOL)
    parser.add_argument("--against", help="also print how much each method differs from this one")
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
    held_out, pool = ruler.split_rows(train["sentence"], args.held_out, args.min_words)
    rows = harness.shuffled(pool, job["seed"])

    def batches(n: int) -> list[dict[str, Any]]:
        return text_batches([train[i]["sentence"] for i in rows[:n]], tokenizer)

    result: harness.Result = {}
    if job["method"] != "dense":
        config = PruningConfig(**settings_for(job["method"], job["amount"]))
        calibration = batches(args.sentences) if config.needs_data else None
        polish_data = batches(args.polish_sentences) if config.polish is not None else None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        if job["method"] == "torch L1":
            torch_l1(model, config)
        else:
            prune(model, config, calibration=calibration, polish_data=polish_data)
        result["seconds"] = time.process_time() - start
        result["memory"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        result["of all Linears"] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    else:
        plan = make_plan(model, PruningConfig(0.5, target_modules=ENCODER))
        result |= {"weights": len(plan.tensors), "prunable": plan.target_parameters, "all": plan.total_parameters}
        result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return result | ruler.score(model, tokenizer, **{"dev": dev, "held out": train.select(held_out)})


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
    """All results as tables of methods by amounts.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = harness.Results(args.out)

    def job(self, method: str, amount: str, seed: int) -> dict[str, Any]:
        """What identifies a measurement."""
        names = ["min_words", "held_out"]
        names += ["sentences"] if method != "dense" else []
        names += ["polish_sentences"] if "polish" in method else []
        settings = {name: getattr(self.args, name) for name in names}
        model, data = Path(self.args.model).resolve().name, Path(self.args.data).resolve().name
        return {"method": method, "amount": amount, "seed": seed, "model": model, "data": data, **settings}

    def cells(self) -> list[tuple[str, str]]:
        """Methods and amounts of the tables, as far as they were asked for; presets only if they were."""
        every = [(m, a) for m in METHODS for a in AMOUNTS if m != "torch L1" or a.replace(".", "", 1).isdigit()]
        if (patterns := self.args.cells) is None:
            return every
        every += [(m, a) for m in PRESETS for a in PRESET_AMOUNTS]
        return [cell for cell in every if any(fnmatch.fnmatch(" / ".join(cell), pattern) for pattern in patterns)]

    def jobs(self) -> Iterator[dict[str, Any]]:
        """All measurements but that of the dense model."""
        for seed in range(self.args.seeds):
            for method, amount in self.cells():
                if seed == 0 or method not in SEEDLESS:
                    yield self.job(method, amount, seed)

    def runs(self, method: str, amount: str) -> list[harness.Result]:
        """The results of all seeds."""
        results = [self.results.get(self.job(method, amount, seed)) for seed in range(self.args.seeds)]
        return [result for result in results if result is not None]

    def scored(self, method: str, amount: str, split: str) -> ruler.Scored | None:
        """What a method predicts on a split; None if it was not measured."""
        dense, runs = self.runs("dense", "0")[0], self.runs(method, amount)
        return ruler.Scored(dense[split], [run[split] for run in runs]) if runs else None

    def line(self, job: harness.Job, result: harness.Result) -> str:
        """A line about a new result."""
        scored = self.scored(job["method"], job["amount"], "held out")
        assert scored is not None
        texts = [f"{measure} {scored.mean(measure).text(digits)}" for _, measure, digits, _ in MEASURES[:3]]
        return f"{job['method']} / {job['amount']}, seed {job['seed']}: {', '.join(texts)}; {result['seconds']:.1f} s"

    def __str__(self) -> str:
        from hf_prune.utils.formatting import format_table

        dense, lines, cells = self.runs("dense", "0")[0], [], self.cells()
        methods, amounts = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
        for split, what, digits, title in MEASURES:
            rows = []
            for method in methods:
                scored = [self.scored(method, amount, split) for amount in amounts]
                results = [result for amount in amounts for result in self.runs(method, amount)]
                if not results:
                    continue
                texts = ["-" if s is None else s.mean(what).text(digits) for s in scored]
                seconds = f"{statistics.median(r['seconds'] for r in results):.0f} s"
                memory = f"{max(r['memory'] for r in results) / 1e6:.0f} MB"
                seeds = str(max(len(self.runs(method, amount)) for amount in amounts))
                rows.append([method, seeds, *texts, seconds, memory])
            right = harness.accuracy(dense[split]["right"])
            lines.append(f"{title}; dense: {right:.2f} % of {len(dense[split]['right']):,} are right")
            lines.append(format_table(["", "seeds", *amounts, "median CPU", "most memory"], rows, left=1) + "\n")
        lines += self.differences(cells) if self.args.against else []
        share = dense["prunable"]
        lines.append(
            f"{share:,} weights of {dense['weights']} Linears are pruned, {100 * share / dense['all']:.1f} % of all "
            f"parameters; {dense['threads']} thread(s), torch {dense['torch']}; {self.args.sentences} calibration "
            f"sentences of at least {self.args.min_words} words"
        )
        for amount in amounts:
            for result in self.runs("magnitude", amount)[:1]:
                lines.append(f"{amount} of these is {100 * result['of all Linears']:.1f} % of all Linears.")
        return "\n".join(lines)

    def differences(self, cells: list[tuple[str, str]]) -> list[str]:
        """How much each method differs from ``--against``, paired; below zero is better."""
        lines = [f"minus {self.args.against}, paired by sentence and seed, on held-out sentences; below 0 is better"]
        for method, amount in cells:
            mine, other = (self.scored(name, amount, "held out") for name in (method, self.args.against))
            if method != self.args.against and mine is not None and other is not None:
                texts = [f"{what} {mine.minus(other, what).text(digits)}" for _, what, digits, _ in MEASURES[:3]]
                lines.append(f"{method} / {amount}: {', '.join(texts)}")
        return [*lines, ""]

    def draw(self, path: Path) -> None:
        """Accuracy on dev against sparsity, a line a method."""
        dense = self.runs("dense", "0")[0]["dev"]["right"]
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for method, amount in self.cells():
            scored = self.scored(method, amount, "dev") if amount.startswith("0.") else None
            if scored is not None and method in DRAWN:
                curves.setdefault(method, []).append((100 * float(amount), *scored.mean("drop")))
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
