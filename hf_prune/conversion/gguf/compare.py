"""Have llama.cpp continue a text, and compare its log-probabilities with PyTorch's."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_prune.conversion.gguf.layout import context_length
from hf_prune.errors import ExportError
from hf_prune.utils.forward import eval_mode

_TEXT = "Once upon a time, in 1984, they'd said: \"It isn't 3.14!\"\n\n  The naïve café"
_NEW_TOKENS = 16
# Largest difference of a log-probability, in standard deviations of the logits.
# llama.cpp rounds what a matrix is multiplied with to the type of the matrix.
_TOLERANCES = {"f32": 1e-3, "f16": 0.1, "bf16": 0.5, "q8_0": 1.0}
_RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@dataclass(frozen=True)
class Comparison:
    """How close llama.cpp comes to PyTorch.

    Args:
        difference: Largest difference of a log-probability; None if nothing was compared.
        same_text: Whether PyTorch continues with the same tokens.
        tokens: How many tokens were compared.
    """

    difference: float | None
    same_text: bool | None
    tokens: int


def can_compare() -> bool:
    """Whether llama.cpp is there to read a file."""
    return importlib.util.find_spec("xllamacpp") is not None


def compare(path: Path, model: Any, tokenizer: Any, dtype: str) -> Comparison:
    """Compare log-probabilities along the continuation that llama.cpp finds likeliest.

    Args:
        path: The file.
        model: The model in PyTorch.
        tokenizer: Its tokenizer.
        dtype: How matrices are stored in the file, which says how close they have to be.

    Raises:
        ExportError: If llama.cpp cannot read the file, reads the text as other tokens, or computes something else.
    """
    text, prompt, new = _prompt(model, tokenizer)
    with _Server(path, len(prompt) + new) as server:
        if (count := server.next_token(text)[0]) != len(prompt):
            raise ExportError(
                f"llama.cpp reads {text!r} as {count} tokens and {type(tokenizer).__name__} as {len(prompt)}: nothing "
                f"was written"
            )
        ids = list(prompt)
        steps: list[dict[str, Any] | None] = []
        with eval_mode(model), _in_float32(model), torch.no_grad():
            for _ in range(new):
                steps.append(step := server.next_token(ids)[1])
                ids.append(int(_logits(model, ids)[-1].argmax()) if step is None else step["id"])
            logits = _logits(model, ids[:-1])[len(prompt) - 1 :]  # (new tokens, vocabulary)
    compared = [(row, step) for row, step in zip(logits.log_softmax(-1), steps, strict=True) if step is not None]
    if not compared:
        raise ExportError("llama.cpp continues with no token that is text: nothing can be compared")
    differences = [abs(float(row[t["id"]]) - t["logprob"]) for row, step in compared for t in step["top_logprobs"]]
    difference = max(differences)
    spread = float(logits.std(-1).mean())
    if not difference <= _TOLERANCES[dtype] * spread:
        raise ExportError(
            f"the log-probabilities of the exported model in llama.cpp differ from PyTorch's by {difference:.2g}, and "
            f"logits by {spread:.2g} from each other (standard deviation): nothing was written"
        )
    same = all(int(row.argmax()) == step["id"] for row, step in compared)
    return Comparison(difference, same, len(compared))


def _prompt(model: Any, tokenizer: Any) -> tuple[str, list[int], int]:
    """A text that the model has positions for, its tokens, and how many tokens can follow."""
    positions = context_length(model.config)
    new = min(_NEW_TOKENS, positions // 2)
    for end in range(len(_TEXT), 0, -1):
        if len(ids := tokenizer(_TEXT[:end])["input_ids"]) <= positions - new:
            return _TEXT[:end], list(ids), new
    raise ExportError(f"{type(model).__name__} has {positions} positions: expected enough for a text that is compared")


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """The weights in float32, in which llama.cpp adds; afterwards they are the same tensors as before."""
    parameters = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32
    ]
    try:
        for parameter, values in parameters:
            parameter.data = values.float()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.float()
        yield
    finally:
        for parameter, values in parameters:
            parameter.data = values
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _logits(model: Any, ids: list[int]) -> Tensor:
    """The logits of one text: (tokens, vocabulary)."""
    batch = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits[0].float().cpu()
    return logits


class _Server:
    """llama.cpp with one file, on the CPU, in a process of its own: a failed assertion there ends the process."""

    def __init__(self, path: Path, length: int) -> None:
        self._printed = tempfile.TemporaryFile("w+", errors="replace")
        script = str(Path(__file__).with_name("llama_server.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, script, str(path), str(length), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GGML_NO_BACKTRACE": "1"},
            text=True,
        )

    def __enter__(self) -> _Server:
        try:
            if "error" in (answer := self._answer()):
                raise ExportError(f"llama.cpp cannot read the exported model: {answer['error']}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._printed.close()

    def next_token(self, prompt: str | list[int]) -> tuple[int, dict[str, Any] | None]:
        """The number of tokens of a text, and its likeliest next token; None if that is no text by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer tells
            print(json.dumps(prompt), file=self._process.stdin, flush=True)
        answer = self._answer()
        if "choices" not in answer:
            raise ExportError(f"llama.cpp cannot run the exported model: {answer}")
        content = (answer["choices"][0].get("logprobs") or {}).get("content")
        return answer["usage"]["prompt_tokens"], content[0] if content else None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            code = self._process.wait()
            self._printed.seek(0)
            last = [text.strip() for text in self._printed if text.strip()][-1:]
            raise ExportError(
                f"llama.cpp ended with code {code} on the exported model ({''.join(last) or 'it printed nothing'}): "
                f"nothing was written"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
