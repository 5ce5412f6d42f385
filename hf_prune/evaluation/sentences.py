"""Score a model of sentence-transformers: by rank correlation of pairs of texts, or by nDCG of documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import DataError, ModelTypeError
from hf_prune.evaluation.data.checks import check_columns, column
from hf_prune.evaluation.data.loading import fingerprint
from hf_prune.evaluation.data.sentences import sentence_columns
from hf_prune.evaluation.sentence_result import NDCG, SentenceScore, summarise
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import eval_mode
from hf_prune.utils.progress import Bar
from hf_prune.utils.wrapping import is_sentence_model

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, SentenceTransformer

FIRST = 10  # documents that count, of nDCG@10 and MRR@10
_CHUNK = 32  # batches between two steps of the progress bar
_ROWS = 64  # queries that are compared with all documents at once


def evaluate_sentences(
    model: SentenceTransformer | CrossEncoder,
    dataset: Dataset,
    *,
    text_columns: Sequence[str] | None = None,
    score_column: str | None = None,
    metric: str | None = None,
    batch_size: int = 32,
    source: str = "",
    split: str = "",
    progress: bool | str | None = None,
) -> SentenceScore:
    """Measure how well a model orders texts, on the device and in the dtype it has.

    Pairs of texts with a score (STS): Spearman's rank correlation with what the model says, its similarity of two
    embeddings, or the score of a ``CrossEncoder``. Queries and documents: nDCG@10, with linear gains, and MRR@10. A
    ``SentenceTransformer`` ranks all documents of the data for each query, and its prompts for queries and documents
    are used; a ``CrossEncoder`` ranks those that stand beside the query.

    Args:
        model: A ``SentenceTransformer``, or a ``CrossEncoder`` with one label.
        dataset: Two columns of texts and one of scores, see :func:`hf_prune.load_sentences`.
        text_columns: As there.
        score_column: As there.
        metric: As there.
        batch_size: Texts per forward pass.
        source: Where the data came from, for the record.
        split: Its split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        The score, with that of each pair or query.

    Raises:
        ConfigError: If a setting is out of range.
        DataError: If a column is missing, there is nothing to order, or the model returns NaN.
        ModelTypeError: If the model is of another kind.

    Example:
        >>> data = load_sentences("stsb.tsv", "validation")  # doctest: +SKIP
        >>> print(evaluate_sentences(model, data))  # doctest: +SKIP
        Spearman 0.8203 ± 0.0093 (n = 1,500 pairs, data 3df74fb1e67a1618)
    """
    check_positive("batch_size", batch_size)
    _check_kind(model)
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    columns = sentence_columns(dataset.column_names, "the data set", text_columns, score_column, metric)
    check_columns(dataset, columns.names, "the data set")
    start = time.perf_counter()
    pairs = list(zip(*(column(dataset, name) for name in columns.texts), strict=True))
    scores = [1.0] * len(pairs) if columns.score is None else [float(x) for x in column(dataset, columns.score)]
    with eval_mode(model):
        ordered = _rankings if columns.metric == NDCG else _similarities
        values, references = ordered(model, pairs, scores, batch_size, progress)
    seconds = time.perf_counter() - start
    return SentenceScore(
        metric=columns.metric,
        **summarise(columns.metric, values, references),  # type: ignore[arg-type]
        values=values,
        references=references,
        split=split,
        source=source,
        data_fingerprint=fingerprint(dataset, columns.names),
        seconds=seconds,
        dtype=str(model.dtype).removeprefix("torch."),
        max_length=model.max_seq_length or 0,
        batch_size=batch_size,
        n_rows=len(dataset),
    )


def _check_kind(model: Any) -> None:
    encodes = all(hasattr(model, name) for name in ("encode_query", "encode_document", "similarity_fn_name"))
    if not is_sentence_model(model) or not (_crosses(model) or (encodes and model.model_type == "SentenceTransformer")):
        raise ModelTypeError(
            f"found a {type(model).__name__}: expected a SentenceTransformer or a CrossEncoder of sentence-transformers"
        )
    if _crosses(model) and model.num_labels != 1:
        raise DataError(
            f"this CrossEncoder has {model.num_labels} labels: expected one, a score by which pairs can be ordered; "
            f"score its transformers model as a classifier"
        )


def _crosses(model: Any) -> bool:
    return hasattr(model, "predict")


def _similarities(
    model: Any, pairs: Sequence[tuple[str, str]], scores: Sequence[float], batch_size: int, progress: bool | str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the model says of each pair, and the score in the data."""
    if len(set(scores)) < 2:
        raise DataError(f"all {len(scores)} pairs have the score {scores[0]:g}: expected scores that differ")
    if _crosses(model):
        said = _by_text(model, model.predict, pairs, batch_size, progress)
        values = torch.stack([said[pair] for pair in pairs])
    else:
        embedded = _by_text(model, model.encode, [text for pair in pairs for text in pair], batch_size, progress)
        first, second = (torch.stack([embedded[pair[i]] for pair in pairs]) for i in (0, 1))
        values = model.similarity_pairwise(first, second)
    return tuple(values.float().tolist()), tuple(scores)


