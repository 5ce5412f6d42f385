"""The three numbers of a pruned model beside the dense one's, what they mean in words, and tables. All of it HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from session import Session

from hf_prune.utils.formatting import format_count

EMPTY = "Nothing is pruned yet. Say what you want, and press **Prune**: the numbers of both models then stand here."
UNTIMED = "Nothing was timed yet: press the button."


def numbers(session: Session | None) -> str:
    """Accuracy, file size and speed: large, with their errors, and the dense model's beneath."""
    if session is None:
        cards = [_card(title, "–", "", "of both models") for title in ("Accuracy", "File size", "Speed")]
    else:
        cards = [_accuracy(session.measured), _file(session.facts), _speed(session.measured)]
    return f"<div class='numbers'>{''.join(cards)}</div>"


def _card(title: str, big: str, small: str, beneath: str) -> str:
    kind = "number none" if big == "–" else "number"
    unit = f" <small>{small}</small>" if small else ""
    return f"<div class='{kind}'><h3>{title}</h3><div class='big'>{big}{unit}</div><p>{beneath}</p></div>"


def _accuracy(measured: Mapping[str, Any]) -> str:
    if "agreement" in measured:
        same, n = measured["agreement"]
        return _card(
            "Same answers", f"{same}", f"of {n}", "sentences get the dense model's answer; there are no labels"
        )
    if "evaluation" not in measured:
        return _card("Accuracy", "–", "", "not measured yet")
    c = measured["evaluation"]["comparison"]
    share, n = c["pruned_accuracy"], c["n"]
    error = 100 * (share * (1 - share) / n) ** 0.5
    change = f"{c['drop']:.1f} points lost" if c["drop"] >= 0 else f"{-c['drop']:.1f} points gained"
    return _card(
        "Accuracy",
        f"{100 * share:.1f}",
        f"± {error:.1f} %",
        f"dense {100 * c['dense_accuracy']:.1f} %<br>{change}, ± {c['drop_standard_error']:.1f}; n\u00a0=\u00a0{n}",
    )


def _file(facts: Mapping[str, Any]) -> str:
    before, after = facts["file_bytes_before"], facts["file_bytes_compressed"]
    return _card(
        "File size",
        *_bytes(after).split(" ", 1),
        f"dense {_bytes(before)}<br>{before / max(after, 1):.2f} times smaller, compressed",
    )


def _speed(measured: Mapping[str, Any]) -> str:
    if "plain" not in measured:
        return _card("Speed", "–", "", "not measured yet")
    timed = faster_with_kernels(measured) or measured["plain"]
    how = "with <code>accelerate()</code>" if timed is measured.get("kernels") else "one sentence at a time"
    return _card(
        "Speed",
        f"{timed['value']:.2f}×",
        "" if timed["is_real"] else "within the noise",
        f"dense {1e3 * timed['dense_seconds']:.1f} ms<br>pruned {1e3 * timed['seconds']:.1f} ms<br>"
        f"95 % interval {timed['low']:.2f} to {timed['high']:.2f}; {how}",
    )


