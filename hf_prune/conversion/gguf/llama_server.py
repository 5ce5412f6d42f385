"""llama.cpp with one file on the CPU: a script for a process of its own, which a failed assertion of llama.cpp ends.

It imports nothing of hf_prune, and answers each line of JSON with another one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

_TOP = 5


def serve(path: str, length: int, threads: int, answers: TextIO) -> None:
    """Read a file and answer requests, a prompt as text or as tokens in each, until there are no more.

    Args:
        path: The file.
        length: The most tokens of a prompt.
        threads: Of the CPU.
        answers: Where answers go; the first one says whether llama.cpp reads the file.
    """
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = length + 8
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        request = {"max_tokens": 1, "temperature": 0, "logprobs": _TOP, "cache_prompt": True}
        answer = server.handle_completions({**request, "prompt": json.loads(line)})
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), own)
