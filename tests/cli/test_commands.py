"""The command line, from end to end on tiny models and data."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
    pipeline,
)
from typer.testing import CliRunner

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    PruningConfig,
    find_sparsity,
    prune,
    run_sweep,
    sparsity_report,
)
from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.checkpoint.native import load_tokenizer
from hf_prune.cli.main import app
from hf_prune.cli.panels import OTHER, PANELS
from hf_prune.cli.workflows import budget as budget_workflow
from hf_prune.cli.workflows import prune as prune_workflow
from hf_prune.cli.workflows import sweep as sweep_workflow
from hf_prune.criteria.base import LABELLED
from hf_prune.criteria.registry import CRITERIA, unit_rankings
from hf_prune.errors import DataError
from hf_prune.evaluation.tasks import scored_rows
from hf_prune.granularities.registry import GRANULARITIES
from hf_prune.planning.presets import PRESETS, preset_settings
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import format_count, printable
from tests import models
from tests.support.command_line import Done, run_command

COMMANDS = (
    "demo",
    "prune",
    "evaluate",
    "sweep",
    "report",
    "bench",
    "explain",
    "trim-hidden",
    "trim-vocab",
    "train",
    "lottery",
    "card",
    "verify",
    "push",
    "compress",
    "decompress",
    "migrate",
    "space",
    "export",
    "list",
)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A classifier with its tokenizer, labelled data, a language model and an image classifier."""
    root = tmp_path_factory.mktemp("cli")
    classifier = models.tiny_classifier(seed=4)
    answered = {
        name: models.answered_sentences(n, seed, classifier) for name, n, seed in (("train", 60, 1), ("dev", 48, 0))
    }
    classifier.save_pretrained(root / "text")
    models.tiny_tokenizer().save_pretrained(root / "text")
    models.tiny_gpt2().save_pretrained(root / "gpt2")
    models.tiny_tokenizer().save_pretrained(root / "gpt2")
    models.tiny_llama().save_pretrained(root / "llama")
    models.tiny_tokenizer().save_pretrained(root / "llama")
    models.tiny_bert_mlm().save_pretrained(root / "mlm")
    models.tiny_tokenizer().save_pretrained(root / "mlm")
    models.tiny_vit().save_pretrained(root / "vit")
    (root / "texts").mkdir()
    for split, n, seed in (("train", 60, 1), ("test", 40, 0)):
        (root / "texts" / f"{split}.txt").write_text("\n".join(models.tiny_sentences(n, seed)["sentence"]))
    (root / "data").mkdir()
    for split, rows in answered.items():
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return {name: str(root / name) for name in ("text", "gpt2", "llama", "mlm", "vit", "data", "texts")}


@pytest.fixture
def hf_prune(capsys) -> Callable[..., Done]:
    """Run a command as the console script does, in this process."""
    return functools.partial(run_command, capsys)


def in_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hf_prune.cli.main import main; main()", *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root}, **options
    )


def error_of(done: Done) -> str:
    """The one line on stderr."""
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err.removeprefix("error: ").strip()


def masks_of(folder: Any) -> dict[str, torch.Tensor]:
    return dict(AutoPrunedModelForSequenceClassification.from_pretrained(folder).masks)


def assert_pruned_like(folder: Any, config: PruningConfig) -> None:
    expected = prune(models.tiny_classifier(seed=4), config).state_dict()
    found = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


# --- help and usage --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (0 if arguments else 2)
    assert all(f" {command} " in result.output for command in COMMANDS)
    assert "Start with: hf-prune demo" in result.output
    assert all(panel in result.output for panel in ("Start here", "Prune", "Measure", "Convert", "Share"))
    assert "--install-completion" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    result = CliRunner().invoke(app, [command, "-h"])
    assert result.exit_code == 0
    assert f"hf-prune {command}" in result.output.split("Example")[1]
    assert ("MODEL" in result.output.split("Arguments")[0]) == (
        command not in ("demo", "compress", "decompress", "migrate", "card", "push", "space", "list")
    )
    assert "--json" in result.output


def test_help_is_grouped_as_wide_as_the_terminal_and_plain_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    wide = CliRunner().invoke(app, ["prune", "--help"]).output
    assert {len(line) for line in wide.splitlines() if line.startswith(("╭", "│", "╰"))} == {140}
    assert "\x1b" not in wide
    panels = re.findall(r"╭─ ([^─]+) ─", wide)
    assert panels[0] == "Arguments"
    assert panels[1:] == [panel for panel in PANELS if panel in panels]
    for shown in ("row|layer|global", "uniform|erk|owl|fisher", "magnitude without --data", "block:RxC (block:16x1)"):
        assert shown in wide


