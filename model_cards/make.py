"""Make the cards in this folder: prune, score, time, and keep what was measured as card.json and the card itself.

    python model_cards/make.py MODEL DATA [NAME ...]

MODEL is a classifier's folder, DATA a folder with train and dev files. Weights are not kept. A test renders each
card.json again and compares.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_prune import read_card_data, render_card

HERE = Path(__file__).parent
BEST = ["--criterion", "alps", "--objective", "loss", "--allocation", "fisher", "--repair", "least_squares"]
UNITS = ["--granularity", "head,neuron", "--criterion", "fisher", "--repair", "least_squares"]
RUNS = {
    "minilm-sst2-magnitude-30": ["--sparsity", "0.3"],
    "minilm-sst2-magnitude-50": ["--sparsity", "0.5"],
    "minilm-sst2-best-80": ["--sparsity", "0.8", *BEST, "--calibration-samples", "512"],
    "minilm-sst2-2x": [*UNITS, "--target-speedup", "2", "--workload", "1x64", "--calibration-samples", "512"],
}


def run(*words: str) -> str:
    """A command's output."""
    return subprocess.run(
        [sys.executable, "-m", "hf_prune", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def make(name: str, model: str, data: str) -> None:
    """One card."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        options = RUNS[name]
        plots = [] if "--target-speedup" in options else ["--plots"]
        run("prune", model, *options, "--data", data, "--threads", "1", "--out", str(folder), *plots)
        scores = json.loads(run("evaluate", str(folder), "--against", model, "--data", data, "--json"))
        options = [f'"{word}"' if " " in word else word for word in options]
        facts = read_card_data(
            folder,
            name=name,
            evaluation=scores,
            dataset="stanfordnlp/sst2",
            command=f"hf-prune prune MODEL {' '.join(options)} --data glue/sst2 --threads 1 --out {name}",
        )
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for picture in facts.pictures:
            shutil.copy(folder / picture, out)
        values = facts.to_dict()
        for part in ("evaluation", "dense"):
            values["evaluation"][part]["source"] = "glue/sst2"
        values["evaluation"] = {k: v for k, v in values["evaluation"].items() if k not in ("model", "against")}
        (out / "card.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        (out / "README.md").write_text(render_card(type(facts).from_dict(values)))


def main() -> None:
    """All, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("names", nargs="*", default=list(RUNS))
    args = parser.parse_args()
    for name in args.names:
        make(name, args.model, args.data)
        print(f"{HERE / name}/README.md")


if __name__ == "__main__":
    main()
