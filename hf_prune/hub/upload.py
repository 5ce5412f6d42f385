"""Which files are uploaded, and onto which head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from hf_prune.errors import HubError
from hf_prune.hub.client import MAX_ATTEMPTS, call_hub, hub_answers
from hf_prune.utils.folders import MARK, PICKLES, refuse_links
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.json_files import read_config

SECONDS = 2.0  # that a dry run waits for an answer
OWN = (".gitattributes", "README.md")  # what a new repository may have


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be.

    Args:
        repo_id: The repository.
        files: Sizes in bytes by path.
        removed: Weights of an earlier checkpoint that the commit deletes.
        skipped: Files of the folder that are not uploaded: pickles, hidden files and subfolders of checkpoints.
        commit: The commit's id; None if nothing was uploaded.
        url: Where to look at it.
        card: The model card, if there is one.
        asked: Whether the Hub said what the repository holds; of a dry run, it need not have answered.
    """

    repo_id: str
    files: dict[str, int]
    removed: tuple[str, ...]
    skipped: tuple[str, ...]
    commit: str | None
    url: str | None
    card: str | None
    asked: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "removed": list(self.removed), "skipped": list(self.skipped)}

    def __str__(self) -> str:
        rows = [[name, f"{format_count(size)}B"] for name, size in self.files.items()]
        rows += [[name, "deleted"] for name in self.removed]
        lines = [format_table(["file", "size"], rows, left=1)]
        if self.skipped:
            lines.append(f"Not uploaded, since they are pickles, hidden or of a training: {', '.join(self.skipped)}.")
        total = f"{format_count(sum(self.files.values()))}B"
        if self.commit is None:
            lines.append(f"{len(self.files)} files, {total}, would go to {self.repo_id}. Nothing was uploaded.")
            if not self.asked:
                lines.append("The Hub did not say what that repository holds, so what would be replaced is not known.")
            if self.card:
                lines.append(f"\nThe card:\n\n{self.card}")
        else:
            lines.append(f"Uploaded {len(self.files)} files, {total}: {self.url}")
        return "\n".join(lines)


def to_upload(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What is uploaded of a folder, by path in it, and what is not: pickles, hidden files, checkpoints."""
    files, skipped = {}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        refuse_links(folder, [path.relative_to(folder).as_posix()])
        name = path.relative_to(folder).as_posix()
        if path.name == MARK:
            continue
        parts = name.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if hidden or parts[0].startswith("checkpoint-") or path.suffix.lower() in PICKLES or not path.is_file():
            skipped.append(name)
        else:
            files[name] = path
    return files, tuple(skipped)


def present(
    api: HfApi, repo_id: str, revision: str | None, force: bool, folder: Path, *, private: bool | None, dry_run: bool
) -> tuple[list[str], str | None] | None:
    """The files and the head of a branch, which begins as the main one if it is not there yet.

    A dry run asks once, for no more than seconds: None if the Hub does not say.

    Raises:
        HubError: If it may not be overwritten.
    """
    if dry_run and not hub_answers(repo_id):
        return None
    once: dict[str, Any] = {"timeout": SECONDS} if dry_run else {}
    tries = 1 if dry_run else MAX_ATTEMPTS
    try:
        info = call_hub(lambda: api.model_info(repo_id, revision=revision, **once), repo_id, missing=True, tries=tries)
        if info is None and revision is not None:
            revision = None
            info = call_hub(lambda: api.model_info(repo_id, **once), repo_id, missing=True, tries=tries)
    except HubError:
        if dry_run:
            return None
        raise
    check_private(repo_id, info, private)
    names = [] if info is None else [each.rfilename for each in info.siblings or []]
    head = None if info is None else info.sha
    if force or not set(names) - set(OWN):
        return names, head
    if "config.json" not in names:
        raise HubError(
            f"{repo_id} holds {', '.join(sorted(set(names) - set(OWN))[:3])} and no config.json: it is no model of "
            f"transformers; choose another name, or pass force=True (--force) to add this checkpoint to it"
        )
    path = call_hub(lambda: hf_hub_download(repo_id, "config.json", revision=revision, token=api.token), repo_id)
    found, own = _model_type(Path(path)), _model_type(folder / "config.json")
    if found != own:
        raise HubError(
            f"{repo_id} holds a model of type {found!r}, and {folder} one of type {own!r}: choose another name, or "
            f"pass force=True (--force) to overwrite it"
        )
    return names, head


def head_with(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    parent: str | None,
) -> tuple[str, str] | None:
    """The head of a branch and where to look at it, if it is a new one and has just these files; None if not."""
    try:
        head = str(call_hub(lambda: api.model_info(repo_id, revision=revision), repo_id).sha)
        is_it = head != parent and _has_files(api, repo_id, head, contents, removed)
    except HubError:
        return None
    return (head, f"commit/{head}") if is_it else None


def proposals(api: HfApi, repo_id: str) -> dict[str, str]:
    """The heads of all pull requests, by number."""
    refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    return {each.ref.rpartition("/")[2]: each.target_commit for each in refs}


def proposal_with(
    api: HfApi,
    repo_id: str,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    earlier: Mapping[str, str],
) -> tuple[str, str] | None:
    """The head of a pull request and where to look at it, if it is a new one and has just these files; None if none."""
    try:
        for number, head in call_hub(lambda: proposals(api, repo_id), repo_id).items():
            if number not in earlier and _has_files(api, repo_id, head, contents, removed):
                return head, f"discussions/{number}"
    except HubError:
        pass
    return None


def _has_files(
    api: HfApi, repo_id: str, commit: str, contents: Mapping[str, str | bytes], removed: Sequence[str]
) -> bool:
    """Whether a commit has these files, byte for byte, and none of those that were removed."""
    found = call_hub(lambda: api.get_paths_info(repo_id, [*contents, *removed], revision=commit), repo_id)
    there = {each.path: each for each in found}
    if set(there) != set(contents):
        return False
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        lfs = there[name].lfs
        own = (
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if lfs is None
            else hashlib.sha256(data).hexdigest()
        )
        if own != (there[name].blob_id if lfs is None else lfs.sha256):
            return False
    return True


def check_private(repo_id: str, info: Any, private: bool | None) -> None:
    """Raises :class:`HubError` where a private push would land in a public repository."""
    if private and info is not None and not info.private:
        raise HubError(f"{repo_id} is there already and public: make it private in its settings first, or name another")


def _model_type(path: Path) -> Any:
    return read_config(path).get("model_type")