def test_options_have_a_panel():
    """Those of the last panel are about what is printed and written; every other name is in the table."""
    group = typer.main.get_command(app)
    options = [p for command in group.commands.values() for p in command.params if p.param_type_name == "option"]
    others = {p.name for p in options if p.rich_help_panel == OTHER}
    files = "out overwrite as_json plots plot restart dry_run write open_ port"
    files += " verbose quiet details"
    assert others <= set(files.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hf-prune pr", {"prune"}),
        ("hf-prune prune m --scope ", {"row", "layer", "global"}),
        ("hf-prune prune m --criterion w", {"wanda"}),
        ("hf-prune prune m --target-s", {"--target-speedup"}),
    ],
)
def test_shells_complete(line, expected):
    words = {"_HF_PRUNE_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], prog_name="hf-prune", env={**words, "_TYPER_COMPLETE_ARGS": line})
    assert expected <= {row.partition("\t")[0] for row in result.output.splitlines()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prun"], "No such command 'prun'"),
        (["prune"], "Missing argument"),
        (["prune", "m", "--sparsty", "0.5"], "No such option"),
        (["prune", "m", "--sparsity", "half"], "'--sparsity'"),
        (["evaluate", "m", "--batch-size", "0"], "'--batch-size'"),
        (["sweep", "m", "--tolerance", "-1"], "'--tolerance'"),
        (["prune", "m", "--calibration-samples", "0"], "'--calibration-samples'"),
    ],
)
def test_wrong_usage_is_exit_code_2(hf_prune, arguments, message):
    done = hf_prune(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err


# --- list ------------------------------------------------------------------------------------------


def test_list_shows_every_entry_with_its_paper(hf_prune):
    """It reads the sources, so that nobody waits for PyTorch; what it says is what the classes say."""
    done = hf_prune("list")
    assert (done.code, done.err) == (0, "")
    values = json.loads(hf_prune("list", "--json").out)
    keys = {"criteria": ("name", "description", "paper", "needs", "scopes")}
    keys["granularities"] = ("name", "usage", "description", "paper", "scopes")
    for kind, registry in (("criteria", CRITERIA), ("granularities", GRANULARITIES)):
        classes = [registry.get(name) for name in registry.names()]
        of_classes = [{key: getattr(cls, key) for key in keys[kind]} for cls in classes]
        assert values[kind] == [
            {key: sorted(value) if isinstance(value, frozenset) else value for key, value in entry.items()}
            for entry in of_classes
        ]
    assert {unit["name"]: unit["description"] for unit in values["units"]} == unit_descriptions()
    assert [unit["name"] for unit in values["units"]] == list(unit_descriptions())
    rankings = {name: (r.needs, r.description, r.paper) for name, r in unit_rankings().items()}
    listed = {r["name"]: (r["needs"], r["description"], r["paper"]) for r in values["unit_criteria"]}
    assert list(listed.items()) == list(rankings.items())
    for entry in values["criteria"] + values["granularities"]:
        assert entry["description"] in done.out
        assert entry["paper"] in done.out
    labelled = [c["name"] for c in values["criteria"] if LABELLED & set(c["needs"])]
    assert re.findall(r"^(\w+) +labelled data", done.out, re.MULTILINE) == labelled


def test_presets_say_that_layers_have_a_criterion_of_their_own(hf_prune):
    said = hf_prune("list", "presets").out
    line = 'With texts (balanced, best, best+polish), granularity="layer" alone uses greedy in place of fisher.'
    assert line in said.splitlines()
    for name, preset in PRESETS.items():
        chosen = preset_settings(name, {"granularity": "layer"})["criterion"]
        assert chosen == ("greedy" if name in line else preset.units["criterion"])


@pytest.mark.parametrize("arguments", [("--help",), ("prune", "--help"), ("list",)])
def test_what_loads_no_model_loads_no_torch(arguments):
    code = "import sys; from hf_prune.cli.main import app; app(standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


# --- prune -----------------------------------------------------------------------------------------


def test_prune_end_to_end(hf_prune, folders, tmp_path):
    out = tmp_path / "out"
    done = hf_prune("prune", folders["text"], "--sparsity", 0.5, "--out", out, "--plots")
    assert done.code == 0
    assert "Traceback" not in done.err
    assert [line.split(":")[0] for line in done.out.splitlines()] == [
        "Model",
        "Method",
        "Left",
        "Time",
        "Saved",
        "Next",
    ]
    assert "Method:  magnitude, unstructured, 50 %, scope layer\n" in done.out
    assert f"Saved:   {out} (plain transformers loads it)\n" in done.out
    assert f"Next:    hf-prune compress {out} {out}-packed\n" in done.out
    assert_pruned_like(out, PruningConfig(sparsity=0.5))
    written = {p.name for p in out.iterdir()}
    assert written == {
        ".hf_prune.json",
        "hf_prune_run.yaml",
        "README.md",
        "pruning_card.json",
        "config.json",
        "model.safetensors",
        "pruning_masks.safetensors",
        "sparsity_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.png",
        "layers.png",
    }
    assert all((out / name).read_bytes().startswith(PNG) for name in written if name.endswith(".png"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    report = json.loads((out / "sparsity_report.json").read_text())
    assert report["target_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert all(t["before"] for t in report["tensors"] if t["is_target"])
    size = sum((out / name).stat().st_size for name in ("model.safetensors", "pruning_masks.safetensors"))
    left = f"Left:    {report['remaining']:,} of {report['parameters']:,} parameters"
    assert left in done.out
    assert f"{format_count(size)}B in files" in done.out
    result = pipeline("text-classification", model=str(out), device="cpu")("w1 w2 w3")  # its tokenizer came along
    assert result[0]["label"] in ("LABEL_0", "LABEL_1")
    assert AutoTokenizer.from_pretrained(out)("w1").input_ids == [2, 5, 3]


def test_prune_shows_tables_if_asked_and_goes_on_with_the_data(hf_prune, folders, tmp_path):
    options = ("--criterion", "wanda", "--scope", "row", "--data", folders["data"], "--calibration-samples", 8)
    done = hf_prune("prune", folders["text"], *options, "--out", tmp_path / "a")
    assert (
        f"Next:    hf-prune evaluate {tmp_path / 'a'} --data {folders['data']} --against {folders['text']}" in done.out
    )
    done = hf_prune("prune", folders["text"], *options, "--out", tmp_path / "b", "--details")
    assert done.out.startswith("Sparsity of BertForSequenceClassification\nweight ")
    assert done.out.endswith(f"Saved in {tmp_path / 'b'}.\n")


def test_an_interrupt_says_what_was_kept(hf_prune, folders, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_workflow, "sparsity_report", interrupt)
    done = hf_prune("prune", folders["text"], "--out", tmp_path / "out")
    assert (done.code, done.out) == (130, "")
    assert done.err.strip() == "Interrupted. Nothing was written: outputs appear when they are complete."
    assert list(tmp_path.iterdir()) == []


def test_prune_json_is_the_report_and_what_the_lines_say(hf_prune, folders, tmp_path):
    out = tmp_path / "out"
    done = hf_prune("prune", folders["text"], "--sparsity", 0.3, "--out", out, "--json")
    assert done.code == 0
    values = json.loads(done.out)
    run = values.pop("run")
    assert values == json.loads((out / "sparsity_report.json").read_text())
    assert run.pop("seconds") > 0
    assert PruningConfig.from_dict(run.pop("settings")) == PruningConfig(0.3)
    assert run == {
        "source": str(folders["text"]),
        "out": str(out),
        "method": "magnitude, unstructured, 30 %, scope layer",
        "bytes_in_files": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "needs_hf_prune": False,
        "next": f"hf-prune compress {out} {out}-packed",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_json_as_well_where_results_are(hf_prune, tmp_path, command):
    """On stdout for programs, on stderr for people, with exit code 1; here of a file that cannot be read."""
    if not any(option.name == "config" for option in typer.main.get_command(app).commands[command].params):
        pytest.skip("takes no file")
    done = hf_prune(command, "--json", "--config", tmp_path / "none.yaml")
    assert (done.code, f"error: {json.loads(done.out)['error']}\n") == (1, done.err)


def test_the_error_of_a_run_is_json(hf_prune, tmp_path):
    done = hf_prune("inspect", tmp_path, "--json")
    assert (done.code, list(json.loads(done.out))) == (1, ["error"])
    assert done.err == f"error: {json.loads(done.out)['error']}\n"
    assert hf_prune("inspect", tmp_path).out == ""


def test_options_become_the_config(hf_prune, folders, tmp_path):
    options = {
        "--criterion": "random",
        "--sparsity": "0.25",
        "--scope": "row",
        "--seed": "7",
        "--target-modules": "query, key",
        "--exclude-modules": "re:.*layer.0.*",
    }
    arguments = [part for pair in options.items() for part in pair]
    assert hf_prune("prune", folders["text"], *arguments, "--out", tmp_path).code == 0
    config = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path).pruning_config
    assert config == PruningConfig(
        sparsity=0.25,
        criterion="random",
        scope="row",
        seed=7,
        target_modules=["query", "key"],
        exclude_modules=".*layer.0.*",
    )
    assert set(masks_of(tmp_path)) == {f"bert.encoder.layer.1.attention.self.{n}.weight" for n in ("query", "key")}


def test_regular_expression_and_allocation_pairs(hf_prune, folders, tmp_path):
    pairs = "query=0.8,key=0.25"
    done = hf_prune(
        "prune", folders["text"], "--target-modules", "re:.*attention.self.*", "--allocation", pairs, "--out", tmp_path
    )
    assert done.code == 0
    shares = {name.split(".")[-2]: 1 - float(mask.float().mean()) for name, mask in masks_of(tmp_path).items()}
    assert shares == pytest.approx({"query": 0.8, "key": 0.25, "value": 0.5}, abs=0.01)


def test_granularity(hf_prune, folders, tmp_path):
    done = hf_prune("prune", folders["text"], "--granularity", "2:4", "--out", tmp_path, "--details")
    assert done.code == 0
    assert "N:M: every target satisfies 2:4." in done.out


@pytest.mark.parametrize(
    "command",
    [
        ("--criterion", "wanda", "--scope", "row"),
        ("--criterion", "wanda", "--scope", "row", "--stream"),
        ("--polish", "distill"),
    ],
)
def test_models_that_learn_from_images_are_asked_for_images(hf_prune, folders, tmp_path, command):
    options = ("--data", folders["data"], "--out", tmp_path / "out")
    said = error_of(hf_prune("prune", folders["vit"], *command, *options))
    missing = "has no processor of images that can be loaded"
    assert ("which learns from images" if "--stream" in command else missing) in said
    size = models.tiny_vit().config.image_size
    shutil.copytree(folders["vit"], tmp_path / "vit")
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path / "vit")
    said = error_of(hf_prune("prune", tmp_path / "vit", *command, *options))
    missing = "has no column with a usual name (image, img, pixel_values) (found: sentence, label)"
    assert ("which learns from images" if "--stream" in command else missing) in said
    assert not (tmp_path / "out").exists()


def test_other_models_are_calibrated_on_texts(hf_prune, folders, tmp_path):
    """Whatever they are for: only what looks at labels needs a classifier."""
    options = ("--data", folders["data"], "--out", tmp_path / "out")
    assert "expected a …ForSequenceClassification" in error_of(
        hf_prune("prune", folders["mlm"], "--criterion", "taylor", *options)
    )
    done = hf_prune("prune", folders["mlm"], "--criterion", "wanda", "--scope", "row", *options)
    assert done.code == 0
    assert "Method:  wanda, unstructured, 50 %, scope row" in done.out


def test_warnings_and_notes_are_lines_on_stderr(hf_prune, folders, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = hf_prune("prune", folders["text"], "--granularity", "block:16x1", "--out", tmp_path)
    assert done.code == 0
    assert done.err.count("Left dense, since granularity 'block:16x1' does not divide them: classifier (2, 16)") == 1
    assert "Left dense" not in done.out  # said once
    assert "UserWarning" not in done.err
    assert (
        "note: A sparsity of 1 removes everything that may go"
        in hf_prune("prune", folders["text"], "--sparsity", 1, "--out", tmp_path / "none").err
    )


def test_report_says_what_files_take(hf_prune, folders, tmp_path):
    """Of a compressed checkpoint that is far from the dense size."""
    assert hf_prune("prune", folders["text"], "--sparsity", 0.9, "--out", tmp_path / "pruned").code == 0
    assert hf_prune("compress", tmp_path / "pruned", tmp_path / "small").code == 0
    for folder in ("pruned", "small"):
        report = json.loads(hf_prune("report", tmp_path / folder, "--json").out)
        files = sum(path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors"))
        assert report["file_bytes"] == files
        assert f"B in files, {format_count(report['bytes'])}B dense." in hf_prune("report", tmp_path / folder).out


def test_config_file_and_options_that_override_it(hf_prune, folders, tmp_path):
    config = PruningConfig(sparsity=0.3, exclude_modules=["classifier"], scope="global")
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = ["--config", tmp_path / "config.json", "--sparsity", 0.6, "--out", tmp_path / "out"]
    assert hf_prune("prune", folders["text"], *arguments).code == 0
    assert_pruned_like(tmp_path / "out", config.replace(sparsity=0.6))


def test_dry_run_prints_the_plan_and_writes_nothing(hf_prune, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hf_prune("prune", folders["text"], "--sparsity", 0.4, "--dry-run")
    assert done.code == 0
    assert done.out.startswith("Plan for BertForSequenceClassification: magnitude, unstructured, scope layer")
    done = hf_prune("prune", folders["text"], "--sparsity", 0.4, "--dry-run", "--json", "--out", tmp_path / "out")
    plan = json.loads(done.out)
    assert plan["config"]["sparsity"] == 0.4
    assert len(plan["tensors"]) == 14
    assert list(tmp_path.iterdir()) == []


def test_taylor_learns_from_the_calibration_split(hf_prune, folders, tmp_path):
    arguments = ["prune", folders["text"], "--criterion", "taylor", "--data", folders["data"]]
    assert hf_prune(*arguments, "--out", tmp_path / "train", "--calibration-samples", 16).code == 0
    assert hf_prune(*arguments, "--out", tmp_path / "dev", "--calibration-split", "validation").code == 0
    assert hf_prune("prune", folders["text"], "--out", tmp_path / "magnitude").code == 0
    results = [masks_of(tmp_path / name) for name in ("train", "dev", "magnitude")]
    assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=0.02) for r in results for mask in r.values())
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(results[one][name], results[other][name])
    assert (tmp_path / "train" / "tokenizer.json").exists()


def test_fisher_in_steps(hf_prune, folders, tmp_path):
    arguments = ["prune", folders["text"], "--criterion", "fisher", "--scope", "global", "--data", folders["data"]]
    arguments += ["--sparsity", 0.6, "--calibration-samples", 16]
    assert hf_prune(*arguments, "--out", tmp_path / "one").code == 0
    done = hf_prune(*arguments, "--steps", 3, "--out", tmp_path / "three")
    assert done.code == 0, done.err
    results = [masks_of(tmp_path / name) for name in ("one", "three")]
    removed = [sum(int((~mask).sum()) for mask in result.values()) for result in results]
    assert removed[0] == removed[1] == round(0.6 * sum(mask.numel() for mask in results[0].values()))
    assert any(not torch.equal(mask, results[1][name]) for name, mask in results[0].items())
    error = error_of(hf_prune("prune", folders["text"], "--steps", 2, "--out", tmp_path / "none"))
    assert "steps=2 contradicts criterion 'magnitude'" in error


def test_a_polish_sees_more_than_calibration(hf_prune, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(scored_rows, "POLISH_SAMPLES", 40)
    arguments = ["prune", folders["text"], "--polish", "distill", "--data", folders["data"], "--calibration-samples", 8]
    done = hf_prune(*arguments, "--out", tmp_path / "many")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "many" / "sparsity_report.json").read_text())
    assert "unlabelled examples" in report["polish"]
    trained = int(re.search(r"on ([\d,]+) unlabelled", report["polish"])[1])
    assert 8 < trained <= 40
    error = error_of(hf_prune(*arguments, "--polish-samples", 8, "--out", tmp_path / "few"))
    assert "a polish got 1 batch" in error


def test_a_polish_of_a_sweep_sees_more_than_calibration(hf_prune, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(scored_rows, "POLISH_SAMPLES", 40)
    seen = []
    monkeypatch.setattr(sweep_workflow, "run_sweep", lambda *_, **given: seen.append(given) or run_sweep(*_, **given))
    arguments = ["sweep", folders["text"], "--data", folders["data"], "--calibration-samples", 8, "--sparsity", 0.5]
    done = hf_prune(*arguments, "--polish", "distill", "--out", tmp_path / "with")
    assert done.code == 0, done.err
    assert [sum(len(b["input_ids"]) for b in seen[0][key]) for key in ("calibration", "polish_data")] == [8, 40]
    assert hf_prune(*arguments, "--out", tmp_path / "without").code == 0
    assert seen[1]["polish_data"] is None


@pytest.mark.parametrize(("most", "held_out", "polished"), [(22, 20, 22), (4096, 20, 40), (4096, 2000, 20)])
def test_a_polish_within_a_budget_sees_no_held_out_sentence(
    hf_prune, folders, tmp_path, monkeypatch, most, held_out, polished
):
    monkeypatch.setattr(scored_rows, "POLISH_SAMPLES", most)
    seen = []

    def spy(model, tokenizer, dataset, **given):
        seen.append((dataset, given["polish_data"]))
        return find_sparsity(model, tokenizer, dataset, **given)

    monkeypatch.setattr(budget_workflow, "find_sparsity", spy)
    arguments = ["prune", folders["text"], "--data", folders["data"], "--calibration-samples", 20, "--max-drop", 99]
    arguments += ["--polish", "distill", "--criterion", "wanda", "--scope", "row", "--held-out", held_out]
    done = hf_prune(*arguments, "--out", tmp_path)
    ((dataset, batches),) = seen
    assert sum(len(batch["input_ids"]) for batch in batches) == polished
    tokenizer = models.tiny_tokenizer()
    trained = {tokenizer.decode(ids, skip_special_tokens=True) for batch in batches for ids in batch["input_ids"]}
    assert not trained & set(dataset["sentence"])
    assert done.code == 0, done.err
    assert "unlabelled examples" in json.loads((tmp_path / "sparsity_report.json").read_text())["polish"]


def test_pruning_goes_on_from_a_pruned_model(hf_prune, folders, tmp_path):
    models.tiny_classifier(seed=4).save_pretrained(tmp_path / "dense")
    models.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert hf_prune("prune", tmp_path / "dense", "--sparsity", 0.3, "--out", tmp_path / "a").code == 0
    assert hf_prune("prune", tmp_path / "a", "--sparsity", 0.6, "--out", tmp_path / "b").code == 0
    assert_pruned_like(tmp_path / "b", PruningConfig(sparsity=0.6))
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("w1").input_ids == [2, 5, 3]
    assert "below what earlier pruning already removed" in error_of(
        hf_prune("prune", tmp_path / "b", "--sparsity", 0.2, "--out", tmp_path / "a")
    )
    assert_pruned_like(tmp_path / "a", PruningConfig(sparsity=0.3))


@pytest.mark.parametrize(("kind", "auto"), [("vit", AutoModelForImageClassification), ("gpt2", AutoModelForCausalLM)])
def test_models_of_other_kinds(hf_prune, folders, tmp_path, kind, auto):
    assert hf_prune("prune", folders[kind], "--sparsity", 0.5, "--out", tmp_path).code == 0
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert sparsity_report(model).target_sparsity == pytest.approx(0.5, abs=0.01)


# --- evaluate --------------------------------------------------------------------------------------


def test_evaluate_alone_and_against(hf_prune, folders, tmp_path):
    assert hf_prune("prune", folders["text"], "--sparsity", 0.8, "--out", tmp_path).code == 0
    done = hf_prune("evaluate", tmp_path, "--data", folders["data"], "--against", folders["text"], "--json")
    assert done.code == 0
    values = json.loads(done.out)
    assert values["model"] == str(tmp_path)
    assert values["evaluation"]["n"] == values["dense"]["n"] == 48
    assert values["comparison"]["dense_accuracy"] == values["dense"]["accuracy"]
    assert values["comparison"]["pruned_accuracy"] == values["evaluation"]["accuracy"]
    text = hf_prune("evaluate", tmp_path, "--data", folders["data"], "--against", folders["text"]).out.splitlines()
    assert len(text) == 4
    assert text[3].startswith(f"predictions: KL {values['comparison']['divergence']['kl']:.4f} ±")
    assert text[0].startswith(f"{tmp_path}: accuracy {100 * values['evaluation']['accuracy']:.2f} %")
    assert text[1].startswith(f"{folders['text']}: accuracy {100 * values['dense']['accuracy']:.2f} %")
    alone = hf_prune("evaluate", tmp_path, "--data", folders["data"], "--split", "train", "--batch-size", 5, "--json")
    alone = json.loads(alone.out)
    assert alone.keys() == {"model", "weights", "evaluation"}
    assert (alone["evaluation"]["n"], alone["evaluation"]["batch_size"]) == (60, 5)


def test_other_columns(hf_prune, folders, tmp_path):
    text = (Path(folders["data"]) / "dev.tsv").read_text().replace("sentence\tlabel", "text\tstars")
    (tmp_path / "dev.tsv").write_text(text)
    arguments = ["evaluate", folders["text"], "--data", tmp_path, "--json"]
    done = hf_prune(*arguments, "--text-column", "text", "--label-column", "stars")
    assert json.loads(done.out)["evaluation"]["n"] == 48
    assert "has the columns text, stars, and none with a usual name for labels" in error_of(hf_prune(*arguments[:-1]))


@pytest.mark.filterwarnings("default:the dense model")
def test_labels_that_are_not_the_models_are_warned_of(hf_prune, folders, tmp_path):
    """Reversed: everywhere a warning comes first, and nothing is called a success."""
    data = tmp_path / "data"
    data.mkdir()
    for path in Path(folders["data"]).iterdir():
        head, *rows = path.read_text().splitlines()
        rows = [f"{row[:-1]}{1 - int(row[-1])}" for row in rows]
        (data / path.name).write_text("\n".join([head, *rows]) + "\n")
    text, wrong = (
        folders["text"],
        "is right on 8.33 % of the examples, and always answering class 0 on 50.00 % (n = 48)",
    )
    done = hf_prune("evaluate", text, "--data", data, "--json")
    assert done.err.startswith(f"warning: {text} {wrong}")
    assert json.loads(done.out)["evaluation"]["accuracy"] < 0.1
    done = hf_prune("evaluate", text, "--data", data, "--against", text)
    assert done.err.startswith(f"warning: the dense model {wrong}")
    assert done.out.count("Warning: the dense model") == 1
    done = hf_prune("sweep", text, "--data", data, "--sparsity", 0.9, "--tolerance", 100, "--out", tmp_path / "swept")
    assert f"warning: the dense model {wrong}" in done.err
    assert "Sweet spot: none is named" in done.out
    options = ["--max-drop", 99, "--calibration-samples", 8, "--out", tmp_path / "out"]
    error = error_of(hf_prune("prune", text, "--data", data, *options))
    assert error.startswith("no sparsity can be found by its drop in accuracy, since the dense model is right on")
    assert not (tmp_path / "out").exists()


# --- sweep -----------------------------------------------------------------------------------------


def test_sweep_end_to_end_and_resume(hf_prune, folders, tmp_path):
    arguments = [
        "sweep",
        folders["text"],
        "--data",
        folders["data"],
        "--out",
        tmp_path,
        "--criterion",
        "magnitude, taylor",
    ]
    done = hf_prune(*arguments, "--sparsity", "0,0.3,0.6")
    assert done.code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "tradeoff.png", "hf_prune_run.yaml"}
    assert "Sweet spot: " in done.out
    assert "± s.e." in done.out
    first = json.loads((tmp_path / "results.json").read_text())
    assert [(p["criterion"], p["sparsity"]) for p in first["points"]] == [
        (criterion, sparsity) for criterion in ("magnitude", "taylor") for sparsity in (0.3, 0.6)
    ]
    done = hf_prune(*arguments, "--sparsity", "0.3,0.6,0.9", "--json")
    second = json.loads(done.out)
    assert second == json.loads((tmp_path / "results.json").read_text())
    kept = [p for p in second["points"] if p["sparsity"] != 0.9]
    assert kept == first["points"]  # their times too: nothing was measured again
    assert len(list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))) == 1 + 6

    before = (tmp_path / "results.json").read_bytes()
    done = hf_prune(*arguments, "--scope", "global")
    assert (done.code, done.out) == (1, "")
    assert "config.scope was 'layer', now 'global'" in done.err.splitlines()[-1]
    assert (tmp_path / "results.json").read_bytes() == before
    assert hf_prune(*arguments, "--scope", "global", "--sparsity", "0.5", "--restart").code == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["points"]) == 2


