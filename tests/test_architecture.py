"""Imports inside hf_prune go one way, nothing executes data, and ``import hf_prune`` stays cheap."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hf_prune"

# A module imports from its own layer and from earlier ones, never from a later one.
# A name stands for its submodules too: "criteria" is every module in hf_prune/criteria/.
LAYERS = (
    (
        "errors",
        "files",
        "front_matter",
        "loading_hook",
        "notices",
        "offloading",
        "overlap",
        "packed_format",
        "spill",
        "structure",
        "tables",
        "tainted",
        "unpacking",
    ),
    (
        "distributed",
        "packed_loading",
        "outputs",
        "packing",
        "partial",
        "progress",
        "quantized",
        "registry",
        "schedules",
        "repair",
        "selection",
        "shards",
        "sums",
        "timing",
        "unit_budget",
        "unit_curves",
        "units",
        "wrapping",
    ),
    ("config", "packed_files", "remote_code"),
    ("targets", "architectures", "parts", "channels", "sites"),
    ("criteria", "granularities", "allocation"),
    (
        "activations",
        "building",
        "bypass",
        "calibration",
        "dense_outputs",
        "fisher",
        "layer_budgets",
        "masking",
        "matching",
        "padding",
        "plan",
        "polish",
        "replay",
        "running",
        "scoring",
        "sensitivity",
        "sequential",
        "shrinking",
        "speed",
        "stepwise",
        "structured",
        "unit_costs",
        "unit_plan",
        "unit_reconstruction",
        "unit_statistics",
        "texts",
        "tokenizer_trim",
        "vocabulary",
        "vocabulary_rows",
    ),
    ("pipeline", "distillation"),
    (
        "adoption",
        "report",
        "structures",
        "calibration_data",
        "data_files",
        "data_loading",
        "sources",
        "comparison",
        "compressed",
        "evaluation",
        "perplexity",
        "explain",
        "export",
        "latency",
        "latency_inputs",
        "torch_prune",
        "training",
        "checkpoint",
        "card_checks",
        "card_surroundings",
        "card_data",
        "card_text",
        "cards",
        "card_renewal",
        "hub",
        "migration",
        "plots",
        "training_facts",
        "training_state",
    ),
    (
        "verification",
        "push",
        "mixin",
        "quantizer",
        "auto",
        "trainer",
        "lora",
        "sweep",
        "budget",
        "skeleton",
        "stream",
        "stream_blocks",
        "stream_output",
    ),
    (
        "bench",
        "demo_data",
        "demo_training",
        "demo",
        "lottery",
        "trim_workflow",
        "train_workflow",
        "workflows",
    ),
    ("cli_options", "cli_card", "cli_compress", "cli_hub", "cli_space", "cli_speed", "cli_train", "cli_trim", "cli"),
    ("__main__",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
FAMILIES = ("criteria", "granularities")  # registries: one entry, one file, no file knows another

FORBIDDEN_MODULES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "torch.serialization.load")
YAML_READERS = (
    "RepoCard",
    "ModelCard",
    "DatasetCard",
    "SpaceCard",
    "metadata_load",
    "metadata_update",
    "metadata_save",
)
HEAVY = ("torch", "transformers", "gradio", "matplotlib")


def module_name(path: Path) -> str:
    """hf_prune/criteria/base.py -> hf_prune.criteria.base"""
    parts = ("hf_prune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node``, function bodies included, except what only a type checker sees."""
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield child
        yield from runtime_nodes(child)


