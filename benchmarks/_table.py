"""The tables and the picture of ``bench_accuracy.py``."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_prune.plots import _COLOURS, _GREY, _MARKERS, _figure, save_figure
from hf_prune.tables import format_table


def right(result: dict[str, Any], data: str) -> list[bool]:
    """Sentence by sentence, whether a model was right."""
    return [p == y for p, y in zip(result[data]["predictions"], result[data]["labels"], strict=True)]


def drop(dense: dict[str, Any], results: list[dict[str, Any]], data: str) -> tuple[float, float]:
    """Drop in points, mean over the seeds, and its standard error, paired over the sentences."""
    seeds = [right(result, data) for result in results]
    lost = [d - statistics.mean(s) for d, s in zip(right(dense, data), zip(*seeds, strict=True), strict=True)]
    return 100 * statistics.mean(lost), 100 * statistics.stdev(lost) / math.sqrt(len(lost))


def agreement(dense: dict[str, Any], results: list[dict[str, Any]], data: str) -> float:
    """Percent of the sentences on which a pruned model says what the dense one does, mean over the seeds."""
    pairs = [zip(dense[data]["predictions"], result[data]["predictions"], strict=True) for result in results]
    return 100 * statistics.mean(statistics.mean(a == b for a, b in pair) for pair in pairs)


def header(args: argparse.Namespace, dense: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """What was measured, how, and what a sparsity refers to."""
    score = right(dense, "dev")
    weights, share = dense["encoder_weights"], 80 * dense["encoder_weights"]
    dates = sorted({result["date"] for result in results})
    lines = [
        f"{Path(args.model).resolve().name}: dense {100 * statistics.mean(score):.2f} % of {len(score)} dev sentences",
        f"{weights:,} weights in the {dense['encoder_linears']} encoder Linears can go: 80 % of them is "
        f"{share / dense['linear_weights']:.1f} % of all {dense['linears']} Linears and "
        f"{share / dense['parameters']:.1f} % of all {dense['parameters']:,} parameters",
        f"{args.sentences} calibration sentences of at least {args.min_words} words, without labels; "
        f"seeds 0 to {args.seeds - 1}; {args.threads} threads, torch {torch.__version__}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
    ]
    return "\n".join(lines)


def print_tables(
    args: argparse.Namespace, dense: dict[str, Any], found: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    """Drops on the dev split with times and memory; drops and agreement on held-out sentences, if there are any."""

    def cells(method: str, data: str) -> list[str]:
        shown = []
        for amount in args.amounts:
            if amount not in found[method]:
                shown.append("-")
                continue
            results = found[method][amount]
            points, error = drop(dense, results, data)
            text = f"{points:.2f} ± {error:.2f}"
            shown.append(f"{text}, {agreement(dense, results, data):.1f}" if data == "held_out" else text)
        return shown

    def costs(method: str) -> list[str]:
        results = [result for cell in found[method].values() for result in cell]
        seconds = [result["seconds"] for result in results]
        extra = [result["extra_mib"] for result in results]
        known = bool(extra) and None not in extra
        return [f"{statistics.median(seconds):.1f}" if seconds else "-", f"{max(extra):.0f}" if known else "-"]

    results = [result for cells in found.values() for cell in cells.values() for result in cell]
    print(f"\n{header(args, dense, [dense, *results])}\n")
    print("Drop in points of accuracy on the dev split ± its paired standard error; median seconds; most extra MiB\n")
    titles = ["drop in points", *(named(amount) for amount in args.amounts)]
    show = markdown if args.markdown else format_table
    print(show([*titles, "seconds", "MiB"], [[method, *cells(method, "dev"), *costs(method)] for method in found]))
    if "held_out" in dense:
        score = right(dense, "held_out")
        print(f"\nOn {len(score)} held-out training sentences: the drop, and percent of predictions as before;")
        print(f"dense {100 * statistics.mean(score):.2f} %\n")
        print(show(titles, [[method, *cells(method, "held_out")] for method in found]))


def named(amount: str) -> str:
    """How a table's header spells an amount."""
    if "@" in amount:
        block, share = amount.split("@")
        return f"{block} {100 * float(share):g} %"
    return amount if ":" in amount else f"{100 * float(amount):g} %"


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A table for a README, numbers on the right."""
    rule = ["---", *("---:" for _ in titles[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *rows])


def draw(path: Path, model: str, dense: dict[str, Any], found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Accuracy against unstructured sparsity on the dev split, a line a method, bars of one standard error."""
    base = 100 * statistics.mean(right(dense, "dev"))
    figure, axes = _figure(8.0, 5.0)
    axes.axhline(base, color=_GREY, linestyle="--", linewidth=1.2, label=f"dense: {base:.2f} %")
    lines = {m: sorted(float(a) for a in cells if a.replace(".", "").isdigit()) for m, cells in found.items()}
    lines = {method: amounts for method, amounts in lines.items() if amounts}
    spelt = {float(a): a for cells in found.values() for a in cells if a.replace(".", "").isdigit()}
    for i, (method, amounts) in enumerate(lines.items()):
        points = [drop(dense, found[method][spelt[amount]], "dev") for amount in amounts]
        shift = 0.25 * (i - (len(lines) - 1) / 2)  # so that bars stand side by side
        axes.errorbar(
            [100 * amount + shift for amount in amounts],
            [base - lost for lost, _ in points],
            yerr=[error for _, error in points],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle=("-", "--", ":")[i // len(_COLOURS) % 3],
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=method,
        )
    axes.set(xlabel="sparsity of the encoder's Linears (%)", ylabel="accuracy (%)")
    count = len(dense["dev"]["labels"])
    axes.set_title(
        f"{model}: pruned in one shot, without labels or training\n{count} dev sentences, ± 1 standard error",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    save_figure(figure, path)
