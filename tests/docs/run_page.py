"""Run the blocks of a page one after the other, in this process: Python in one namespace, and hf-prune's commands."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from tests.docs.other_commands import check_command
from tests.docs.pages import RUN, blocks_of, commands_of

#: What a page's MODEL is here.
MODEL = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"


def run_page(page: str) -> None:
    """Run a page in the current folder.

    Args:
        page: The file.

    Raises:
        BaseException: What the first block that fails raised; for commands, AssertionError.
    """
    start = time.perf_counter()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(Path(page).read_text(encoding="utf-8")):
        if block.language not in RUN:
            continue
        print(f"== {page}:{block.line} after {time.perf_counter() - start:.1f} s", flush=True)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
            continue
        for words in commands_of(block.code):
            run_command([MODEL if word == "MODEL" else word for word in words], f"{page}:{block.line}")


def run_command(words: list[str], place: str) -> None:
    """Run a command of hf-prune, and check any other one without running it."""
    from hf_prune.cli.main import main

    if words[0] != "hf-prune":
        check_command(words, place)
        return
    output = None
    if ">" in words:
        words, output = words[: words.index(">")], words[words.index(">") + 1]
    if words[1] == "export" and words[3].endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        print(f"{place}: gguf is not installed, so this does not run: {' '.join(words)}")
        return
    print("$", *words, flush=True)
    with contextlib.ExitStack() as stack:
        if output is not None:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(output, "w", encoding="utf-8"))))
        try:
            main(words[1:])
            code: Any = 0
        except SystemExit as end:
            code = end.code
    if "--target-speedup" in words and code == 1:  # on a busy machine a speed-up may be missed: it says so, and saves
        code = int(not Path(words[words.index("--out") + 1]).is_dir())
    assert code in (0, None), f"{place}: {' '.join(words)} ended with {code}"


if __name__ == "__main__":
    run_page(sys.argv[1])
