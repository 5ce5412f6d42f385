"""Our sparsegpt beside a straightforward transcription of the published algorithm: error and time of a layer.

The layers have the shapes of MiniLM and DistilBERT. With a model and its data, Gram matrices and weights are those of
that model's first and last block, dense, on 512 training sentences; without, they are random, with correlated inputs.
Both take turns in one process, first one and then the other in turn; times are CPU time of the process.

    python benchmarks/bench_sparsegpt.py MODEL_FOLDER DATA_FOLDER --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.reference

from hf_prune import PruningConfig, load_classification, text_batches
from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria.base import WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.kernels.least_squares import layer_error
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning.selector import Selector
from hf_prune.utils.formatting import format_table
from tests.reference.sparsegpt import published_sparsegpt

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
POOLS = {"2:4": (2, 4), "4:8": (4, 8)}


def random_layers() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights and Gram matrices of correlated inputs whose sizes differ widely."""
    for rows, columns in SHAPES:
        generator = torch.Generator().manual_seed(columns)
        sizes = torch.randn(columns, generator=generator).exp()
        mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
        inputs = torch.randn(8192, columns, generator=generator) @ mix * sizes
        yield "random", torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / len(inputs)


def real_layers(model_folder: str, data_folder: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights and Gram matrices of a classifier: each shape once in the first block and once in the last."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    train = load_classification(data_folder, "train")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:512].tolist()
    batches = text_batches([train[i]["sentence"] for i in chosen], AutoTokenizer.from_pretrained(model_folder))
    last = model.config.num_hidden_layers - 1
    encoder = PruningConfig(0.5, "sparsegpt", target_modules=rf".*\blayers?\.(0|{last})\..*")
    plan = make_plan(model, encoder)
    stats = collect_stats(model, plan, batches)
    seen = set()
    for tensor in plan.tensors:
        name, shape = tensor.target.name, tensor.target.matrix_shape
        block = "first" if ".0." in name else "last"
        if (block, shape) not in seen:
            seen.add((block, shape))
            gram = stats[name].input_gram
            assert gram is not None
            yield f"{block} block", model.get_parameter(name).detach(), gram


def methods(weight: Tensor, gram: Tensor, amount: str) -> dict[str, Callable[[], Tensor]]:
    """What prune() does with one layer once it has the plan, and the transcription."""
    settings = {"granularity": amount} if amount in POOLS else {"sparsity": float(amount)}
    plan = make_plan(nn.Linear(*reversed(weight.shape), bias=False), PruningConfig(criterion="sparsegpt", **settings))
    select = Selector("sparsegpt", plan.tensors[0], plan.granularity)
    criterion, stats = CRITERIA.get("sparsegpt")(), WeightStats(0, input_gram=gram)
    pool, sparsity = POOLS.get(amount), plan.config.sparsity
    assert sparsity is not None
    return {
        "ours": lambda: criterion.prune_weight(weight, stats, select)[1],
        "published": lambda: published_sparsegpt(weight, gram, sparsity, pool=pool)[1],
    }


@torch.no_grad()
def main() -> None:
    """Measure and print, better or not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a classifier")
    parser.add_argument("data", nargs="?", help="folder with a train split")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.8", "2:4"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers = random_layers() if args.data is None else real_layers(args.model, args.data)
    rows = []
    for kind, weight, gram in layers:
        for amount in args.amounts:
            pair = methods(weight, gram, amount)
            seconds: dict[str, list[float]] = {name: [] for name in pair}
            errors = {}
            for turn in range(args.rounds + 1):
                for name in list(pair)[:: 1 if turn % 2 else -1]:
                    start = time.process_time()
                    new = pair[name]()
                    if turn:  # the first round warms up
                        seconds[name].append(time.process_time() - start)
                    errors[name] = float(layer_error(weight, new, gram))
            ratios = [a / b for a, b in zip(seconds["ours"], seconds["published"], strict=True)]
            times = [f"{statistics.median(seconds[name]):.3f}" for name in ("ours", "published")]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            ratio = [f"{errors['ours'] / errors['published']:.4f}", f"{statistics.median(ratios):.2f}", spread]
            rows.append([kind, "x".join(map(str, weight.shape)), amount, *times, *ratio])
            print(*rows[-1], flush=True)
    print(f"\nratios: ours by published; {args.rounds} rounds, {args.threads} threads, torch {torch.__version__}")
    titles = ["inputs", "layer", "removed", "ours, CPU s", "published", "error ratio", "time ratio", "range"]
    print(format_table(titles, rows, left=3))


if __name__ == "__main__":
    main()