def test_a_sweep_measures_speeds(hf_prune, folders, tmp_path):
    arguments = ["sweep", folders["text"], "--data", folders["data"], "--sparsity", 0.9, "--out", tmp_path]
    error = error_of(hf_prune(*arguments, "--batch", 2))
    assert error == "--batch, --length and --threads say what --accelerate times: add it, or leave them out"
    done = hf_prune(*arguments, "--accelerate", "--batch", 2, "--length", 8, "--threads", 1)
    assert done.code == 0
    assert "2 x 8 tokens, threads: 1" in done.out
    assert f"Saved: {tmp_path / 'results.json'}, " in done.out
    assert str(tmp_path / "speed.png") in done.out
    values = json.loads((tmp_path / "results.json").read_text())
    for measured in (values["dense_acceleration"], values["points"][0]["acceleration"]):
        assert (measured["batch_size"], measured["length"], measured["threads"]) == (2, 8, 1)
    assert "accelerate: true" in (tmp_path / "hf_prune_run.yaml").read_text()


# --- report ----------------------------------------------------------------------------------------


def test_report(hf_prune, folders, tmp_path):
    assert hf_prune("prune", folders["text"], "--sparsity", 0.7, "--out", tmp_path / "out").code == 0
    done = hf_prune("report", tmp_path / "out", "--dense", folders["text"], "--plots", tmp_path / "plots")
    assert done.code == 0
    assert "std before" in done.out
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"weights.png", "layers.png"}
    values = json.loads(hf_prune("report", tmp_path / "out", "--json", "--dense", folders["text"]).out)
    saved = json.loads((tmp_path / "out" / "sparsity_report.json").read_text())  # before there were files
    assert values == {**saved, "file_bytes": values["file_bytes"]}
    alone = hf_prune("report", tmp_path / "out", "--plots", tmp_path / "more")
    assert "std before" not in alone.out
    assert {p.name for p in (tmp_path / "more").iterdir()} == {"weights.png", "layers.png"}
    dense = json.loads(hf_prune("report", folders["text"], "--json").out)
    assert dense["removed"] == 0


