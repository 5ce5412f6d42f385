"""The pages of the documentation, and what stands in their fenced blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Languages of blocks that run, and of those that only show something.
RUN, SHOWN = ("python", "sh"), ("text", "json", "yaml", "toml", "html", "mermaid")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines without their indentation, and the number of its first line."""

    language: str
    code: str
    line: int


def page_name(path: Path) -> str:
    """``docs/guides/train.md``, say."""
    return path.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
        found.append(Block(match["language"], code, text.count("\n", 0, match.start("code")) + 1))
    return found


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block, as lists of words; comments are no part of them."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
