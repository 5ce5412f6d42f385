"""Every public name that one calls or builds has an example that runs."""

import inspect
import re

import pytest

import hf_prune
from hf_prune.utils.results import Result
from tests.docs.pages import PAGES, ROOT, blocks_of

ADDING = sorted((ROOT / "hf_prune").rglob("ADDING.md"))  # whose blocks tests/contracts/test_adding.py runs


def is_given(name):
    """Whether functions give or raise it: a result, an error, or a class that differs from others only in its task."""
    thing = getattr(hf_prune, name)
    if not inspect.isclass(thing):
        return False
    return issubclass(thing, Result | Exception) or name.startswith("AutoPrunedModelFor")


@pytest.fixture(scope="module")
def shown():
    texts = [page.read_text(encoding="utf-8") for page in (*PAGES, *ADDING)]
    return set(re.findall(r"\w+", "\n".join(b.code for t in texts for b in blocks_of(t) if b.language == "python")))


#: What needs a package that is not installed everywhere, and the extra that brings it.
EXTRAS = {
    "ExportedModel": "onnx",
    "export_gguf": "gguf",
    "compare_benchmarks": "lm-eval",
    "evaluate_benchmarks": "lm-eval",
}
#: Parts of results and of entries, which nobody builds by hand, and what they are part of.
PARTS = {
    "Channels": "register_architecture",
    "Generation": "GenerationComparison",
    "LatencyPoint": "LatencyResult",
    "LotteryRound": "LotteryResult",
    "Preset": "PRESETS",
    "PruningCardData": "read_card_data",
    "SearchPoint": "SearchResult",
    "SweepPoint": "SweepResult",
    "UnitsOfKind": "UnitDescription",
}


@pytest.mark.parametrize("name", [name for name in hf_prune.__all__ if not name.startswith("__")])
def test_a_public_name_has_an_example(name, shown):
    if is_given(name) or name in PARTS or name in EXTRAS:
        assert inspect.getdoc(getattr(hf_prune, name))
        return
    doc = inspect.getdoc(getattr(hf_prune, name)) or ""
    runs = any(line.startswith(">>>") and "+SKIP" not in line for line in map(str.strip, doc.splitlines()))
    assert name in shown or runs, f"show {name} in a python block of docs/examples.md"


def test_the_parts_are_public_and_so_is_what_they_are_part_of():
    assert {*PARTS, *PARTS.values()} <= set(hf_prune.__all__)
