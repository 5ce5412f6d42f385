"""Commands on the pages that are not ours: they are not run, but what they name has to be there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.pages import ROOT

#: Programs of others, which the tests do not have.
FOREIGN = ("vllm", "git", "cd", "python3", "convert_hf_to_gguf.py", "llama-cli")


def check_command(words: list[str], place: str) -> None:
    """Check a command that is not of hf-prune.

    Args:
        words: The command.
        place: Page and line, for the message.

    Raises:
        AssertionError: If the command is unknown, or names a file, a target or an extra that is not there.
    """
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # settings in front
        words = words[1:]
    program, *rest = words
    if program == "pip":
        assert rest[0] == "install", place
        wanted = [word for word in rest[1:] if not word.startswith("-")]
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(wanted)):
            assert set(extra.split(",")) <= set(_extras()), f"{place}: no extra {extra}"
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == [], place
    elif program == "python":
        path = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert (ROOT / path).is_file() or Path(path).is_file() or rest[:2] == ["-m", "pytest"], f"{place}: no {path}"
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if "/" in word), place
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", place
        launch_command_parser().parse_args(rest[1:])
    else:
        assert program in FOREIGN, f"{place}: nothing checks {program!r}"


def _extras() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)
