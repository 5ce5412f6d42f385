"""What MkDocs does not do by itself: reference pages made from the package, and links to files outside of ``docs``."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.structure.files import File, Files

import hf_prune
from hf_prune.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
#: Pages that are files from elsewhere in the repository.
INCLUDED = {
    "about/changelog.md": "CHANGELOG.md",
    "about/contributing.md": "CONTRIBUTING.md",
    "about/security.md": "SECURITY.md",
    "extend/architecture.md": "hf_prune/architectures/ADDING.md",
    "extend/criterion.md": "hf_prune/criteria/ADDING.md",
    "extend/granularity.md": "hf_prune/granularities/ADDING.md",
    "extend/kind-of-unit.md": "hf_prune/architectures/kinds/ADDING.md",
}
#: Sections of the reference: the title, what stands there, and the packages whose public names it has.
SECTIONS = (
    (
        "Prune",
        "Plan and prune a model, or search for the best way.",
        ("pipeline", "planning", "mixin", "search", "structured"),
    ),
    ("Load and save", "Classes that load, prune and save; folders in, folders out.", ("auto", "conversion")),
    ("Masks", "What was removed, and what happens to it.", ("pruning", "evaluation.sparsity_report")),
    ("Calibrate and score", "Data, accuracy, perplexity and paired comparisons.", ("evaluation", "calibration")),
    ("Measure speed", "Timings, exported models and kernels.", ("inference",)),
    ("Train", "Pruning while a model is trained.", ("training",)),
    ("Share", "Cards, pushing and verification.", ("hub",)),
    (
        "Extend",
        "Criteria, granularities and architectures of your own.",
        ("criteria", "granularities", "architectures"),
    ),
    ("Errors and progress", "What is raised, and who listens.", ("errors", "utils", "quantizer")),
)
#: A picture with a variant for dark pages, as GitHub shows it.
_PICTURE = re.compile(
    r'<picture>\s*<source media="[^"]*dark[^"]*" srcset="(?P<dark>[^"]+)">\s*'
    r'<img src="(?P<light>[^"]+)" alt="(?P<alt>[^"]*)">\s*</picture>'
)
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not written by hand."""
    pages = {"reference/command-line.md": _command_line()}
    pages["reference/index.md"] = _reference()
    pages |= {page: (ROOT / source).read_text(encoding="utf-8") for page, source in INCLUDED.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Send links to files of the repository to their pages; what has none becomes plain text."""
    source = INCLUDED.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        pages = {included: made for made, included in INCLUDED.items()} | {"README.md": "index.md"}
        inside = pages.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if inside is None:
            if not (ROOT / place).exists():
                raise FileNotFoundError(f"{source} links to {target}, which is not there")
            return text[1:-1] if text.startswith("[") else match[0]
        return f"{text}({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    # The theme switches between two pictures by the ends of their addresses, also by its own button.
    pair = r"![\g<alt>](\g<light>#only-light) ![\g<alt>](\g<dark>#only-dark)"
    return _LINK.sub(relink, _PICTURE.sub(pair, markdown))


def _reference() -> str:
    """One page with every public name, in sections."""
    lines = [
        "# Python",
        "",
        "Everything that `import hf_prune` offers. That import takes milliseconds: a name is loaded when it is first",
        "used.",
    ]
    left = {name: home for name, home in hf_prune._HOME.items()}
    for title, about, packages in (*SECTIONS, ("More", "What belongs to none of these.", ("",))):
        names = [name for name, home in left.items() if any(f"{home}.".startswith(p) for p in packages)]
        lines += ["", f"## {title}", "", about, ""] if names else []
        for name in sorted(names, key=lambda name: (name[0].isupper(), name)):
            lines += [f"::: hf_prune.{left.pop(name)}.{name}"]
            lines += ["    options: {inherited_members: true}"] if name == "PrunedModelMixin" else []
            lines += [""]
    return "\n".join(lines)


def _command_line() -> str:
    """Every command with its options, as its help has them."""
    root = typer.main.get_command(app)
    context = click.Context(root, info_name="hf-prune")
    lines = ["# Commands", "", str(root.help), "", "`hf-prune COMMAND --help` prints the same."]
    for name in root.list_commands(context):  # type: ignore[attr-defined]
        command = root.get_command(context, name)  # type: ignore[attr-defined]
        inner = click.Context(command, info_name=name, parent=context)
        lines += ["", f"## {name}", "", (command.help or "").strip(), ""]
        lines += ["```text", " ".join(["hf-prune", name, *command.collect_usage_pieces(inner)]), "```", ""]
        lines += ["| | |", "|---|---|"]
        for parameter in command.get_params(inner):
            if (record := _record(parameter, inner)) is not None:
                spelled, text = (" ".join(part.split()).replace("|", "\\|") for part in record)
                text = re.sub(r"([<\[])", r"\\\1", text)  # neither HTML nor a link
                lines.append(f"| `{spelled}` | {text} |")
        if command.epilog:
            lines += ["", *(f"`{part.strip()}`  " for part in re.sub("^Examples?:", "", command.epilog).split("|"))]
    return "\n".join(lines)


def _record(parameter: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    """How a parameter is spelled, and its help."""
    found = parameter.get_help_record(context)
    if found is None and isinstance(parameter, click.Argument):
        return parameter.make_metavar(context), ""
    return found
