"""Whether presets keep their order on other models: two small ones that this script trains in minutes.

*distilbert*: 4 layers of width 256, trained from random weights on the training sentences of DATA (columns sentence and
label) but for 4,000 that are held out, which share no five words in a row with any that calibration draws from. It is
trained on phrases of them, though, where the data have such, so the accuracy of the dense model is no result.
*vit*: 4 layers of width 128 on the 1,797 images of 8 x 8 pixels that scikit-learn ships (handwritten digits, from the
UCI repository), of which 797 are held out. Methods see 512 sentences or 512 images of the training data, unlabelled.

Every measurement runs in a process of its own and is a line of OUT/results.jsonl: an interrupted run continues. The
tables have the mean Kullback-Leibler divergence from the dense model on what is held out, the share of answers that
changed, and the drop of the accuracy, all with standard errors; several seeds draw other calibration data.

    python benchmarks/bench_families.py DATA TOKENIZER --out families
    python benchmarks/bench_families.py DATA TOKENIZER --out families --table
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import ruler

METHODS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "wanda + least squares": {"criterion": "wanda", "scope": "row", "repair": "least_squares"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
}
AMOUNTS = ("0.5", "0.7", "0.8", "0.9", "2:4")
FAMILIES = ("distilbert", "vit")
HELD_OUT = {"distilbert": 4000, "vit": 797}
MIN_WORDS = 15  # of a calibration sentence
CALIBRATION = 512


def main() -> None:
    """Train what is not trained yet, measure what has not been measured, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("tokenizer", help="folder of an uncased WordPiece tokenizer, such as DistilBERT's")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="of the training of a model, 32 examples each")
    parser.add_argument("--out", type=Path, default=Path("families"), help="folder for models and results")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if harness.is_child(args, measure):
        return
    results = harness.Results(args.out)
    results.measure([] if args.table else jobs(args), describe)
    print(table(args, results))


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each measurement; the dense model comes first."""
    for family in args.families:
        base = {"family": family, "steps": args.steps}
        yield {**base, "method": "dense", "amount": "", "seed": 0}
        for amount in args.amounts:
            for method in args.methods:
                for seed in range(1 if method == "fast" else args.seeds):
                    yield {**base, "method": method, "amount": amount, "seed": seed}


def describe(job: harness.Job, result: harness.Result) -> str:
    """A line about a new result."""
    right = harness.accuracy(result["held out"]["right"])
    return f"{job['family']} {job['method']} {job['amount']} seed {job['seed']}: {right:.2f} % right"


def measure(args: argparse.Namespace, job: harness.Job) -> harness.Result:
    """Prune once, and score; the job of the dense model trains it first, and writes it for the others."""
    import torch

    from hf_prune import PruningConfig, prune

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    family = {"distilbert": Sentences, "vit": Digits}[job["family"]](args)
    folder = args.out / f"{job['family']}-{job['steps']}"
    if job["method"] == "dense":
        model = family.new()
        train(model, family, job["steps"])
        model.save_pretrained(folder)
    model = type(family.new()).from_pretrained(folder).eval()
    result: harness.Result = {}
    if job["method"] != "dense":
        amount = job["amount"]
        size: dict[str, Any] = {"granularity": amount} if ":" in amount else {"sparsity": float(amount)}
        settings = METHODS[job["method"]]
        if ":" in amount:
            settings = {name: value for name, value in settings.items() if name != "scope"}
        config = PruningConfig(**settings, **size)
        start = time.process_time()
        prune(model, config, calibration=family.calibration(job["seed"]) if config.needs_data else None)
        result["seconds"] = time.process_time() - start
    return result | {"held out": family.score(model)}


def train(model: Any, family: Any, steps: int) -> None:
    """AdamW with a rate that rises for a tenth of the steps to 5e-4 and falls to zero."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    warmup = max(1, steps // 10)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        loss = model(**family.examples(torch.randint(family.size, (32,), generator=generator).tolist())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    model.eval()