def _rankings(
    model: Any, pairs: Sequence[tuple[str, str]], scores: Sequence[float], batch_size: int, progress: bool | str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """nDCG@10 of each query, and the reciprocal rank of its first relevant document."""
    relevant: dict[str, dict[str, float]] = {}
    for (query, document), score in zip(pairs, scores, strict=True):
        of_query = relevant.setdefault(query, {})
        of_query[document] = max(score, of_query.get(document, 0.0))  # of a row that occurs twice
    for query, documents in relevant.items():
        if not any(documents.values()):
            raise DataError(f"the query {query!r:.60} has no relevant document: expected one with a score above 0")
    found: list[tuple[float, float]] = []
    if _crosses(model):
        for query, documents in relevant.items():
            if len(documents) < 2:
                raise DataError(
                    f"the query {query!r:.60} has one document: expected several, since a CrossEncoder ranks those "
                    f"that stand beside a query; add rows with others and the score 0"
                )
        said = _by_text(model, model.predict, pairs, batch_size, progress)
        for query, documents in relevant.items():
            ranked = torch.stack([said[query, document] for document in documents]).float()
            found.append(_ranking(ranked, torch.tensor(list(documents.values()))))
    else:
        places = {document: i for i, document in enumerate(dict.fromkeys(document for _, document in pairs))}
        if len(places) < 2:
            raise DataError("there is one document: expected several to rank")
        queries = _by_text(model, model.encode_query, list(relevant), batch_size, progress)
        embedded = _by_text(model, model.encode_document, list(places), batch_size, progress)
        corpus = torch.stack([embedded[document] for document in places])
        names = list(relevant)
        for start in range(0, len(names), _ROWS):
            part = names[start : start + _ROWS]
            similarities = model.similarity(torch.stack([queries[name] for name in part]), corpus).float().cpu()
            for name, row in zip(part, similarities, strict=True):  # (documents,)
                gains = torch.zeros(len(places))
                for document, score in relevant[name].items():
                    gains[places[document]] = score
                found.append(_ranking(row, gains))
    return tuple(ndcg for ndcg, _ in found), tuple(reciprocal for _, reciprocal in found)


def _by_text(
    model: Any, answer: Callable[..., Tensor], texts: Sequence[Any], batch_size: int, progress: bool | str | None
) -> Mapping[Any, Tensor]:
    """The embedding or score of each text or pair; those of about the same length run together.

    Raises:
        DataError: If one is not finite.
    """
    distinct = sorted(dict.fromkeys(texts), key=lambda text: -len(text if isinstance(text, str) else "".join(text)))
    title, step = progress if isinstance(progress, str) else "Scoring", batch_size * _CHUNK
    answers: dict[Any, Tensor] = {}
    for start in Bar(range(0, len(distinct), step), desc=title, progress=progress):
        part = distinct[start : start + step]
        values = answer(part, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        if not bool(torch.isfinite(values).all()):
            raise DataError(
                f"{type(model).__name__} returns NaN or infinity for some of {len(part)} texts: its weights are "
                f"damaged, or {values.dtype} overflows (load it in float32 or bfloat16)"
            )
        answers |= dict(zip(part, values.cpu(), strict=True))
    return answers


def _ranking(scores: Tensor, gains: Tensor) -> tuple[float, float]:
    """nDCG@10, and the reciprocal rank of the first relevant document, behind irrelevant ones with the same score.

    Args:
        scores: (documents,), the model's.
        gains: (documents,), how relevant each one is, 0 or more.
    """
    from sklearn.metrics import ndcg_score

    ndcg = float(ndcg_score(gains[None].numpy(), scores[None].numpy(), k=FIRST))
    best = scores[gains > 0].max()
    rank = 1 + int((scores[gains == 0] >= best).sum())
    return ndcg, 1 / rank if rank <= FIRST else 0.0