# --- errors ----------------------------------------------------------------------------------------

USER_ERRORS: dict[str, tuple[list[str], str]] = {
    "no out": (["prune", "{text}"], "no --out: name the folder for the pruned checkpoint, or pass --dry-run"),
    "sparsity": (
        ["prune", "{text}", "--sparsity", "50", "--out", "x"],
        "expected a share from 0 to 1; did you mean 0.5?",
    ),
    "criterion": (["prune", "{text}", "--criterion", "magnitud", "--dry-run"], "Did you mean 'magnitude'?"),
    "granularity": (["prune", "{text}", "--granularity", "4:2", "--dry-run"], "granularity '4:2'"),
    "scope": (["prune", "{text}", "--scope", "world", "--dry-run"], "unknown scope 'world'"),
    "allocation": (
        ["prune", "{text}", "--allocation", "query=x", "--dry-run"],
        "--allocation query is 'x': expected numbers",
    ),
    "targets": (["prune", "{text}", "--target-modules", "qery", "--dry-run"], "unknown module 'qery'"),
    "regex": (["prune", "{text}", "--target-modules", "re:(", "--dry-run"], "is not a regular expression"),
    "no config": (["prune", "{text}", "--config", "none.json", "--dry-run"], "none.json"),
    "bad config": (["prune", "{text}", "--config", "{data}/dev.tsv", "--dry-run"], "not valid YAML"),
    "no model": (["prune", "./nothing", "--dry-run"], "no such folder: './nothing'"),
    "empty model": (["report", "{data}"], "config.json"),
    "out is a file": (["prune", "{text}", "--out", "{data}/dev.tsv"], "dev.tsv is a file: expected a folder"),
    "scoring": (
        ["evaluate", "{mlm}", "--data", "{data}"],
        "is a BertForMaskedLM: expected a …ForSequenceClassification, which has labels and is scored by accuracy, or a "
        "…ForCausalLM, which is scored by perplexity",
    ),
    "taylor of a masked LM": (
        ["prune", "{mlm}", "--criterion", "taylor", "--data", "{data}", "--out", "x"],
        "is a BertForMaskedLM: expected a …ForSequenceClassification",
    ),
    "column of a LM": (
        ["prune", "{gpt2}", "--criterion", "wanda", "--data", "{data}", "--text-column", "text", "--out", "x"],
        "has no column 'text' (found: sentence, label): name it with --text-column",
    ),
    "window of a LM": (["evaluate", "{gpt2}", "--data", "{texts}", "--window", "25"], "has only 24 positions"),
    "window of a classifier": (
        ["evaluate", "{text}", "--data", "{data}", "--window", "9"],
        "--window is for language models, and",
    ),
    "against another kind": (
        ["evaluate", "{gpt2}", "--data", "{texts}", "--against", "{text}"],
        "a BertForSequenceClassification: expected two of the same kind",
    ),
    "no text file": (["evaluate", "{gpt2}", "--data", "none.txt"], "no such file or folder: 'none.txt'"),
    "no test split": (["evaluate", "{gpt2}", "--data", "{texts}", "--split", "dev"], "it has test, train"),
    "budget of a filler of gaps": (
        ["prune", "{mlm}", "--max-drop", "1", "--data", "{data}", "--out", "x"],
        "is a BertForMaskedLM: expected a …ForSequenceClassification",
    ),
    "no data": (["evaluate", "{text}", "--data", "./nothing"], "no such folder: './nothing'"),
    "no split": (["evaluate", "{text}", "--data", "{data}", "--split", "test"], "no split 'test'"),
    "numbers": (["sweep", "{text}", "--sparsity", "0.3;0.5"], "--sparsity is '0.3;0.5': expected numbers separated by"),
    "2:4 sweep": (
        ["sweep", "{text}", "--data", "{data}", "--granularity", "2:4", "--sparsity", "0.3", "--out", "x"],
        "contradicts granularity='2:4', which fixes it at 0.5",
    ),
    "other dense": (["report", "{text}", "--dense", "{vit}"], "is a ViTForImageClassification without bert."),
}


