"""What visitors may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on models, memory, time and inputs.

    Args:
        parameters: Of a model.
        download_bytes: Of the files of a model.
        downloads: How many models' files are kept on a public Space.
        memory_bytes: That one process may use, where the system can limit that (Linux).
        visitors: How many visitors' pruned models are kept; the least recently used one goes first.
        kept_bytes: Memory of all visitors' models together.
        idle_seconds: After which an unused model is dropped.
        seconds: Of one job.
        answer_seconds: Of one answer of a pruned model.
        upload_seconds: Of a push.
        characters: Of a sentence.
        sentences: At once.
        calibration: Sentences that calibrated criteria see.
        scored: Held-out sentences that a score is computed on.
    """

    parameters: int = 150_000_000
    download_bytes: int = 700_000_000
    downloads: int = 4
    memory_bytes: int = 3_000_000_000
    visitors: int = 24
    kept_bytes: int = 4_000_000_000
    idle_seconds: float = 1800
    seconds: float = 180
    answer_seconds: float = 120
    upload_seconds: float = 900
    characters: int = 1000
    sentences: int = 200
    calibration: int = 64
    scored: int = 400
