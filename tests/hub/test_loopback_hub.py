"""The Hub on the loopback interface answers the real client as the Hub does, where a push depends on it."""

import pytest

from tests.loopback_hub import USER, run_client, serving

REPO = f"{USER}/repo"
BEGIN = f"""
import huggingface_hub
api = huggingface_hub.HfApi()
def commit(text, **where):
    added = huggingface_hub.CommitOperationAdd("a.txt", text.encode())
    try:
        return api.create_commit("{REPO}", [added], commit_message=text, **where).oid
    except huggingface_hub.errors.RevisionNotFoundError as error:
        return "no branch"
    except huggingface_hub.errors.HfHubHTTPError as error:
        return error.response.status_code, error.response.json()["error"]
    except Exception as error:  # of one HTTP library or another
        if type(error).__name__ not in ("RemoteProtocolError", "ReadError", "ConnectionError"):
            raise
        return "no answer"
"""


@pytest.fixture
def hub():
    with serving() as found:
        found.put(REPO, {"a.txt": b"0"})
        yield found


def test_parents_and_branches(hub, tmp_path):
    """A commit goes onto the head that it names, or nowhere, and to a branch that was made before."""
    first = hub.repos["model", REPO].refs["main"]
    run_client(
        hub,
        tmp_path / "home",
        f"""{BEGIN}
first = "{first}"
second = commit("1", parent_commit=first)
assert commit("2", parent_commit=first) == (412, f"main is at {{second}}, and not at {{first}}")
assert commit("2", parent_commit="0" * 40)[0] == 412
assert commit("proposed", parent_commit=first, create_pr=True) not in (first, second)
assert commit("3", revision="next") == commit("3", revision=first) == "no branch"
api.create_branch("{REPO}", branch="next")
assert api.model_info("{REPO}", revision="next").sha == second
third = commit("3", revision="next", parent_commit=second)
assert commit("4", revision="next", parent_commit=second) == (412, f"next is at {{third}}, and not at {{second}}")
assert commit("4", parent_commit=second)
api.create_branch("{REPO}", branch="old", revision=first)
try:
    api.create_branch("{REPO}", branch="none", revision="0" * 40)
    raise AssertionError
except huggingface_hub.errors.RevisionNotFoundError:
    pass
""",
    )
    found = {ref: hub.files(REPO, ref)["a.txt"] for ref in hub.repos["model", REPO].refs}
    assert found == {"main": b"4", "next": b"3", "old": b"0", "refs/pr/1": b"proposed"}


@pytest.mark.parametrize(("kind", "stored", "commits"), [("lost", b"1", 2), ("drop", b"0", 1)])
def test_answers_that_do_not_arrive(hub, tmp_path, kind, stored, commits):
    """The connection is cut after a commit, or before it."""
    hub.fail("POST .*/commit/", kind)
    run_client(hub, tmp_path / "home", f'{BEGIN}assert commit("1") == "no answer"')
    assert hub.files(REPO)["a.txt"] == stored
    assert len(hub.repos["model", REPO].commits) == commits
    assert sum("/commit/" in request for request in hub.log) == 1
    run_client(hub, tmp_path / "home", f'{BEGIN}assert len(commit("2")) == 40')
    assert hub.files(REPO)["a.txt"] == b"2"
