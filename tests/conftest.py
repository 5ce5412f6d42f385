"""Fixtures for every test: nothing here reaches the network."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import models
from tests.support.fresh_process import ForkServer
from tests.support.selection import keep_modules_together, mark_beyond_sample

# Property tests repeat themselves: the same examples in every run, and no complaint about a slow machine.
settings.register_profile("hf_prune", deadline=None, derandomize=True, print_blob=False, database=None)
settings.load_profile("hf_prune")

_FILE = pytest.StashKey[Path]()  # whose tests run


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test`` leaves out, and let one worker run all tests that share an expensive fixture."""
    mark_beyond_sample(items)
    keep_modules_together(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make sure that pytest-xdist groups: with a pytest that it does not know, it silently does not."""
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        assert all("@" in item.nodeid for item in grouped)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Spare the garbage collector, which trainings call at their end, all that is there before the tests of a file."""
    if item.config.stash.get(_FILE, None) != item.path:
        item.config.stash[_FILE] = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same global seed and leaves no trace of what it drew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _same_log_level() -> Iterator[None]:
    """Commands set what is logged, for the whole process."""
    log = logging.getLogger("hf_prune")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What the operating system has not written yet is lost only when the machine loses its power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(params=sorted(models.TRANSFORMERS))
def any_transformer(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Each kind of transformer in turn."""
    return models.TRANSFORMERS[request.param]()


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Where code runs in a process of its own that has imported torch and transformers, but not ``hf_prune``."""
    with ForkServer(HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")), HF_HUB_OFFLINE="1") as server:
        yield server


@pytest.fixture
def bert() -> torch.nn.Module:
    """A tiny BERT classifier."""
    return models.tiny_bert()


@pytest.fixture
def gpt2() -> torch.nn.Module:
    """A tiny GPT-2 language model."""
    return models.tiny_gpt2()
