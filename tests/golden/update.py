"""Writes golden values anew: ``python -m tests.golden.update [NAME …]``. Look at what changed before you commit it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging

from tests.golden.cases import CASES
from tests.golden.record import FILE, plain


def main(names: list[str]) -> None:
    """Run the cases of these names, or all."""
    logging.set_verbosity_error()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or CASES:
        begin = time.perf_counter()
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            known[name] = plain(CASES[name](Path(folder)))
        print(f"{time.perf_counter() - begin:6.2f} s  {name}", flush=True)
    known = {name: known[name] for name in CASES}
    lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in known.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # one line for each


if __name__ == "__main__":
    main(sys.argv[1:])
