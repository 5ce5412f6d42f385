"""What the pages claim is there: links, cards of methods, messages, numbers; and the README stays short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hf_prune import CRITERIA, GRANULARITIES
from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.criteria.registry import unit_rankings
from hf_prune.planning.choices import ALLOCATIONS, REPAIRS
from hf_prune.planning.schedule import schedule_names
from tests.docs.pages import PAGES, ROOT, page_name

METHODS = ROOT / "docs" / "methods"
SCHEDULES = schedule_names()  # before examples register theirs
_LINK = re.compile(r"""(?:\]\(|\bsrc(?:set)?=")([^)"\s]+)""")


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchors(text: str) -> set[str]:
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in headings(text)}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    generated = {
        ROOT / "docs/about/security.md",
        *(ROOT / "docs/extend" / f"{n}.md" for n in ("architecture", "criterion")),
    }
    generated |= {ROOT / "docs/reference/index.md", ROOT / "docs/reference/command-line.md"}
    for link in _LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        place = (page.parent / target).resolve() if target else page
        assert place.exists() or place in generated, link
        if anchor and place.is_file():
            assert anchor in anchors(place.read_text(encoding="utf-8")), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("criteria.md", [*CRITERIA.names(), *unit_rankings()]),
        ("granularities.md", [*GRANULARITIES.names(), *unit_descriptions()]),
        ("repair.md", REPAIRS),
        ("allocation.md", ALLOCATIONS),
    ],
)
def test_every_method_has_a_card(page, names):
    assert set(names) <= set(headings((METHODS / page).read_text(encoding="utf-8")))


def test_every_schedule_is_explained():
    text = (METHODS / "allocation.md").read_text(encoding="utf-8")
    assert [name for name in SCHEDULES if f"| `{name}` |" not in text] == []


def test_cards_name_the_papers_of_the_code():
    text = (METHODS / "criteria.md").read_text(encoding="utf-8")
    cited = [CRITERIA.get(name).paper for name in CRITERIA.names()]
    cited += [ranking.paper for ranking in unit_rankings().values()]
    numbers = {number for paper in cited for number in re.findall(r"arXiv:(\d{4}\.\d{5})", paper)}
    assert len(numbers) > 10
    assert [number for number in sorted(numbers) if f"https://arxiv.org/abs/{number}" not in text] == []


def texts_of(path: Path) -> str:
    """All string constants of a file, those of f-strings included."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_messages_are_those_of_the_code():
    """Each part of a heading of the troubleshooting page, between the gaps, stands in one file of the package."""
    sources = [re.sub(r"\s+", " ", texts_of(path)) for path in (ROOT / "hf_prune").rglob("*.py")]
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    text = text.partition("## After pruning")[0]  # symptoms, not messages
    messages = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip(" ,:")]
        assert any(all(part in source for part in parts) for source in sources), message
