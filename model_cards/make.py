"""Make the cards in this folder: prune, score, time, and keep what was measured as card.json and the card itself.

    python model_cards/make.py CLASSIFIER DATA LANGUAGE_MODEL TEXTS [NAME ...] [--smollm2 FOLDER]

CLASSIFIER is a classifier's folder, DATA a folder with train and dev files, TEXTS one with train and test files. The
card of SmolLM2-135M-Instruct is made only with its folder.
Weights are not kept. A test renders each card.json again and compares.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_prune import read_card_data, render_card
from hf_prune.auto import load_native
from hf_prune.cli.workflows.example import example_of
from hf_prune.hub.describe import full_report

HERE = Path(__file__).parent
BEST = ["--criterion", "alps", "--objective", "loss", "--allocation", "fisher", "--repair", "least_squares"]
UNITS = ["--granularity", "head,neuron", "--criterion", "fisher", "--repair", "least_squares"]
TWICE = [*UNITS, "--target-speedup", "2", "--workload", "1x64", "--calibration-samples", "512"]
FILM, STORY = "A moving and very funny film.", "Once upon a time, there was a little"
WINDOWS = ["--criterion", "alps", "--calibration-samples", "64", "--window", "256"]
SMOLLM2 = ["--preset", "balanced", "--calibration-samples", "32", "--window", "512"]
#: The options of prune, the example, and whether the result is compressed, by name.
RUNS = {
    "minilm-sst2-magnitude-30": (["--sparsity", "0.3", "--criterion", "magnitude"], FILM, False),
    "minilm-sst2-magnitude-50": (["--sparsity", "0.5", "--criterion", "magnitude"], FILM, False),
    "minilm-sst2-best-80": (["--sparsity", "0.8", *BEST, "--calibration-samples", "512"], FILM, False),
    "minilm-sst2-packed-80": (["--sparsity", "0.8", *BEST, "--calibration-samples", "512"], FILM, True),
    "minilm-sst2-2x": (TWICE, FILM, False),
    "stories260k-alps-50": (["--sparsity", "0.5", *WINDOWS], STORY, False),
    "smollm2-135m-balanced-50": (["--sparsity", "0.5", *SMOLLM2], "The city of Paris is", False),
}
#: How language models are scored.
SCORED = {"stories260k": ["--window", "256"], "smollm2": ["--window", "512", "--limit", "32"]}


def run(*words: str) -> str:
    """A command's output."""
    return subprocess.run(
        [sys.executable, "-m", "hf_prune", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def make(name: str, model: str, data: str) -> None:
    """One card."""
    options, example, packs = RUNS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        plots = [] if "--target-speedup" in options else ["--plots"]
        run("prune", model, *options, "--data", data, "--threads", "1", "--out", str(folder), *plots)
        shown = " ".join(f'"{word}"' if " " in word else word for word in options)
        command = f"hf-prune prune MODEL {shown} --data {shown_data(data)} --threads 1 --out {name}"
        if packs:
            run("compress", str(folder), f"{folder}-packed")
            folder, command = Path(f"{folder}-packed"), f"{command}; hf-prune compress {name} {name}-packed"
        window = SCORED.get(name.split("-")[0], [])
        scores = json.loads(run("evaluate", str(folder), "--against", model, "--data", data, *window, "--json"))
        facts = read_card_data(
            folder,
            name=name,
            evaluation=scores,
            dataset="Salesforce/wikitext" if window else "stanfordnlp/sst2",
            language="en",
            example=example_of(str(folder), example),
            command=command,
            report=full_report(load_native(str(folder))).to_dict(),
        )
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for picture in facts.pictures:
            shutil.copy(folder / picture, out)
        values = facts.to_dict()
        for part in ("evaluation", "dense"):
            values["evaluation"][part]["source"] = shown_data(data)
        values["evaluation"] = {k: v for k, v in values["evaluation"].items() if k not in ("model", "against")}
        (out / "card.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        (out / "README.md").write_text(render_card(type(facts).from_dict(values)))


def shown_data(folder: str) -> str:
    """What the data is called on the Hub."""
    return "glue/sst2" if (Path(folder) / "dev.tsv").is_file() else "wikitext-2"


def main() -> None:
    """All, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("model", "data", "language_model", "texts"):
        parser.add_argument(argument)
    parser.add_argument("names", nargs="*", help="all by default")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    args = parser.parse_args()
    models = {"minilm": (args.model, args.data), "stories260k": (args.language_model, args.texts)}
    if args.smollm2:
        models["smollm2"] = args.smollm2, args.texts
    elif any(name.startswith("smollm2") for name in args.names):
        parser.error("the card of SmolLM2 is made from its folder: name it with --smollm2")
    for name in args.names or [name for name in RUNS if name.split("-")[0] in models]:
        make(name, *models[name.split("-")[0]])
        print(f"{HERE / name}/README.md")


if __name__ == "__main__":
    main()
