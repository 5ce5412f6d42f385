"""The text and metadata around our part of a card, which must neither hide that part nor contradict it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from hf_prune.utils.front_matter import split_card

BEGIN, END = "<!-- hf_prune: begin -->", "<!-- hf_prune: end -->"
FACTS = "hf_prune"  # the key of the facts in the metadata

# A heading or plain paragraph. Much else before our part could go on into it, in some reader of Markdown.
_LINE = re.compile(r"(?:#{1,6} )?[^\W\d_][^<>`$\[\]|~\\{}^]*")
_MOST_BEFORE = 2_000
_TAGS = re.compile(r"<\s*/?(?:style|script|link|base|meta|frameset)\b", re.IGNORECASE)  # act on the whole page
_TELLING = frozenset(
    {"modelindex", "evalresult", "evalresults", "evaluation", "evaluationresults", "result", "results", "benchmark",
     "benchmarks", "accuracy", "perplexity", "score", "scores", "f1"}
)  # fmt: skip
_METRIC = re.compile(r"[A-Za-z][\w/-]*")
# Words that can be added to the name of data without meaning other data.
_ANY = frozenset(
    "train training validation valid val dev test split set dataset data corpus task"
    " glue superglue the accuracy acc perplexity benchmark official original"
    " binary english en version v v1 full".split()
)
_NO_NUMBER = "…"  # stands for any number at the end of initials
_LOOKS = str.maketrans("авекмнорстухіјѕԁһԛԝγαβενικορτυχ", "abekmhopctyxijsdhqwyabevikoptux")  # Cyrillic, Greek
# Styles that move an element to another place, and escapes in which they could be hidden.
_MOVES = r"(?:position\s*:|z-index|(?<![\w-])transform|margin[a-z-]*\s*:[^;]{0,20}-|\\|&#|/\*)"
_REACH = re.compile(  # a tag outside of our part that is shown over it
    rf"""<[a-z][^<>]{{0,2000}}\sstyle\s*=\s*(?:"[^"]{{0,2000}}?{_MOVES}|'[^']{{0,2000}}?{_MOVES}|[^\s>]{{0,200}}?{_MOVES})""",
    re.IGNORECASE,
)


def surroundings(text: str) -> Iterator[tuple[str, Any, Any]]:
    """Check the surroundings of our part.

    Args:
        text: The card.

    Yields:
        Name of the check, value in the card, and expected value; the two differ where something is wrong.

    Raises:
        DataError: If its metadata cannot be read.
    """
    metadata, body = split_card(text)
    for mark in (BEGIN, END):
        yield f"marks {mark[5:-4]}", text.count(mark), 1
    problem = not_plain(body.partition(BEGIN)[0])
    shown = "plain" if problem is None else f"{problem}, which can hide it: move it below"
    yield "text before our part", shown, "plain"
    tag = _TAGS.search(body) or _REACH.search(body)
    yield "tags that change our part", tag[0] if tag else "none", "none"
    facts = metadata.get(FACTS)
    score = facts.get("score") if isinstance(facts, dict) else None
    if isinstance(facts, dict) and "license" in facts:
        yield "license in the metadata", metadata.get("license"), facts["license"]
    if isinstance(score, dict) and ("dataset" in score or "data" in score):
        yield from _other_results(metadata, score)


def not_plain(before: str) -> str | None:
    """What in a text could change how the text below is shown, if it is more than headings and plain paragraphs."""
    if len(before.strip()) > _MOST_BEFORE:
        return f"{len(before.strip()):,} characters"
    for line in before.split("\n"):
        if line.strip(" \t") and not (_LINE.fullmatch(line) and line.isprintable()):
            return repr(line.strip()[:60])
    if before.rpartition("\n")[2]:
        return "text or space on the line where our part begins"
    return None


def parts_of(body: str) -> tuple[str, str, str] | None:
    """The body of a card before our part, our part, and the body after it; None without our part."""
    before, _, rest = body.partition(BEGIN)
    ours, end, after = rest.partition(END)
    return (before, f"{BEGIN}{ours}{END}", after) if end else None


def results_of(index: Any, score: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The results in a ``model-index`` with the data and metric of a card's score, and their values.

    Args:
        index: The ``model-index``; malformed entries are ignored.
        score: The score in a card's facts.
    """
    kind, results = "accuracy" if "accuracy" in score else "perplexity", []
    kind = str(score["metric"]).lower() if "metric" in score else kind
    for _, result in _each_result(index):
        try:
            values = [metric["value"] for metric in result["metrics"] if metric["type"] == kind]
            if values and result["dataset"]["type"] == score["dataset"]:
                results.append((result, values[0]))
        except (KeyError, TypeError):
            continue
    return results


