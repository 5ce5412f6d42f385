"""Accuracy of pruning in one shot: methods by sparsities, on unlabelled sentences, without training.

The encoder's Linears are pruned (pooler and classifier are left alone), with 30 to 90 % of the weights, N:M, or blocks
(``16x1@0.5`` is half of the blocks of 16 outputs by 1 input). Every measurement runs in a process of its own
(``_measure.py`` says what seconds and memory count) and is appended to a file at once. So an interrupted run goes on
where it stopped; a result serves only the very same job: model files, texts, settings, threads, version of torch.

Calibration sentences are drawn from the training split, by seed. A drop is the mean over the seeds. Its standard error
is the paired one over the scored sentences: for each sentence, whether the dense model is right minus the share of
seeds in which the pruned one is; the standard deviation of that, by the square root of the number of sentences. It says
how sure the drop is on other sentences with these seeds. What does not look at data has one seed.

``--held-out`` also scores training sentences that no seed calibrates on, whatever the number of seeds, nor any with
the same text. Choose methods on them: the dev split is for the report. Phrases of one sentence can be on both sides.

    python benchmarks/bench_accuracy.py MODEL_FOLDER DATA_FOLDER --min-words 12 --held-out 2000 --picture accuracy.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _measure import ENCODER, in_own_process
from _table import draw, drop, print_tables

import hf_prune
from hf_prune import PruningConfig, load_classification

# Settings of a PruningConfig; "sentences" is for a method that asks for another number of them.
METHODS: dict[str, dict[str, Any]] = {
    "torch L1": {},
    "magnitude": {},
    "magnitude + least squares": {"repair": "least_squares"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda + least squares": {"criterion": "wanda", "scope": "row", "repair": "least_squares"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt + least squares": {"criterion": "sparsegpt", "repair": "least_squares"},
    "alps": {"criterion": "alps"},
}
BEST = "alps"  # the method that --layers and --distilbert time
AMOUNTS = ("0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4:8", "16x1@0.5")
RESERVED = 0.25  # of the training sentences: held-out ones are drawn from these, calibration from the others


def config_for(method: str, amount: str) -> PruningConfig | None:
    """The config of one cell, or None where the method has no such thing.

    Args:
        method: A key of ``METHODS``.
        amount: A sparsity such as ``0.5``, N:M such as ``2:4``, or blocks with a sparsity such as ``16x1@0.5``.
    """
    settings = {key: value for key, value in METHODS[method].items() if key != "sentences"}
    if "@" in amount:
        block, amount = amount.split("@")
        settings["granularity"] = f"block:{block}"
    if ":" in amount:  # brings its own pools
        settings = {key: value for key, value in settings.items() if key not in ("scope", "allocation")}
        settings["granularity"] = amount
    else:
        settings["sparsity"] = float(amount)
    if method == "torch L1" and "granularity" in settings:
        return None
    return PruningConfig(**settings, target_modules=ENCODER)


class Texts:
    """The sentences of a run: training ones to calibrate on by seed, held-out ones and the dev split to score."""

    def __init__(self, folder: str, min_words: int, held_out: int) -> None:
        unique = {row["sentence"]: row["label"] for row in load_classification(folder, "train")}
        rows = [(text, label) for text, label in unique.items() if len(text.split()) >= min_words]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1_000_003)).tolist()
        reserved = int(RESERVED * len(rows))
        if held_out > reserved:
            raise SystemExit(f"--held-out {held_out}: at most {reserved} of these {len(rows)} training sentences")
        self.calibration = [rows[i][0] for i in order[reserved:]]
        self.score = {"dev": load_classification(folder, "validation")[:]}
        if held_out:
            chosen = [rows[i] for i in order[:held_out]]
            self.score["held_out"] = {"sentence": [t for t, _ in chosen], "label": [y for _, y in chosen]}

    def draw(self, seed: int, count: int) -> list[str]:
        """Calibration sentences; as many as there are, if there are fewer."""
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed))
        return [self.calibration[i] for i in order[:count].tolist()]


def digest(files: list[Path]) -> str:
    """Hash of what is in files."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