def faster_with_kernels(measured: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What hf_prune's kernels brought, if with them the model is faster than the dense one; else None."""
    kernels = measured.get("kernels")
    gains = kernels is not None and "value" in kernels and kernels["is_real"] and kernels["value"] > 1
    return kernels if gains else None


def summary(session: Session) -> str:
    """What was pruned, and what the numbers mean, as Markdown."""
    facts, name = session.facts, escape(session.name, quote=False)
    before, after = facts["parameters_before"], facts["nonzero"]
    lines = [
        f"**{name}** is pruned, in {facts['seconds']:.1f} s: **{after:,} of {before:,}** parameters are left and not "
        f"zero ({100 * (1 - after / before):.1f} % gone)."
    ]
    if session.layers is not None:
        counts = [(count, kind) for kind, count in session.removed_units.items() if count]
        units = [f"{count:,} {kind}{'s' if count > 1 else ''}" for count, kind in counts]
        layers = [f"{before - now} of {before} layers" for now, before in session.layers if now < before]
        lines.append(f"Removed: {', '.join([*units, *layers]) or 'nothing'}. It is really smaller.")
    elif "kernels" not in session.measured:
        lines.append("Zeros make the file smaller. Whether they make it faster as well is measured.")
    else:
        lines.append(_what_zeros_bring(session.measured))
    evaluation = session.measured.get("evaluation")
    if evaluation and evaluation["comparison"]["doubt"]:
        lines.insert(0, f"**Warning:** {escape(evaluation['comparison']['doubt'])}.")
    lines.append("Go on: **2 See** what is left, **3 Compare** its answers, **5 Publish** it.")
    return "\n\n".join(lines)


def _what_zeros_bring(measured: Mapping[str, Any]) -> str:
    plain = f"PyTorch multiplies by zeros as by any other number: {_ratio(measured['plain'])}."
    kernels = measured["kernels"]
    if "reason" in kernels:
        return f"{plain} hf_prune has kernels that skip them, but here: {escape(kernels['reason'])}"
    against = f"{_ratio(kernels)}, both models with the fastest kernels for each layer, on {escape(kernels['cpu'])}"
    if faster_with_kernels(measured):
        return f"{plain} hf_prune's kernels skip them: with `model.accelerate()` it is **{against}**."
    return f"{plain} With hf_prune's kernels, which skip them, it is no faster either at this sparsity: {against}."


def _ratio(timed: Mapping[str, Any]) -> str:
    interval = f"95 % interval {timed['low']:.2f} to {timed['high']:.2f}"
    return f"{timed['value']:.2f} times as fast as the dense one ({interval})"


def speed_words(session: Session) -> str:
    """Whether it is faster, and why or why not, as Markdown."""
    lines = [escape(line, quote=False) for line in session.reasons]
    if "latency" not in session.measured:
        return "\n\n".join([*lines, UNTIMED])
    timed = session.measured["latency"]
    if "kernels" in session.measured:
        lines.append(_what_zeros_bring(session.measured))
    lines.append(
        f"{timed['rounds']} rounds in turns, {timed['dtype']}, {timed['device']}, {timed['threads']} thread(s). "
        + " ".join(session.measured["doubts"])
    )
    return "\n\n".join(lines)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str, marked: Sequence[bool] = ()) -> str:
    """A table whose rows are cards on a phone; all cells are escaped.

    Args:
        headers: Of the columns; the first column names the rows.
        rows: The cells.
        empty: What to say if there are no rows.
        marked: Which rows are set off from the others.
    """
    if not rows:
        return f"<p class='none-yet'>{escape(empty)}</p>"
    head = "".join(f"<th scope='col'>{escape(h)}</th>" for h in headers)
    body = []
    for i, (first, *cells) in enumerate(rows):
        kind = " class='here'" if i < len(marked) and marked[i] else ""
        rest = "".join(f"<td data-of='{escape(h)}'>{escape(c)}</td>" for h, c in zip(headers[1:], cells, strict=True))
        body.append(f"<tr{kind}><th scope='row'>{escape(first)}</th>{rest}</tr>")
    return f"<table class='sheet'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def sizes(facts: Mapping[str, Any]) -> str:
    """Parameters, memory and file of both models."""
    rows = [
        (name, show(facts[before]), show(facts[after]), f"{facts[before] / max(facts[after], 1):.2f}×")
        for name, before, after, show in (
            ("Parameters", "parameters_before", "parameters", "{:,}".format),
            ("not zero", "parameters_before", "nonzero", "{:,}".format),
            ("Memory", "memory_bytes_before", "memory_bytes", _bytes),
            ("File (pruned: compressed)", "file_bytes_before", "file_bytes_compressed", _bytes),
        )
    ]
    return table(["", "dense", "pruned", "smaller"], rows, empty="")


def _bytes(count: int) -> str:
    return f"{format_count(count)}B"


def times(measured: Mapping[str, Any]) -> str:
    """The times of both models, in turns."""
    shown = [
        (p["model"], f"{1e3 * p['median']:.2f} ms", f"{1e3 * p['low']:.2f} to {1e3 * p['high']:.2f} ms", p["verdict"])
        for p in measured.get("points", ())
    ]
    return table(["", "median", "middle half", "speed-up"], shown, empty="Not timed yet.")
