"""Imports inside hf_prune go one way, nothing executes data, and ``import hf_prune`` stays cheap."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hf_prune"

# A package imports only what stands before it in this line; imports under TYPE_CHECKING count.
LINE = (
    ("errors", "import_hook"),
    ("utils",),
    ("kernels",),
    ("architectures",),
    ("criteria", "granularities"),
    ("planning",),
    ("calibration",),
    ("pruning",),
    ("inference",),
    ("structured",),
    ("checkpoint",),
    ("pipeline",),
    ("evaluation",),
    ("hub",),
    ("conversion",),
    ("pruning_methods",),
    ("saving_mixin", "sentence_mixin"),
    ("mixin",),
    ("auto", "quantizer"),
    ("search",),
    ("training",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: number for number, names in enumerate(LINE) for name in names}
PACKAGES = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())
LONGEST = 300  # lines of a file
LONG_FILES = {  # with the reason
    "hf_prune.planning.config": "one dataclass, whose docstring documents every setting",
}
# Registries: one entry, one file, no file knows another.
FAMILIES = ("criteria", "granularities", "architectures.kinds", "architectures.families")

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
    if reads_yaml and module != "hf_prune.utils.front_matter":
        return f"imports {name}: YAML of strangers is read by utils.front_matter alone"
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
    if not target or target[0] not in PLACE:
        return f"imports {name}: name the module that defines it; a new package gets its place in LINE"
    if own[0] == target[0]:
        family = next((f.split(".") for f in FAMILIES if own[: f.count(".") + 1] == f.split(".")), None)
        if family is None or is_package or target[: len(family)] != family:
            return None
        if target[len(family) :][:1] not in (own[len(family) :][:1], ["base"], ["registry"]):
            folder = ".".join(family)
            return f"imports {name}: a file in {folder}/ may import only {folder}.base and {folder}.registry"
        return None
    if PLACE[target[0]] >= PLACE[own[0]]:
        return f"imports {name}: {target[0]} does not stand before {own[0]} in LINE"
    return None


def problems(source: str, module: str, is_package: bool = False) -> list[str]:
    """Everything in ``source`` that breaks a rule, one line each."""
    if module != "hf_prune" and module.split(".")[1] not in PLACE:
        return [f"{module} has no place: add {module.split('.')[1]!r} to LINE in tests/test_architecture.py"]
    found, local = [], {}
    nodes = list(ast.walk(ast.parse(source)))
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


SPACE_IMPORTS = {  # what the Space uses besides public names, and why
    "hf_prune.architectures.find_unit_groups.find_unit_groups": "its maps show heads and neurons",
    "hf_prune.checkpoint.building.limited_building": "strangers choose the models that it builds",
    "hf_prune.cli.demo.assets.prepare_demo": "its first model is the demo's",
    "hf_prune.cli.workflows.loading.load_for_task": "it refuses models and tokenizers that the commands refuse",
    "hf_prune.criteria.base.CURVATURE": "criteria that take too long are not offered",
    "hf_prune.criteria.base.LABELLED": "criteria that need labels are not offered",
    "hf_prune.criteria.base.TRAINED": "criteria that need a training are not offered",
    "hf_prune.evaluation.data.classification.context_length": "sentences are cut to what a model can read",
    "hf_prune.evaluation.tasks.ClassificationTask": "the task of load_for_task",
    "hf_prune.hub.checksums.checksums": "measurements on a card name the weights that they are of",
    "hf_prune.hub.checksums.weights_digest": "measurements on a card name the weights that they are of",
    "hf_prune.hub.describe.describe_model": "it previews the card that a push would write",
    "hf_prune.criteria.registry.unit_rankings": "criteria of units are offered with a line on each",
    "hf_prune.utils.figures.PALETTE": "its colours are those of the package's plots",
    "hf_prune.utils.figures.lines_of": "its trade-off shows the lines that the package's plots show",
    "hf_prune.utils.figures.save_figure": "cards recognise pictures by the mark that it writes",
    "hf_prune.utils.formatting.format_count": "it writes sizes as reports do",
    "hf_prune.utils.formatting.format_csv": "spreadsheets must not run cells as formulas",
}


def test_the_space_uses_public_names_but_for_these():
    public = set(importlib.import_module("hf_prune").__all__)
    used = set()
    for path in (ROOT.parent / "space").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used |= {name for name, _ in imported(node, f"space.{path.stem}", False) if name.startswith("hf_prune.")}
    assert {name for name in used if name.removeprefix("hf_prune.") not in public} == set(SPACE_IMPORTS)


# What they read is part of the package, was written by this very process, or is a file that the user names.
READ_WHOLE = {
    "checkpoint.packed.remote_code",
    "cli.commands.trim_vocab",
    "cli.demo.assets",
    "hub.card_text",
    "inference.acceleration.machine",
    "kernels.sparse.build",
    "planning.targets",
    "structured.vocabulary.tokenizer",
    "utils.staging",
}


def test_texts_of_others_are_read_by_one_function_that_has_a_limit():
    found = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
                found.add(module.removeprefix("hf_prune."))
    assert found == READ_WHOLE, "read it with hf_prune.utils.files.read_text"


def test_every_package_has_one_place():
    assert len(PLACE) == sum(len(names) for names in LINE)
    assert set(PACKAGES) <= set(PLACE)


def test_contributing_gives_the_same_line():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = " ".join(text[text.index("`errors`") : text.index("\n\n| package")].split()).split(" < ")
    assert [tuple(re.findall(r"`(\w+)`", step)) for step in steps] == list(LINE[:-1])  # but for __main__


def imports_inside(package: str) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports, under TYPE_CHECKING too."""
    inside = {name for name in SOURCES if name.startswith(f"hf_prune.{package}.")}
    graph = {}
    for module in inside:
        path = SOURCES[module]
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {name for node in nodes for name, _ in imported(node, module, path.name == "__init__.py")}
        graph[module] = {other for name in names for other in (name, name.rpartition(".")[0]) if other in inside} - {
            module
        }
    return graph


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, or an empty list: what is left when modules without imports are taken away."""
    graph = {module: set(others) for module, others in graph.items()}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    return sorted(graph)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_a_circle(package):
    assert find_circle(imports_inside(package)) == []


def test_find_circle():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert find_circle({"a": {"b"}, "b": {"a"}, "c": set()}) == ["a", "b"]


@pytest.mark.parametrize("module", SOURCES)
def test_files_are_short(module):
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    if module in LONG_FILES:
        assert lines > LONGEST, f"{module} is short now: take it out of LONG_FILES"
    else:
        assert lines <= LONGEST, f"{module} has {lines} lines: one idea a file, or say why not in LONG_FILES"


@pytest.mark.parametrize("package", [name for name, path in SOURCES.items() if path.name == "__init__.py"])
def test_every_package_says_what_happens_there(package):
    doc = ast.get_docstring(ast.parse(SOURCES[package].read_text(encoding="utf-8"))) or ""
    assert len(doc.split()) >= 20, (
        f"{package}: a paragraph on what it does, takes and gives, and where to add something"
    )


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("planning.a", "from hf_prune.pipeline import prune", "pipeline does not stand before planning in LINE"),
        ("planning.a", "import hf_prune.cli", "imports hf_prune.cli: cli does not stand"),
        ("planning.a", "from hf_prune import pipeline", "imports hf_prune.pipeline: pipeline"),
        ("planning.a", "from .. import pipeline", "imports hf_prune.pipeline: pipeline"),
        ("criteria.a", "from ..pipeline import prune", "imports hf_prune.pipeline.prune: pipeline"),
        (
            "planning.a",
            "def f():\n    from hf_prune.hub import push",
            "hf_prune.planning.a:2 imports hf_prune.hub.push: hub",
        ),
        ("planning.a", "if TYPE_CHECKING:\n    import hf_prune.hub", "imports hf_prune.hub: hub does not stand"),
        ("planning.a", "if x:\n    import hf_prune.hub", "imports hf_prune.hub: hub does not stand"),
        ("planning.a", "from hf_prune import prune", "name the module that defines it"),
        ("planning.a", "import hf_prune", "name the module that defines it"),
        ("criteria.a", "from hf_prune.granularities.base import G", "granularities does not stand before criteria"),
        ("granularities.a", "import hf_prune.criteria", "criteria does not stand before granularities"),
        ("criteria.a", "from hf_prune.criteria.b import B", "may import only criteria.base"),
        ("criteria.a", "from .b import B", "may import only criteria.base"),
        ("architectures.kinds.a", "from .b import B", "may import only architectures.kinds.base"),
        ("granularities.a", "from hf_prune.granularities import b", "may import only granularities.base"),
        ("novel.a", "", "hf_prune.novel.a has no place: add 'novel' to LINE"),
        ("planning.a", "import pickle", "imports pickle"),
        ("planning.a", "from pickle import loads", "imports pickle.loads"),
        ("planning.a", "import yaml", "imports yaml: YAML of strangers is read by utils.front_matter alone"),
        ("hub.a", "from yaml import safe_load", "imports yaml.safe_load: YAML"),
        ("hub.a", "from huggingface_hub import ModelCard", "imports huggingface_hub.ModelCard: YAML"),
        ("hub.a", "from huggingface_hub.repocard import metadata_load", "metadata_load: YAML"),
        ("planning.a", "import torch\ntorch.load('x')", "hf_prune.planning.a:2 calls torch.load"),
        ("planning.a", "import torch as t\nt.load('x')", "calls torch.load"),
        ("planning.a", "from torch import load as read\nread('x')", "calls torch.load"),
        ("planning.a", "import torch.nn\ntorch.load('x')", "calls torch.load"),
        ("planning.a", "eval('1')", "calls eval"),
        ("planning.a", "def f():\n    exec('1')", "hf_prune.planning.a:2 calls exec"),
        ("planning.a", "import numpy as np\nnp.load('x', allow_pickle=True)", "passes allow_pickle"),
    ],
)
def test_checker_finds(module, source, message):
    found = problems(source, f"hf_prune.{module}")
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline", "from hf_prune.planning.plan import PruningPlan\nfrom hf_prune.errors import PlanError"),
        ("planning.a", "from hf_prune.planning.b import B\nfrom .c import C"),
        ("planning.a", "import torch\nmodel.eval()\nmodel.load('x')"),
        ("planning.a", "import json\nfrom json import load\nload(f)"),
        ("checkpoint.a", "from hf_prune import __version__"),
        ("criteria.a", "from hf_prune.criteria.base import Criterion\nfrom .base import WeightStats"),
        ("criteria.a", "from hf_prune.criteria.registry import CRITERIA"),
        ("architectures.kinds.a", "from hf_prune.architectures.kinds.base import UnitKind"),
        ("architectures.kinds.a", "from hf_prune.architectures.layers import layer_lists"),
        ("utils.front_matter", "import yaml"),
        ("hub.a", "from huggingface_hub import ModelCardData"),
        ("cli.a", "from hf_prune.hub import client\nfrom hf_prune.criteria.magnitude import Magnitude"),
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
