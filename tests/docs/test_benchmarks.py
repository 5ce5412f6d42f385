"""Benchmarks are not run here, but what they import is there."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(path, monkeypatch):
    if path.stem == "llm_peer":  # runs in an environment of its own
        pytest.importorskip("llmcompressor", reason="needs llmcompressor")
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    assert "main" in runpy.run_path(str(path), run_name="benchmark") or not path.stem.startswith("bench_")