def in_any_order(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for a comparison that ignores the order of results and their grouping into entries."""
    if "model-index" not in metadata:
        return dict(metadata)
    results = sorted(repr(_sorted(result)) for result in _each_result(metadata["model-index"]))
    return {**metadata, "model-index": results}


def other_data(text: str) -> list[str]:
    """The names of the data in the author's own results."""
    metadata = split_card(text)[0]
    facts = metadata.get(FACTS)
    score = facts.get("score") if isinstance(facts, dict) else None
    index = metadata.get("model-index")
    ours = [id(result) for result, _ in results_of(index, score)] if isinstance(score, dict) else []
    names = []
    for _, result in _each_result(index):
        if id(result) not in ours and isinstance(result, dict) and isinstance(data := result.get("dataset"), dict):
            names.append(str(data.get("name", data.get("type")))[:60])
    return list(dict.fromkeys(names))


def _other_results(metadata: Mapping[str, Any], score: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    index = metadata.get("model-index")
    ours = [id(result) for result, _ in results_of(index, score)][:1]
    for key, value in metadata.items():
        name = _letters(str(key))
        if name in ("metric", "metrics"):
            metrics = value if isinstance(value, list) else [value]
            harmless = value is None or all(isinstance(m, str) and _METRIC.fullmatch(m) for m in metrics)
        else:
            harmless = key == "model-index" or name not in _TELLING
        if not harmless:
            yield f"results under {key!r} in the metadata", str(value)[:60], "none"
    for entry, result in _each_result(index):
        if id(result) in ours:
            yield "metrics of our result", len(result["metrics"]), 1
        elif not _is_shaped(entry, result):
            yield "a result that is not as the Hub has it", str(result)[:60], "task, dataset and metrics"
        elif _same_data(result, str(score.get("dataset", score.get("data")))):
            yield "another result on the same data", str(result.get("metrics"))[:60], "none"


def _each_result(index: Any) -> Iterator[tuple[Any, Any]]:
    """Every result, with its entry without results; a malformed entry counts as a result."""
    for entry in index if isinstance(index, list) else [] if index is None else [index]:
        results = entry.get("results") if isinstance(entry, dict) else None
        if isinstance(results, list):
            rest = {key: value for key, value in entry.items() if key != "results"}
            yield from ((rest, result) for result in results)
        else:
            yield {}, entry


def _is_shaped(entry: Mapping[str, Any], result: Any) -> bool:
    if not isinstance(result, dict) or not {"name"}.issuperset(entry):
        return False
    data, metrics = result.get("dataset"), result.get("metrics")
    return (
        {"task", "dataset", "metrics", "source"}.issuperset(result)
        and isinstance(data, dict)
        and isinstance(data.get("type"), str)
        and isinstance(data.get("name", ""), str)
        and {"type", "name", "config", "split", "revision", "args"}.issuperset(data)
        and isinstance(metrics, list)
        and all(isinstance(m, dict) and isinstance(m.get("type"), str) and "value" in m for m in metrics)
    )


def _same_data(result: Mapping[str, Any], dataset: str) -> bool:
    """Whether a result is about our data, however it is spelled and wherever the result says so."""
    data = result["dataset"]
    if not data["type"].isascii():  # not a Hub id, so it may imitate one
        return True
    ours = {_letters(dataset), _letters(dataset.rpartition("/")[2])}
    ours |= {name.rstrip("0123456789") + _NO_NUMBER for name in ours}
    owner = _letters(dataset.rpartition("/")[0])
    named = [result.get("task"), *({k: v for k, v in m.items() if k != "value"} for m in result["metrics"])]
    return any(_is_mixed(text) or ours & _spellings(text, owner) for text in _texts(data)) or any(
        _is_mixed(text) or ours & _runs(text) for text in _texts(named)
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    else:
        yield unicodedata.normalize("NFKC", str(value))


def _spellings(text: str, owner: str) -> set[str]:
    """The names that a text can stand for: without filler words, and as initials."""
    names = {_letters(text), _letters(text.rpartition("/")[2])}
    for cut in (r"[\W_]+", r"[\s_]+"):
        words = [_letters(word) for word in re.split(cut, text)]
        words = [word for word in words if word and word not in _ANY and word != owner]
        names.add("".join(words))
        long = [word for word in words if not re.fullmatch(r"v?\d+", word)]
        if len(long) > 2:  # Stanford Sentiment Treebank v2
            initials = "".join(word[0] for word in long)
            names.add(initials + ("".join(w.removeprefix("v") for w in words if w not in long) or _NO_NUMBER))
    return names


def _runs(text: str) -> set[str]:
    """The words of a text, and every two or three consecutive words as one."""
    words = [word for word in map(_letters, re.split(r"[\W_]+", text)) if word]
    return {"".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words))}


def _is_mixed(text: str) -> bool:
    """Whether a word mixes Latin letters with those of a script that has similar ones."""
    for word in re.findall(r"\w+", text):
        scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in word if letter.isalpha()}
        if "LATIN" in scripts and scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "LISU", "COPTIC"}:
            return True
    return False


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold().translate(_LOOKS))
    return "".join(filter(str.isalnum, plain))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted(((str(key), _sorted(item)) for key, item in value.items()), key=lambda pair: pair[0])
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