class Results:
    """Results by job, in a file of JSON lines that grows by one line a measurement."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "measurements.jsonl"
        self.known: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            self.known[record["key"]] = record
        files = sorted(p for p in Path(model).iterdir() if p.suffix in (".safetensors", ".json", ".txt"))
        self.model = digest(files)
        self.code = digest(sorted(Path(hf_prune.__file__).parent.rglob("*.py")))

    def get(self, job: dict[str, Any], **labels: Any) -> tuple[dict[str, Any], bool]:
        """The result of a job, and whether it was measured just now."""
        same = {**job, "model": self.model, "torch": torch.__version__}
        key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        if key in self.known:
            return self.known[key], False
        record = {"key": key, "code": self.code, **labels, "date": time.strftime("%Y-%m-%d"), **in_own_process(job)}
        with self.path.open("a+b") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
        self.known[key] = record
        return record, True


def measure(args: argparse.Namespace, texts: Texts) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    """The dense result, and those of every method and amount, one for each seed."""
    results = Results(args.out, args.model)
    job = {"model": args.model, "threads": args.threads, "score": texts.score, "calibration": []}
    dense, _ = results.get({**job, "config": None, "torch_l1": None}, method="dense")
    found: dict[str, dict[str, list[Any]]] = {method: {} for method in args.methods}
    for seed in range(args.seeds):  # a run that is interrupted has all cells of the first seeds
        for method in args.methods:
            for amount in args.amounts:
                config = config_for(method, amount)
                if config is None or (seed and not config.needs_data):
                    continue
                count = METHODS[method].get("sentences", args.sentences)
                task = {**job, "config": config.to_dict(), "torch_l1": None}
                if method == "torch L1":
                    task |= {"config": None, "torch_l1": config.sparsity}
                elif config.needs_data:
                    task["calibration"] = texts.draw(seed, count)
                result, new = results.get(task, method=method, amount=amount, seed=seed)
                found[method].setdefault(amount, []).append(result)
                if new:
                    points, _ = drop(dense, [result], "dev")
                    took = f"{result['seconds']:.1f} s"
                    print(f"{method:28} {amount:>8}  seed {seed}  drop {points:.2f}  {took}", flush=True)
    used = [result for cells in found.values() for cell in cells.values() for result in cell]
    if old := sum(result["code"] != results.code for result in used):
        print(f"{old} of {len(used)} results are of other code of hf_prune: pass another --out to measure anew")
    return dense, found


def time_random(threads: int, layers: list[int], distilbert: bool, sentences: int) -> None:
    """Time the best method on random weights and random token ids, 24 a sentence; half of the weights go."""
    stacks = [("bert", n) for n in layers] + [("distilbert", 6)] * distilbert
    config = PruningConfig(0.5, **METHODS[BEST], target_modules=ENCODER)
    ids = {"sentences": sentences, "length": 24}
    for kind, count in stacks:
        job = {"random": {"kind": kind, "layers": count}, "random_batches": ids, "threads": threads, "torch_l1": None}
        result = in_own_process({**job, "config": config.to_dict()})
        extra = "not measured" if result["extra_mib"] is None else f"{result['extra_mib']:.0f} MiB"
        seconds = result["seconds"]
        print(
            f"{BEST}, random {kind} of {count} layers: {seconds:.1f} s, {seconds / count:.2f} s a layer, {extra} extra"
        )


def main() -> None:
    """Measure what is missing, then print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a classifier")
    parser.add_argument("data", nargs="?", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS))
    parser.add_argument("--sentences", type=int, default=512, help="to calibrate on")
    parser.add_argument("--min-words", type=int, default=0, help="of training sentences; shorter ones are not drawn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="training sentences to score as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"), help="folder of the measurements")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a README")
    parser.add_argument("--picture", type=Path, help="where to draw accuracy against sparsity, such as accuracy.png")
    parser.add_argument("--layers", type=int, nargs="*", help="only time stacks of so many layers, by default 3 6 12")
    parser.add_argument("--distilbert", action="store_true", help="only time a model of DistilBERT's size")
    args = parser.parse_args()
    if args.layers is not None or args.distilbert:
        layers = [] if args.layers is None else args.layers or [3, 6, 12]
        time_random(args.threads, layers, args.distilbert, args.sentences)
        return
    if args.data is None:
        parser.error("expected the folders of a model and of its data")
    dense, found = measure(args, Texts(args.data, args.min_words, args.held_out))
    print_tables(args, dense, found)
    if args.picture:
        draw(args.picture, Path(args.model).resolve().name, dense, found)
    spent = [r["seconds"] for cells in found.values() for results in cells.values() for r in results]
    print(f"\npruning took {statistics.fsum(spent):.0f} s in all")


if __name__ == "__main__":
    main()
