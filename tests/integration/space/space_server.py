"""The Space's app as a process of its own, with tiny models, for the tests that visit it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import models
from tests.loopback_hub import TOKEN, Hub

ROOT = Path(__file__).parents[3]
SPACE = ROOT / "space"


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """A classifier with its tokenizer, and sentences that fit it."""
    model, data = folder / "model", folder / "data"
    models.tiny_classifier().save_pretrained(model)
    models.tiny_tokenizer().save_pretrained(model)
    data.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 40, 1), ("dev", 30, 0)):
        rows = models.tiny_sentences(count, seed)
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        (data / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    return model, data


def at_once(visit: Callable[[int], None], number: int) -> None:
    """Run it for 0, 1, … in as many threads."""
    threads = [threading.Thread(target=visit, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def visiting(folder: Path, hub: Hub, **environment: str) -> Iterator[tuple[str, Path]]:
    """The address of a running app, and the file with all that it says."""
    model, data = write_tiny(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_TOKEN": TOKEN,
        **environment,
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        settings.pop(name, None)
    said = folder / "said.txt"
    command = [
        sys.executable,
        "-m",
        "hf_prune",
        "space",
        "--model",
        str(model),
        "--data",
        str(data),
        "--port",
        str(port),
    ]
    with said.open("w") as out, subprocess.Popen(command, env=settings, stdout=out, stderr=out, cwd=folder) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert process.poll() is None, said.read_text()[-3000:]
                try:
                    urllib.request.urlopen(address, timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address, said
            assert process.poll() is None, said.read_text()[-3000:]
        finally:
            process.terminate()
            process.wait(30)