class Sentences:
    """A DistilBERT and the sentences that it is trained, calibrated and scored on."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        from hf_prune import load_classification

        self._tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self._train = load_classification(args.data, "train")
        self._held, self._pool = ruler.split_rows(self._train["sentence"], HELD_OUT["distilbert"], MIN_WORDS)
        held = set(self._held)
        self._rows = [row for row in range(len(self._train)) if row not in held]
        self.size = len(self._rows)

    def new(self) -> Any:
        """A model with random weights."""
        import torch
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        torch.manual_seed(0)
        sizes = {"n_layers": 4, "dim": 256, "hidden_dim": 1024, "n_heads": 4, "max_position_embeddings": 128}
        return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(self._tokenizer), **sizes))

    def examples(self, numbers: list[int]) -> dict[str, Any]:
        """A labelled batch of training sentences."""
        import torch

        rows = [self._train[self._rows[number]] for number in numbers]
        texts = [row["sentence"] for row in rows]
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = torch.tensor([row["label"] for row in rows])
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}

    def calibration(self, seed: int) -> list[dict[str, Any]]:
        """Unlabelled batches."""
        from hf_prune import text_batches

        rows = harness.shuffled(self._pool, seed)[:CALIBRATION]
        return text_batches([self._train[row]["sentence"] for row in rows], self._tokenizer)

    def score(self, model: Any) -> Any:
        """What it predicts for the sentences that are held out."""
        return ruler.score(model, self._tokenizer, data=self._train.select(self._held))["data"]


class Digits:
    """A ViT and the images that it is trained, calibrated and scored on."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self._images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1  # -1 to 1
        self._labels = torch.tensor(digits.target)[order]
        self.size = len(order) - HELD_OUT["vit"]

    def new(self) -> Any:
        """A model with random weights."""
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        image = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
        return ViTForImageClassification(ViTConfig(**image, **sizes))

    def examples(self, numbers: list[int]) -> dict[str, Any]:
        """A labelled batch of training images."""
        return {"pixel_values": self._images[numbers], "labels": self._labels[numbers]}

    def calibration(self, seed: int) -> list[dict[str, Any]]:
        """Unlabelled batches."""
        rows = harness.shuffled(range(self.size), seed)[:CALIBRATION]
        return [{"pixel_values": self._images[rows[i : i + 32]]} for i in range(0, len(rows), 32)]

    def score(self, model: Any) -> Any:
        """What it predicts for the images that are held out."""
        import torch

        with torch.no_grad():
            logits = model(pixel_values=self._images[self.size :]).logits
        return ruler.predictions(logits.log_softmax(-1), self._labels[self.size :].tolist())


def table(args: argparse.Namespace, results: harness.Results) -> str:
    """What has been measured, as text."""
    from hf_prune.utils.formatting import format_table

    texts = []
    for family in args.families:
        dense = results.where(family=family, steps=args.steps, method="dense")
        if not dense:
            continue
        right = harness.accuracy(dense[0]["held out"]["right"])
        for quantity, what, digits in (
            ("kl", "KL divergence from the dense model, nats", 4),
            ("flips", "answers that changed, %", 2),
            ("drop", "drop of the accuracy, points", 2),
        ):
            rows = []
            for method in args.methods:
                cells, seconds = [], []
                for amount in args.amounts:
                    runs = results.where(family=family, steps=args.steps, method=method, amount=amount)
                    scored = ruler.Scored(dense[0]["held out"], [run["held out"] for run in runs]) if runs else None
                    cells.append("-" if scored is None else scored.mean(quantity).text(digits))
                    seconds += [run["seconds"] for run in runs]
                rows.append([method, *cells, f"{max(seconds, default=0):.0f} s"])
            title = f"{family}: {what}; dense: {right:.2f} % of {HELD_OUT[family]:,} are right"
            texts.append(f"{title}\n{format_table(['', *args.amounts, 'most CPU'], rows, left=1)}")
    return "\n\n".join(texts)


if __name__ == "__main__":
    main()
