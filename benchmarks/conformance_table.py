"""Write the results of :mod:`benchmarks.conformance` as ``architectures.md`` and ``architectures.json``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conformance_checks import UNITS

Result = Mapping[str, Any]
_ROUND_TRIPS = ("dense", "compressed", "2:4")
_MARKS = {"passed": "yes", "refused": "–", "failed": "**no**", "took": "slow"}

_INTRO = """# Architectures

Every model type that `AutoModel` of transformers {version} maps, built small from its config class (a few layers with
each kind of block, widths of 64 to 192), and what hf_prune does with it. Search this page for a `model_type`, the one
in a model's `config.json`. Written by `python -m benchmarks.conformance`; the numbers behind it are in
[architectures.json](architectures.json).

| | types |
|---|---|
{counts}

* **weights**: the share of the weights in matrices that the default targets prune, without those left dense by choice:
  routers, depthwise convolutions, and convolutions that read pixels or samples. Embeddings are not counted.
* **saved**: pruned by half, saved, and read by plain `from_pretrained` bit for bit: dense, compressed, and compressed
  after 2:4.
* **training**: two steps of AdamW, after which every removed weight is zero and others have moved.
* **heads, neurons, layers, experts**: a part of them removed; the masked, the shrunk and the reloaded model give the
  same outputs. "–" is a refusal in one sentence, with the model unchanged;
  an empty cell was not measured, and "slow" took more time or memory than the run allows.
"""


def write_tables(results: Sequence[Result], folder: Path) -> None:
    """Write both files.

    Args:
        results: Of all types.
        folder: Where to.
    """
    import transformers

    ordered = sorted(results, key=lambda r: r["type"])
    built = [r for r in ordered if r["built"]]
    counts = "\n".join(f"| {what} | {number} |" for what, number in count(ordered).items())
    lines = [_INTRO.format(version=transformers.__version__, counts=counts)]
    lines += ["| model_type | weights | saved | training | heads | neurons | layers | experts |", "|---" * 8 + "|"]
    lines += [_row(result) for result in built]
    lines += _uncovered(built) + _faults(built) + _not_built(ordered)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "architectures.md").write_text("\n".join(lines) + "\n")
    kept = [{k: v for k, v in r.items() if k != "seconds"} for r in ordered]
    text = ",\n".join(json.dumps(result) for result in kept)
    (folder / "architectures.json").write_text(f"[\n{text}\n]\n")


def count(results: Sequence[Result]) -> dict[str, int]:
    """How many types there are of each kind."""
    built = [r for r in results if r["built"]]
    passed = Counter(name for r in built for name, text in r["checks"].items() if text == "passed")
    whole = {"that `AutoModel` maps": len(results), "built small and run": len(built)}
    if slow := sum(str(r.get("reason")).startswith("took more") for r in results):
        whole["took more time or memory than the run allows"] = slow
    weighed = [r for r in built if share(r) is not None]
    whole["with weights in matrices that are not dense by choice"] = len(weighed)
    whole["default targets prune at least 95 % of these"] = sum(_known_share(r) >= 0.95 for r in weighed)
    whole["dense checkpoint reloads bit for bit"] = passed["dense"]
    whole["compressed checkpoint reloads bit for bit"] = passed["compressed"]
    whole["2:4, compressed, reloads bit for bit"] = passed["2:4"]
    whole["training keeps the zeros"] = passed["training"]
    whole["heads, neurons, layers or experts can be removed"] = sum(
        any(r["checks"].get(kind) == "passed" for kind in UNITS) for r in built
    )
    for kind in UNITS:
        measured = sum(kind in r["checks"] for r in built)
        whole[f"{kind}s can be removed" + ("" if measured == len(built) else f" (of {measured} measured)")] = passed[
            kind
        ]
    return whole


def share(result: Result) -> float | None:
    """The share of the weights that the default targets cover, without those left dense by choice; None if none is."""
    total = result["matrices"] - result["dense_by_choice"]
    return float(result["covered"] / total) if total else None


def _known_share(result: Result) -> float:
    known = share(result)
    return 1.0 if known is None else known


def _row(result: Result) -> str:
    checks = result["checks"]
    saved = {_mark(checks.get(name)) for name in _ROUND_TRIPS}
    cells = [
        f"`{result['type']}`",
        "–" if share(result) is None else f"{100 * _known_share(result):.0f} %",
        saved.pop() if len(saved) == 1 else "in part",
    ]
    return "| " + " | ".join([*cells, *(_mark(checks.get(name)) for name in ("training", *UNITS))]) + " |"


def _mark(text: str | None) -> str:
    return "" if text is None else _MARKS[re.split("[ :]", text, maxsplit=1)[0]]


def _uncovered(built: Sequence[Result]) -> list[str]:
    low = sorted((r for r in built if _known_share(r) < 0.95), key=_known_share)
    lines = ["", "## What the default targets leave out", "", "Types below 95 %, with the largest weight left out.", ""]
    lines += ["| model_type | weights | largest left out |", "|---|---|---|"]
    return lines + [f"| `{r['type']}` | {100 * _known_share(r):.0f} % | `{r['largest_uncovered']}` |" for r in low]


def _faults(built: Sequence[Result]) -> list[str]:
    """What failed, and refusals other than those of removing units."""
    lines = ["", "## What does not work", ""]
    for r in built:
        for name, text in r["checks"].items():
            if text.startswith("failed") or (text.startswith("refused") and name not in UNITS):
                lines.append(f"* `{r['type']}`, {name}: {_one_sentence(text)}")
    return lines if len(lines) > 3 else [*lines, "Nothing that was checked."]


def _not_built(results: Sequence[Result]) -> list[str]:
    lines = [
        "",
        "## Not built",
        "",
        "Types of which no small model was built, none that ran, or none within the time and memory of the run.",
        "",
    ]
    return lines + [f"* `{r['type']}`: {_one_sentence(r['reason'])}" for r in results if not r["built"]]


def _one_sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= 240 else text[:237] + "…"