def imported(node: ast.AST, module: str, is_package: bool) -> list[tuple[str, str]]:
    """(dotted name, local name) of everything an import statement brings in; empty for any other node."""
    if isinstance(node, ast.Import):
        return [(a.name, a.asname or a.name.partition(".")[0]) for a in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = module.split(".") if is_package else module.split(".")[:-1]
    base = parents[: len(parents) - node.level + 1] if node.level else []
    prefix = ".".join([*base, *([node.module] if node.module else [])])
    return [(f"{prefix}.{a.name}", a.asname or a.name) for a in node.names]


def unsafe_import(module: str, name: str) -> str | None:
    """Why nobody but a module made for it may import the dotted ``name``, or None."""
    if name.partition(".")[0] in FORBIDDEN_MODULES:
        return f"imports {name}: unpickling runs code from the file, use safetensors or JSON"
    reads_yaml = name.partition(".")[0] in ("yaml", "ruamel") or name.rpartition(".")[2] in YAML_READERS
    if reads_yaml and module != "hf_prune.front_matter":
        return f"imports {name}: YAML of strangers is read by front_matter alone"
    return None


def import_problem(module: str, name: str, is_package: bool) -> str | None:
    """Why ``module`` may not import the dotted ``name``, or None if it may."""
    if (unsafe := unsafe_import(module, name)) is not None:
        return unsafe
    parts = name.split(".")
    if parts[0] != "hf_prune" or module == "hf_prune":  # the top package names everything, lazily
        return None
    if name == "hf_prune.__version__":
        return None
    own, target = module.split(".")[1:], parts[1:]
    if not target or target[0] not in LAYER_OF:
        return f"imports {name}: name the module that defines it; if that is new, add it to LAYERS"
    if LAYER_OF[target[0]] > LAYER_OF[own[0]]:
        return f"imports {name}: layer {LAYER_OF[target[0]]} comes after its own layer {LAYER_OF[own[0]]}"
    if own[0] in FAMILIES and target[0] in FAMILIES:
        if own[0] != target[0]:
            return f"imports {name}: criteria and granularities never import each other"
        if not is_package and target[1:2] not in ([own[1]], ["base"]):
            return f"imports {name}: a file in {own[0]}/ may import only {own[0]}.base"
    return None


def problems(source: str, module: str, is_package: bool = False) -> list[str]:
    """Everything in ``source`` that breaks a rule, one line each."""
    if module != "hf_prune" and module.split(".")[1] not in LAYER_OF:
        return [f"{module} is in no layer: add {module.split('.')[1]!r} to LAYERS in tests/test_architecture.py"]
    found, local = [], {}
    nodes = list(runtime_nodes(ast.parse(source)))
    for node in nodes:
        for name, alias in imported(node, module, is_package):
            if reason := import_problem(module, name, is_package):
                found.append(f"{module}:{node.lineno} {reason}")
            plain = isinstance(node, ast.Import) and alias == name.partition(".")[0]
            local[alias] = alias if plain else name
    for node in nodes:
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            called = local.get(head, head) + dot + rest
            if called in FORBIDDEN_CALLS:
                found.append(f"{module}:{node.lineno} calls {called}: it runs code that comes from outside")
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"{module}:{node.lineno} passes allow_pickle: it runs code that comes from outside")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_module_keeps_the_rules(module):
    path = SOURCES[module]
    assert problems(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


def calls_that_may_run_code(source: str) -> list[int]:
    """Lines that load or build by a class that data may choose, without saying that code beside it is not run.

    Not so where the class is that of an object that is there, or that this one is derived from.
    """
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in ("from_pretrained", "from_config"):
            continue
        if ast.unparse(node.value).startswith(("type(", "super(")):
            continue
        call, function = parents[node], parents[node]
        while not isinstance(function, ast.FunctionDef | ast.Module):
            function = parents[function]
        said = {k.arg for k in call.keywords} if isinstance(call, ast.Call) else set()
        by_default = None in said and "kwargs.setdefault('trust_remote_code', False)" in ast.unparse(function)
        if "trust_remote_code" not in said and not by_default:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "space").glob("*.py")]), ids=str)
def test_loading_runs_no_code_of_a_checkpoint_unless_told_to(path):
    assert calls_that_may_run_code(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("AutoModel.from_pretrained(x)", [1]),
        ("cls.from_pretrained(x, **kwargs)", [1]),
        ("load(auto.from_pretrained, x)", [1]),
        ("load = auto.from_config", [1]),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", []),
        ("load(auto.from_pretrained, x, trust_remote_code=False)", []),
        ("type(model).from_pretrained(x)", []),
        ("def f(**kwargs):\n kwargs.setdefault('trust_remote_code', False)\n a.from_config(x, **kwargs)", []),
    ],
)
def test_the_search_for_loading_that_may_run_code(source, lines):
    assert calls_that_may_run_code(source) == lines