@pytest.mark.parametrize("what", USER_ERRORS)
def test_user_errors_are_one_line_and_exit_code_1(hf_prune, folders, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    arguments, message = USER_ERRORS[what]
    assert message in error_of(hf_prune(*(a.format(**folders) for a in arguments)))
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_of_the_process(folders, fresh_process):
    done = in_process("prune", folders["text"], "--sparsity", 7, "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: sparsity is 7.0: expected a share from 0 to 1; did you mean 0.07?\n"
    done = fresh_process.run("from hf_prune.cli.main import main; main()", "report", folders["text"], "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["model"] == "BertForSequenceClassification"
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import json, os, signal, sys, threading, time
from pathlib import Path

def interrupt():
    while not results.exists() or not json.loads(results.read_text())["points"]:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

results = Path(sys.argv.pop(1), "results.json")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is deaf to Ctrl-C
threading.Thread(target=interrupt, daemon=True).start()
from hf_prune.cli.main import main
main()
"""


def test_ctrl_c_is_exit_code_130_and_the_sweep_resumes(hf_prune, folders, tmp_path, fresh_process):
    arguments = ["sweep", folders["text"], "--data", folders["data"], "--out", str(tmp_path), "--batch-size", "1"]
    many = ",".join(f"{i / 400:g}" for i in range(1, 400))
    done = fresh_process.run(INTERRUPTED, tmp_path, *arguments, "--sparsity", many)
    assert done.returncode == 130
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    points = json.loads((tmp_path / "results.json").read_text())["points"]
    assert 0 < len(points) < 399
    done = hf_prune(*arguments, "--sparsity", f"{points[0]['sparsity']}", "--json")
    assert json.loads(done.out)["points"] == points


def test_sweep_takes_the_sparsity_that_the_granularity_fixes(hf_prune, folders, tmp_path):
    options = ["--data", folders["data"], "--granularity", "2:4", "--out", tmp_path / "out", "--json"]
    done = hf_prune("sweep", folders["text"], *map(str, options))
    assert done.code == 0
    assert [point["sparsity"] for point in json.loads(done.out)["points"]] == [0.5]


@pytest.mark.parametrize("arguments", [["report", "owner/name"], ["sweep", "owner/name"], ["evaluate", "owner/name"]])
def test_offline_errors_come_before_the_libraries(arguments, tmp_path):
    """Loading torch and transformers takes seconds; nobody waits for them to hear that there is no network."""
    code = (
        "import sys; from hf_prune.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot get model 'owner/name'")
    assert done.stdout == "[]\n"


def test_more_user_errors(hf_prune, folders, tmp_path):
    text, data = folders["text"], folders["data"]
    without = tmp_path / "no-tokenizer"
    models.tiny_classifier(seed=4).save_pretrained(without)
    assert "has no tokenizer: save it beside the model" in error_of(hf_prune("evaluate", without, "--data", data))
    same = [
        "sweep",
        text,
        "--data",
        data,
        "--criterion",
        "taylor",
        "--calibration-split",
        "dev",
        "--out",
        tmp_path / "s",
    ]
    assert "'validation' is scored and calibrated on" in error_of(hf_prune(*same))
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in error_of(hf_prune("prune", text, "--config", binary, "--out", tmp_path / "x"))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nosuch", "architectures": ["X"]}')
    assert "describes no model that transformers knows" in error_of(hf_prune("report", unknown))
    wrong = tmp_path / "wrong"
    models.tiny_classifier(seed=4).save_pretrained(wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    assert "do not fit its config" in error_of(hf_prune("report", wrong)).replace("\n", " ")
    (tmp_path / "file").write_text("x")
    sweep = ["sweep", text, "--data", data, "--out", tmp_path / "file"]
    assert "is a file: expected a folder to save into" in error_of(hf_prune(*sweep))


def test_version(hf_prune):
    import hf_prune as package

    done = hf_prune("--version")
    assert (done.code, done.out) == (0, f"{package.__version__}\n")


@pytest.mark.parametrize(
    "options",
    [["--criterion", "wanda"], ["--criterion", "sparsegpt"], ["--repair", "least_squares"]],
    ids=lambda o: o[1],
)
def test_calibration_on_texts_and_repair(hf_prune, folders, tmp_path, options):
    out = tmp_path / "out"
    fixed = ["--sparsity", "0.5", "--data", folders["data"], "--exclude-modules", "classifier", "--out", str(out)]
    done = hf_prune("prune", folders["text"], *options, *fixed)
    assert done.code == 0, done.err
    saved = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    dense = AutoModelForSequenceClassification.from_pretrained(folders["text"]).state_dict()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    kept = saved[name] != 0
    assert int(kept.sum()) == kept.numel() // 2
    assert torch.equal(saved[name][kept], dense[name][kept]) == (options[1] == "wanda")  # the others give new values


def test_sweep_with_repair_calibrates(hf_prune, folders, tmp_path):
    options = ["--data", folders["data"], "--sparsity", "0.5", "--repair", "least_squares", "--out", str(tmp_path)]
    done = hf_prune("sweep", folders["text"], *options, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["settings"]["calibration"]


def test_list_says_what_a_criterion_needs(hf_prune):
    out = hf_prune("list").out
    weights, units = out.split("their criterion")
    lines = {line.split()[0]: line for line in weights.splitlines() if line}
    assert "gates" in {line.split()[0]: line for line in units.splitlines() if line}["fisher"]
    assert "whole layers" in lines["layer"]
    assert "no data" in lines["magnitude"]
    assert " texts " in lines["wanda"]
    assert "labelled data" in lines["taylor"]
    assert " texts " in lines["fisher"]
    assert " texts " in lines["fisher_diagonal"]


# --- language models -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options",
    [["--criterion", "sparsegpt"], ["--criterion", "taylor"], ["--repair", "least_squares"]],
    ids=lambda o: o[1],
)
def test_a_language_model_is_calibrated_on_windows_of_text(hf_prune, folders, tmp_path, kind, options):
    from hf_prune.calibration.texts import token_windows
    from hf_prune.evaluation.data.loading import load_texts

    done = hf_prune("prune", folders[kind], *options, "--data", folders["texts"], "--out", tmp_path, "--window", 16)
    assert done.code == 0, done.err
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert sparsity_report(saved).target_sparsity == pytest.approx(0.5, abs=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = load_texts(folders["texts"], "train")
    batches = token_windows(texts, tokenizer, n=128, length=16, labels="taylor" in options)
    settings = {options[0].removeprefix("--"): options[1]}
    expected = prune(models.TRANSFORMERS[kind](), 0.5, calibration=batches, **settings).state_dict()
    found = saved.state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_calibration_of_a_language_model_has_settings(hf_prune, folders, tmp_path):
    arguments = ["prune", folders["llama"], "--criterion", "wanda", "--data", folders["texts"]]
    found = []
    for options in ([], ["--window", 8], ["--calibration-samples", 2], ["--calibration-split", "test"]):
        assert hf_prune(*arguments, *options, "--out", tmp_path / str(len(found))).code == 0
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / str(len(found))).state_dict()
        found.append(torch.cat([(w == 0).flatten() for name, w in weights.items() if "proj" in name]))
    assert all(not torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--max-drop", "1", "--out", "x"],
        ["train", "--out", "x"],
        ["lottery", "--out", "x"],
        ["bench", "--data", "none", "--plot", "x.png"],
    ],
    ids=" ".join,
)
def test_models_of_other_inputs_are_refused_before_texts_are_looked_for(
    hf_prune, folders, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command, *options = arguments
    error = error_of(hf_prune(command, folders["vit"], *options))
    assert "is a ViTForImageClassification, which learns from images (pixel_values)" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--criterion", "wanda"], ["--criterion", "wanda", "--scope", "row", "--stream"]])
def test_text_files_do_where_no_labels_are_needed(hf_prune, folders, tmp_path, options):
    """Every line is a text, whatever the model; as a column of a table, the lines lead to the same weights."""
    t5 = tmp_path / "t5"
    models.tiny_t5().save_pretrained(t5)
    models.tiny_tokenizer().save_pretrained(t5)
    lines = models.tiny_sentences(8, 1)["sentence"]
    (tmp_path / "a.txt").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "a.tsv").write_text("\n".join(["line", *lines]) + "\n")
    for model in (t5, folders["mlm"]):
        weights = []
        for data in ("a.txt", "a.tsv"):
            out = tmp_path / f"{Path(model).name}-{data}"
            column = ["--text-column", "line"]
            done = hf_prune("prune", model, *options, "--data", tmp_path / data, *column, "--out", out)
            assert done.code == 0, done.err
            weights.append(load_file(out / "model.safetensors"))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    error = error_of(hf_prune("prune", t5, *options, "--data", tmp_path / "a.tsv", "--out", tmp_path / "x"))
    assert "has the columns line, and none with a usual name for texts" in error
    assert "name it with --text-column" in error
    error = error_of(hf_prune("prune", t5, "--criterion", "taylor", "--data", tmp_path / "a.txt", "--out", "x"))
    assert "a.txt' is not a table, and labels are needed" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "x", "--amount", "0.3"], "No such option: --amount (did you mean --sparsity?)"),
        (["sweep", "x", "--pruning-ratio=0.3"], "No such option: --pruning-ratio (did you mean --sparsity?)"),
        (["prune", "x", "--density", "1"], "--density (did you mean --sparsity, 1 less that share?)"),
        (["prune", "x", "--sparsty", "1"], "--sparsty (did you mean --sparsity?)"),
        (["prune", "x", "--n", "2", "--m", "4"], "--n (did you mean --granularity, such as '2:4'?)"),
        (["report", "x", "--amount", "0.3"], "No such option: --amount"),  # it has nothing of the kind
    ],
)
def test_options_of_other_tools_lead_to_ours(hf_prune, arguments, message):
    done = hf_prune(*arguments)
    assert done.code == 2
    assert done.err.strip().endswith(message)


@pytest.mark.parametrize("options", [[], ["--stream"], ["--dry-run"]])
def test_what_stays_dense_is_said_once(hf_prune, tmp_path, options):
    models.tiny_resnet().save_pretrained(tmp_path / "resnet")
    done = hf_prune("prune", tmp_path / "resnet", "--granularity", "8:16", *options, "--out", tmp_path / "out")
    assert done.code == 0
    assert (done.out + done.err).count("stay dense, the largest") == 1


def test_a_language_model_is_scored_by_perplexity(hf_prune, folders, tmp_path):
    assert hf_prune("prune", folders["llama"], "--sparsity", 0.8, "--out", tmp_path).code == 0
    arguments = ["evaluate", tmp_path, "--data", folders["texts"], "--window", 12, "--batch-size", 3]
    values = json.loads(hf_prune(*arguments, "--against", folders["llama"], "--json").out)
    assert values.keys() == {"model", "weights", "evaluation", "against", "against_weights", "dense", "comparison"}
    pruned, dense = values["evaluation"], values["dense"]
    assert (pruned["window"], pruned["batch_size"], pruned["split"], pruned["source"]) == (12, 3, "test", "texts")
    assert pruned["n"] == dense["n"] > 10
    assert values["comparison"]["ratio"] == pytest.approx(pruned["perplexity"] / dense["perplexity"])
    text = hf_prune(*arguments, "--against", folders["llama"]).out.splitlines()
    assert len(text) == 3
    assert text[0].startswith(f"{tmp_path}: perplexity {pruned['perplexity']:.2f} ± ")
    assert f"(n = {dense['n']} windows of 12 tokens, texts test)" in text[1]
    assert "times the dense one (95 % interval" in text[2]
    file = Path(folders["texts"]) / "test.txt"
    alone = json.loads(hf_prune("evaluate", folders["llama"], "--data", file, "--limit", 4, "--json").out)["evaluation"]
    assert (alone["n"], alone["window"], alone["source"], alone["split"]) == (4, 24, "test.txt", "")
    (tmp_path / "short.txt").write_text("w1 w2")
    assert "the texts have 4 tokens, too few for one window of 24: pass more text" in error_of(
        hf_prune("evaluate", folders["llama"], "--data", tmp_path / "short.txt")
    )
    column = ["--data", folders["data"], "--text-column", "sentence", "--split", "dev", "--json"]
    assert json.loads(hf_prune("evaluate", folders["gpt2"], *column).out)["evaluation"]["n"] > 5


def test_a_language_model_is_pruned_as_far_as_its_perplexity_allows(hf_prune, folders, tmp_path):
    arguments = ["prune", folders["llama"], "--data", folders["texts"], "--window", 12, "--held-out", 10]
    done = hf_prune(*arguments, "--criterion", "wanda", "--max-drop", 3, "--json", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    values = json.loads(done.out)
    search, reported = values["search"], values["reported"]
    chosen = next(p for p in search["points"] if p["sparsity"] == search["sparsity"])
    assert chosen["within"]
    assert chosen["comparison"]["upper_bound"] <= 100 * math.log(1.03)
    assert all(100 * math.expm1(p["comparison"]["upper_bound"] / 100) > 3 for p in search["points"] if not p["within"])
    assert 5 < search["dense"]["n"] <= 12
    assert (reported["split"], "ratio" in reported) == ("test", True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparsity_report(saved).target_sparsity == pytest.approx(search["sparsity"], abs=0.01)
    text = hf_prune(*arguments, "--max-drop", 3, "--out", tmp_path / "text")
    assert "lost in per cent of perplexity against the dense model on the same windows" in text.out
    found = re.search(r"Largest sparsity found within 3 per cent of perplexity: (\d+) %", text.out)
    assert re.search(rf"Method: .* {found[1]} %, scope", text.out)


@pytest.mark.parametrize(
    ("arguments", "why", "useful"),
    [
        (["evaluate", "{gpt2}"], "evaluate", "texts of the kind that the model will see"),
        (["prune", "{gpt2}", "--criterion", "alps", "--out", "x"], "criterion 'alps'", "texts of the kind"),
        (["prune", "{text}", "--max-drop", "1", "--out", "x"], "--max-drop 1", "texts with labels"),
        (["sweep", "{text}"], "a sweep", "texts with labels that are classes of the model, such as glue/sst2"),
        (["train", "{text}", "--out", "x"], "a training", "texts with labels"),
        (["lottery", "{text}", "--out", "x"], "a lottery", "texts with labels"),
    ],
)
def test_no_data_set_is_assumed(hf_prune, folders, tmp_path, monkeypatch, arguments, why, useful):
    monkeypatch.chdir(tmp_path)
    error = error_of(hf_prune(*(argument.format(**folders) for argument in arguments)))
    assert error.startswith(f"no --data, which {why} needs: pass {useful}")
    assert error.endswith("; a folder, a file or a Hub data set")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_needs_labels_for_gradients_only(hf_prune, folders, tmp_path):
    rows = (Path(folders["data"]) / "train.tsv").read_text().splitlines()
    (tmp_path / "train.tsv").write_text("\n".join(row.split("\t")[0] for row in rows) + "\n")
    arguments = ["prune", folders["text"], "--data", tmp_path, "--criterion"]
    assert hf_prune(*arguments, "wanda", "--out", tmp_path / "out").code == 0
    other = hf_prune(
        "prune", folders["text"], "--data", folders["data"], "--criterion", "wanda", "--out", tmp_path / "o"
    )
    assert other.code == 0
    found, expected = masks_of(tmp_path / "out"), masks_of(tmp_path / "o")
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())  # labels have no say
    assert "has the columns sentence, and none with a usual name for labels" in error_of(
        hf_prune(*arguments, "taylor", "--out", tmp_path / "t")
    )


# --- heads, neurons and layers ----------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path):
    """A checkpoint of a registered architecture, with a tokenizer and data."""
    folder, data = tmp_path / "bert", tmp_path / "data"
    model = models.tiny_classifier()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(parameter == 0, 0.01)  # zeros of its own would count as removed
    model.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    data.mkdir()
    for name in ("train", "dev"):
        rows = models.answered_sentences(60, len(name), model)
        lines = [f"{s}\t{y}" for s, y in zip(rows["sentence"], rows["label"], strict=True)]
        (data / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return folder, data


def test_prune_takes_out_heads_and_neurons(hf_prune, bert, tmp_path):
    folder, data = bert
    out = tmp_path / "out"
    done = hf_prune(
        *("prune", folder, "--granularity", "head,neuron", "--criterion", "reconstruction"),
        *("--repair", "least_squares", "--target-params", "0.8", "--data", data, "--calibration-samples", "16"),
        *("--out", out, "--plots"),
    )
    assert done.code == 0, done.err
    assert "Method:  reconstruction, head and neuron, target_params 0.8" in done.out
    before = models.tiny_bert().num_parameters()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert 0.7 * before < model.num_parameters() <= 0.8 * before
    report = json.loads((out / "sparsity_report.json").read_text())
    assert report["structure"]["parameters"] == model.num_parameters()
    assert report["remaining"] == model.num_parameters()
    assert (out / "weights.png").stat().st_size > 5_000
    assert f"Next:    hf-prune evaluate {out}" in done.out
    assert hf_prune("report", out).code == 0


def test_prune_leaves_masks_in_if_asked(hf_prune, bert, tmp_path):
    folder, _ = bert
    out = tmp_path / "out"
    assert hf_prune("prune", folder, "--granularity", "head", "--no-shrink", "--out", out).code == 0
    model = AutoPrunedModelForSequenceClassification.from_pretrained(out)
    assert model.num_parameters() == models.tiny_bert().num_parameters()
    assert any(not bool(mask.all()) for mask in model.masks.values())


def test_plan_of_units(hf_prune, bert):
    folder, data = bert
    done = hf_prune("prune", folder, "--granularity", "head,neuron", "--dry-run")
    assert "encoder.layer.0.attention.output.dense" in done.out
    values = json.loads(hf_prune("prune", folder, "--granularity", "neuron", "--dry-run", "--json").out)
    assert [site["kept"] for site in values["sites"]] == [16, 16]
    speed = ("--target-speedup", "50", "--workload", "2x8", "--threads", "1", "--criterion", "magnitude")
    timed = hf_prune("prune", folder, "--granularity", "neuron", *speed, "--dry-run")
    assert timed.code == 1
    assert "with all neurons gone that may go, and 50 were asked for" in timed.err
    learned = hf_prune("prune", folder, "--granularity", "neuron", "--criterion", "fisher", "--data", data, "--dry-run")
    assert "by data" not in learned.out


def test_units_within_a_drop(hf_prune, bert, tmp_path):
    folder, data = bert
    done = hf_prune(
        *("prune", folder, "--granularity", "neuron", "--max-drop", "90", "--held-out", "20", "--data", data),
        *("--calibration-samples", "8", "--out", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert "Left: " in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "64", "--granularity", "head"], "--workload is '64': expected the batch size"),
        (["--no-shrink"], "are for head, neuron, layer, row, column and channel, not for granularity 'unstructured'"),
        (["--granularity", "head,weights"], "unknown kind of unit in granularity 'weights'"),
        (["--granularity", "head", "--stream", "--target-flops", "0.5"], "runs the whole model, which streaming never"),
        (["--granularity", "head", "--target-params", "0.01"], "cannot be met"),
    ],
)
def test_options_for_units_that_make_no_sense(hf_prune, bert, tmp_path, arguments, message):
    done = hf_prune("prune", bert[0], *arguments, "--out", tmp_path / "out")
    assert message in error_of(done)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_code(folders, tmp_path):
    """A model type of its own, and a classifier whose tokenizer has code of its own; either would leave a file."""
    marker = tmp_path / "was run"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("model", "tokenizer"):
        shutil.copytree(folders["text"], tmp_path / name)
        (tmp_path / name / "own.py").write_text(code + "class Own: pass\n")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    auto = {key: "own.Own" for key in ("AutoConfig", "AutoModelForSequenceClassification")}
    write_json(tmp_path / "model" / "config.json", {**config, "model_type": "own", "auto_map": auto})
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    values = {
        **json.loads(path.read_text()),
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    write_json(path, values)
    write_json(tmp_path / "model" / "tokenizer_config.json", values)
    yield {name: str(tmp_path / name) for name in ("model", "tokenizer")}
    assert not marker.exists()


def test_nobody_is_asked_whether_to_run_code(hf_prune, folders, with_code, monkeypatch, tmp_path):
    """What comes in by a pipe would be the answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    out, model = ("--out", tmp_path / "out"), with_code["model"]
    data = ("--data", folders["data"])
    for command in (
        ("report", model),
        ("prune", model, *out),
        ("prune", model, "--stream", *out),
        ("prune", model, "--criterion", "wanda", *data, *out),
        ("evaluate", model, *data),
        ("train", model, *data, *out),
        ("bench", model),
        ("trim-vocab", model, "--texts", folders["data"], *out),
        ("evaluate", with_code["tokenizer"], *data),
        ("prune", with_code["tokenizer"], "--criterion", "wanda", "--stream", *data, *out),
        ("bench", with_code["tokenizer"], *data),
        ("trim-vocab", with_code["tokenizer"], "--texts", folders["data"], *out),
    ):
        done = hf_prune(*command)
        if model in command:  # transformers has a tokenizer of its own for the other one
            assert (done.code, done.err[:7]) == (1, "error: "), command
    with pytest.raises(DataError, match="needs code of its own, which you trust, set trust_remote_code"):
        load_tokenizer(model)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoPrunedModelForSequenceClassification.from_pretrained(model)


def test_names_with_dollar_signs_in_plots(hf_prune, folders, tmp_path):
    """They would begin formulas, which fail to be drawn when everything else is done."""
    for name in ("$", "a$b$c", r"$\frac{$"):
        source = tmp_path / name
        shutil.copytree(folders["text"], source)
        done = hf_prune("prune", source, "--plots", "-q", "--out", tmp_path / f"out {name}")
        assert (done.code, done.err) == (0, "")
        assert (tmp_path / f"out {name}" / "weights.png").read_bytes().startswith(PNG)


def test_a_picture_that_fails_does_not_cost_the_checkpoint(hf_prune, folders, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(prune_workflow, "write_plots", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = hf_prune("prune", folders["text"], "--plots", "--out", tmp_path / "out")
    assert done.code == 0
    assert "warning: no plots, since drawing them failed (RuntimeError: no ink)" in done.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_names_of_strangers_do_not_control_the_terminal(hf_prune, folders, tmp_path):
    """Of folders, of classes, of labels: they are shown, in errors as in results."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202egpj.\x9b31m"
    done = hf_prune("report", f"./{evil}")
    assert done.code == 1
    assert r"\x1b]0;owned\x07\x1b[2J\u202egpj.\x9b31m" in done.err
    source = tmp_path / "a\x1b[2Jb"
    shutil.copytree(folders["text"], source)
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "architectures": ["Evil\x1b[31m"]})
    for command in (("report", source), ("evaluate", source, "--data", folders["data"])):
        done = hf_prune(*command)
        assert done.code == 1
        assert "\x1b" not in done.out + done.err
        assert r"\x1b[" in done.err
    write_json(source / "config.json", config)
    done = hf_prune("evaluate", source, "--data", folders["data"])
    assert (done.code, r"a\x1b[2Jb" in done.out, "\x1b" in done.out + done.err) == (0, True, False)
    assert printable("ä\tb\n€ 日本\r") == "ä\tb\n€ 日本\\r"


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "1",
        '"a"',
        '{"model_type": []}',
        '{"model_type": "bert", "architectures": "Bert"}',
        '{"model_type": "bert", "architectures": {"a": 1}}',
        '{"model_type": "bert", "architectures": [null]}',
        '{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_hidden_layers": "x"}',
        '{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": []}',
    ],
)
def test_configs_of_unexpected_shapes(hf_prune, folders, tmp_path, text):
    shutil.copytree(folders["text"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    for command in (("report",), ("prune", "--dry-run"), ("prune", "--stream", "--dry-run"), ("card",), ("verify",)):
        done = hf_prune(command[0], tmp_path / "model", *command[1:])
        assert (done.code, done.err[:7]) == (1, "error: "), command
