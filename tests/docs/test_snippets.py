"""Every Python block and every command of ``hf-prune`` in the README and on the pages of ``docs`` runs, in order.

A page runs in a process and a folder of its own, whose Hub has small models under the names of those that it loads.
"""

from __future__ import annotations

import pytest

from tests.docs import stand_ins
from tests.docs.pages import PAGES, RUN, SHOWN, blocks_of, page_name
from tests.loopback_hub import TOKEN, client_environment, listening
from tests.support.fresh_process import ForkServer

#: The README runs every day, the others with ``make test-rest``.
EVERY_DAY = ("README.md",)
CODE = "import sys; from tests.docs.run_page import run_page; run_page(sys.argv[1])"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    return stand_ins.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A function that renews the hub, and where processes are forked whose Hub it is."""
    home = tmp_path_factory.mktemp("home")
    with listening() as renew:
        settings = {**client_environment(renew(), home), "HF_TOKEN": TOKEN, "XDG_CACHE_HOME": str(home / "cache")}
        with ForkServer("hf_prune", **settings, HF_MODULES_CACHE=str(home / "modules"), MPLBACKEND="agg") as processes:
            yield renew, processes


def _marked(path):
    name = page_name(path)
    return pytest.param(path, id=name, marks=() if name in EVERY_DAY else pytest.mark.docs)


@pytest.mark.parametrize(
    "page", [_marked(p) for p in PAGES if any(b.language in RUN for b in blocks_of(p.read_text(encoding="utf-8")))]
)
def test_every_block_runs(page, repositories, clients, tmp_path):
    renew, processes = clients
    hub = renew()
    for repo, files in repositories.items():
        hub.put(repo, files)
    stand_ins.write_data(tmp_path)
    done = processes.run(CODE, page, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_says_what_it_is(page):
    """A block in a language that nobody knows would not run, and nobody would notice."""
    text = page.read_text(encoding="utf-8")
    found = {block.language for block in blocks_of(text)}
    assert found <= {*RUN, *SHOWN}
    assert text.count("```") == 2 * len(blocks_of(text))