@pytest.mark.parametrize("path", sorted((ROOT.parent / "space").glob("*.py")), ids=lambda path: path.stem)
def test_the_space_unpickles_nothing_and_reads_no_yaml(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [name for node in nodes for name, _ in imported(node, f"space.{path.stem}", False)]
    assert [each for each in (unsafe_import(f"space.{path.stem}", name) for name in names) if each] == []
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert called.isdisjoint(FORBIDDEN_CALLS)


# What they read is part of the package, was written by this very process, or is a file that the user names.
READ_WHOLE = {
    "card_text",
    "checkpoint",
    "cli_options",
    "cli_trim",
    "demo",
    "files",
    "remote_code",
    "targets",
    "tokenizer_trim",
}


def test_texts_of_others_are_read_by_one_function_that_has_a_limit():
    found = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
                found.add(module.removeprefix("hf_prune."))
    assert found == READ_WHOLE, "read it with hf_prune.files.read_text"


def test_no_name_is_in_two_layers():
    assert len(LAYER_OF) == sum(len(names) for names in LAYERS)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("plan", "from hf_prune.pipeline import prune", "layer 6 comes after its own layer 5"),
        ("plan", "import hf_prune.cli", "imports hf_prune.cli: layer 10"),
        ("plan", "from hf_prune import pipeline", "imports hf_prune.pipeline: layer 6"),
        ("plan", "from . import pipeline", "imports hf_prune.pipeline: layer 6"),
        ("criteria.a", "from ..pipeline import prune", "imports hf_prune.pipeline.prune: layer 6"),
        ("plan", "def f():\n    from hf_prune.hub import push", "hf_prune.plan:2 imports hf_prune.hub.push: layer 7"),
        ("plan", "if TYPE_CHECKING:\n    pass\nelse:\n    import hf_prune.hub", "imports hf_prune.hub: layer 7"),
        ("plan", "if x:\n    import hf_prune.hub", "imports hf_prune.hub: layer 7"),
        ("plan", "from hf_prune import prune", "name the module that defines it"),
        ("plan", "import hf_prune", "name the module that defines it"),
        ("criteria.a", "from hf_prune.granularities.base import G", "never import each other"),
        ("granularities.a", "import hf_prune.criteria", "never import each other"),
        ("criteria.a", "from hf_prune.criteria.b import B", "may import only criteria.base"),
        ("criteria.a", "from .b import B", "may import only criteria.base"),
        ("granularities.a", "from hf_prune.granularities import b", "may import only granularities.base"),
        ("novel", "", "hf_prune.novel is in no layer: add 'novel' to LAYERS"),
        ("plan", "import pickle", "imports pickle"),
        ("plan", "from pickle import loads", "imports pickle.loads"),
        ("plan", "import yaml", "imports yaml: YAML of strangers is read by front_matter alone"),
        ("cards", "from yaml import safe_load", "imports yaml.safe_load: YAML"),
        ("cards", "from huggingface_hub import ModelCard", "imports huggingface_hub.ModelCard: YAML"),
        ("cards", "from huggingface_hub.repocard import metadata_load", "metadata_load: YAML"),
        ("plan", "import torch\ntorch.load('x')", "hf_prune.plan:2 calls torch.load"),
        ("plan", "import torch as t\nt.load('x')", "calls torch.load"),
        ("plan", "from torch import load as read\nread('x')", "calls torch.load"),
        ("plan", "import torch.nn\ntorch.load('x')", "calls torch.load"),
        ("plan", "eval('1')", "calls eval"),
        ("plan", "def f():\n    exec('1')", "hf_prune.plan:2 calls exec"),
        ("plan", "import numpy as np\nnp.load('x', allow_pickle=True)", "passes allow_pickle"),
    ],
)
def test_checker_finds(module, source, message):
    found = problems(source, f"hf_prune.{module}")
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from hf_prune.masking import MaskStore\nfrom hf_prune.errors import PlanError"),
        ("plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_prune.hub import push"),
        ("plan", "import typing\nif typing.TYPE_CHECKING:\n    from hf_prune.hub import push"),
        ("plan", "import torch\nmodel.eval()\nmodel.load('x')"),
        ("plan", "import json\nfrom json import load\nload(f)"),
        ("checkpoint", "from hf_prune import __version__"),
        ("criteria.a", "from hf_prune.criteria.base import Criterion\nfrom .base import WeightStats"),
        ("front_matter", "import yaml"),
        ("cards", "from huggingface_hub import ModelCardData"),
        ("cli", "from hf_prune import hub\nfrom hf_prune.criteria.magnitude import Magnitude"),
    ],
)
def test_checker_allows(module, source):
    assert problems(source, f"hf_prune.{module}") == []


def test_checker_lets_a_family_package_name_its_files():
    assert problems("from hf_prune.criteria import base, magnitude", "hf_prune.criteria", is_package=True) == []


def test_import_is_cheap():
    code = f"import sys, hf_prune; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_public_names_resolve_and_are_documented():
    package = importlib.import_module("hf_prune")
    assert len(set(package.__all__)) == len(package.__all__) > 0
    for name in package.__all__:
        doc = getattr(package, name).__doc__  # an AttributeError names the culprit
        assert doc, f"{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes up"
