"""Read and write the YAML metadata at the top of a card. All YAML in hf_prune is read here, since others wrote it.

The reader takes YAML 1.2 without anchors, aliases, merge keys and tags, half a kilobyte of which can expand to
gigabytes. Size and depth are limited, and anything wrong with it is a :class:`DataError`.
"""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from hf_prune.errors import DataError
from hf_prune.utils.files import read_text

MOST_CHARACTERS = 200_000  # cards with hundreds of benchmark results have less
MOST_VALUES = 10_000  # keys, values, lists and mappings; PyYAML reads them within a second
MOST_OF_A_CARD = 500_000  # characters of metadata and body
DEEPEST = 32  # levels of nesting
_FRONT = re.compile(r"\A\s*---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)  # as the Hub's own client finds it
_BOOL, _FLOAT, _INT, _MERGE, _VALUE = (
    f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "merge", "value")
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2, where ``no`` is a text, as the code of Norwegian, and so is ``12:30``."""

    depth = 0
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse(f"the anchor or alias {event.anchor!r}", event.start_mark)
        if event.tag is not None:
            self._refuse(f"the tag {event.tag!r}", event.start_mark)
        if self.depth == DEEPEST:
            self._refuse(f"more than {DEEPEST} levels", event.start_mark)
        if self.values == MOST_VALUES:
            self._refuse(f"more than {MOST_VALUES:,} values", event.start_mark)
        self.depth += 1
        self.values += 1
        try:
            node = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        if node.tag == _MERGE:
            self._refuse("the merge key '<<'", event.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):  # of two values PyYAML takes the last, other readers the first
            [(name, _)] = collections.Counter(str(key.value) for key, _ in node.value).most_common(1)
            self._refuse(f"the key {name!r} twice", node.start_mark)
        return mapping

    def _refuse(self, what: str, mark: Any) -> None:
        raise yaml.MarkedYAMLError(problem=f"{what[:80]}, which no card needs", problem_mark=mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT, _INT, _VALUE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    (_INT, r"[-+]?(?:0|[1-9][0-9]{0,299})\Z|0x[0-9a-fA-F]{1,300}\Z", "-+0123456789"),
    (_FLOAT, r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z",
     "-+.0123456789"),
):  # fmt: skip
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _float(loader: _Loader, node: Any) -> float:
    value = float(loader.construct_yaml_float(node))
    return math.nan if math.isnan(value) else value  # always the same object, so that containers with NaN compare equal


_Loader.add_constructor(_FLOAT, _float)


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, which the loader does not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_card(path: str | os.PathLike[str], *, errors: str = "strict") -> str:
    """Read the text of a card, up to a limit.

    Args:
        path: The file.
        errors: ``"replace"`` also reads files that are not in UTF-8.

    Raises:
        DataError: If it is too large, or not in UTF-8.
    """
    return read_text(path, most=4 * MOST_OF_A_CARD, errors=errors)  # a character has at most 4 bytes


def split_card(text: str, what: str = "the card so far") -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its body.

    Args:
        text: The card.
        what: What to call it in messages.

    Raises:
        DataError: If the metadata is not a YAML mapping, has anchors, aliases, merge keys, tags or a key twice, is
            nested too deeply, or if it or the card is too large.
    """
    if len(text) > MOST_OF_A_CARD:
        raise DataError(
            f"{what} has {len(text):,} characters: expected at most {MOST_OF_A_CARD:,}; correct README.md first"
        )
    text = text.removeprefix("\N{BOM}").replace("\r\n", "\n").replace("\r", "\n")
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    metadata = read_yaml(match[1], f"the metadata of {what}", "correct README.md first") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"the metadata of {what} is not a mapping: correct README.md first")
    return metadata, text[match.end() :]


def join_card(metadata: Mapping[str, Any], body: str) -> str:
    """The inverse of :func:`split_card`."""
    return f"---\n{dump_yaml(metadata)}---\n\n{body.lstrip()}" if metadata else body.lstrip()


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that :func:`read_yaml` reads, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def read_yaml(text: str, what: str, advice: str) -> Any:
    """Parse a YAML text.

    Args:
        text: The text.
        what: What to call it in messages.
        advice: What to do if it cannot be read, for messages.

    Raises:
        DataError: As for the metadata in :func:`split_card`.
    """
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"{what} has {len(text):,} characters: expected at most {MOST_CHARACTERS:,}; {advice}")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # month 13 is a ValueError
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{what} is not valid YAML: {reason}; {advice}") from error
