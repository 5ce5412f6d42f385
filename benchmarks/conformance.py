"""Build every model type that the installed transformers can build small, and check what hf_prune does with it.

Each type is measured in a process of its own, forked from one that has imported everything, with limits of memory and
time. Results are written after each type, and types that have a result are not measured again.

    python -m benchmarks.conformance --out conformance          # all types, about half an hour on one core
    python -m benchmarks.conformance --out conformance --only bert mixtral
    python -m benchmarks.conformance --out conformance --docs docs   # only write the tables from what was measured
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
CHECKS = ("dense", "compressed", "2:4", "training", "head", "neuron", "layer", "expert")
WARM_UP = ("bert", "llama", "mixtral", "vit", "resnet", "whisper", "llava")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("conformance"), help="folder of results.jsonl")
    parser.add_argument("--only", nargs="+", help="model types")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS, help="checks, in this order")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=60, help="most time for a type")
    parser.add_argument("--gigabytes", type=int, default=8, help="most memory for a type")
    parser.add_argument("--again", action="store_true", help="measure also what has a result")
    parser.add_argument("--docs", type=Path, help="only write architectures.md and architectures.json to this folder")
    args = parser.parse_args()
    results = read_results(args.out)
    if args.docs is None:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        types = {
            model_type: tuple(c for c in args.checks if args.again or c not in _measured(results.get(model_type)))
            for model_type in args.only or MODEL_MAPPING_NAMES
        }
        types = {model_type: checks for model_type, checks in types.items() if checks}
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "results.jsonl").open("a") as file:
            for number, result in enumerate(run(types, args.jobs, args.seconds, args.gigabytes), 1):
                file.write(json.dumps(result) + "\n")
                file.flush()
                print(f"{number}/{len(types)} {result['type']}: {summary(result)}", flush=True)
    else:
        from benchmarks.conformance_table import write_tables

        write_tables(list(results.values()), args.docs)


def read_results(folder: Path) -> dict[str, Result]:
    """The results of each type in a folder: the last of each check."""
    path = folder / "results.jsonl"
    results: dict[str, Result] = {}
    for result in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        earlier = results.get(result["type"], {})
        results[result["type"]] = {**result, "checks": {**earlier.get("checks", {}), **result.get("checks", {})}}
    return results


def _measured(result: Result | None) -> Container[str]:
    """The checks that need no measuring: those that were made, and all of a type that cannot be built."""
    return () if result is None else result["checks"] if result["built"] else CHECKS


def summary(result: Result) -> str:
    """One result in a line."""
    if not result["built"]:
        return f"not built: {result['reason'][:100]}"
    share = result["covered"] / max(1, result["matrices"] - result["dense_by_choice"])
    bad = [f"{name}: {text[:90]}" for name, text in result["checks"].items() if text.startswith(("failed", "took"))]
    return f"{share:.0%} covered, {result['seconds']:.1f} s{'; ' if bad else ''}{'; '.join(bad)}"


def run(
    types: Mapping[str, Sequence[str]], jobs: int, seconds: int, gigabytes: int, warm_up: Sequence[str] = WARM_UP
) -> Iterator[Result]:
    """Measure types, each in a process forked from this one.

    Args:
        types: Checks by model type.
        jobs: Processes at a time.
        seconds: Most time for a type.
        gigabytes: Most memory for a type.
        warm_up: Types that are measured before, so that the others find what they need imported.

    Yields:
        Results, in the order in which they are ready. Of a process that a limit ends, those of the checks that it had
        made, and which one it was at; those after it are left out.
    """
    _preload(warm_up)
    context = multiprocessing.get_context("fork")
    waiting, running, made = list(types), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            checks = types[waiting[0]]
            process = context.Process(target=_child, args=(waiting[0], checks, sender, seconds, gigabytes))
            process.start()
            sender.close()
            running[process] = (receiver, time.monotonic())
            made[process] = {"type": waiting.pop(0), "built": False}
        for receiver in multiprocessing.connection.wait([r for r, _ in running.values()]):
            process = next(p for p, (r, _) in running.items() if r is receiver)
            try:
                made[process] = receiver.recv()
            except EOFError:
                process.join()
                _, start = running.pop(process)
                result = made.pop(process)
                if process.exitcode:
                    limit = f"took more than {seconds} s or {gigabytes} GB"
                    result = _cut_short(result, types[result["type"]], limit)
                yield {**result, "seconds": round(time.monotonic() - start, 1)}


def _cut_short(result: Result, checks: Sequence[str], limit: str) -> Result:
    """What is known of a type whose process was ended."""
    if not result["built"]:
        return {**result, "reason": limit}
    ended = [name for name in checks if name not in result["checks"]][:1]
    return {**result, "checks": {**result["checks"], **dict.fromkeys(ended, limit)}}


def _preload(warm_up: Sequence[str]) -> None:
    import torch
    import transformers

    from benchmarks import conformance_checks

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for model_type in warm_up:
        list(conformance_checks.measure(model_type))


def _child(model_type: str, checks: Sequence[str], sender: Any, seconds: int, gigabytes: int) -> None:
    from benchmarks.conformance_checks import measure

    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    for result in measure(model_type, checks):
        sender.send(result)


if __name__ == "__main__":
    main()
