"""Retrieval and zero-shot classification of held-out splits, as records beside those of other tasks.

Stage: encoder and pairs -> scores with intervals, predictions, and their files. Conditions are those of every run:
before training, after, and blind, where texts are scored against pictures that are not theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.records import write_predictions, write_scores
from ..metrics.classification import classification_scores
from ..metrics.retrieval import retrieval_ranks, retrieval_scores
from ..tasks.scoring import Scores
from .encoder import DualEncoder
from .pairs import Pairs, picture_vectors


@dataclass(frozen=True)
class Evaluated:
    """What was found on one split.

    Args:
        task (`str`): `"retrieval"` or `"zero_shot"`.
        scores ([`~vlm_peft.tasks.scoring.Scores`]): Of it.
        rows (`list[dict]`): Lines of predictions.jsonl.
        per_row (`dict[str, list[float]]`): Of each line, whether it is right.
    """

    task: str
    scores: Scores
    rows: list[dict[str, Any]]
    per_row: dict[str, list[float]] = field(default_factory=dict)


def embed_split(encoder: DualEncoder, pairs: Pairs, directory: str | None, batch_size: int = 64) -> np.ndarray:
    """Embeddings `(P, D)` of a split's pictures in float32; with `directory` they are kept there as float16."""
    if directory is not None:
        return picture_vectors(encoder, pairs, directory, batch_size).astype(np.float32)
    return encoder.embed_pictures(map(pairs.picture, range(len(pairs))), batch_size).numpy()


def evaluate_retrieval(encoder: DualEncoder, pairs: Pairs, images: np.ndarray, *, blind: bool = False) -> Evaluated:
    """Texts find their picture, and pictures one of their texts.

    Args:
        encoder ([`DualEncoder`]): Embeds the texts.
        pairs ([`Pairs`]): With texts.
        images (`np.ndarray`): `(P, D)`, of [`embed_split`].
        blind (`bool`, *optional*, defaults to `False`): Texts get a picture half the split away: chance is left.
    """
    flat = [(place, text) for place, texts in enumerate(pairs.texts) for text in texts]
    owners = [place for place, _ in flat]
    if blind:
        # Half the split away: neighbours in a table may be alike.
        owners = [(place + len(images) // 2) % len(images) for place in owners]
    texts = encoder.embed_texts([text for _, text in flat]).numpy()
    of_text, of_image = retrieval_ranks(images, texts, owners)
    metrics, per_picture = retrieval_scores(of_text, of_image, owners)
    nearest = [flat[index][1] for index in _nearest(images, texts)]
    rows = [
        {"id": name, "prediction": text, "references": own, "rank": int(rank)}
        for name, text, own, rank in zip(pairs.ids, nearest, pairs.texts, of_image, strict=True)
    ]
    scores = Scores(metrics, per_picture, "image_retrieval_recall@1")
    scores.notes.append(
        f"Among {len(images)} pictures and {len(flat)} texts; chance is {1 / len(images):.4f} for "
        "image_retrieval_recall@1."
    )
    return Evaluated("retrieval", scores, rows, per_picture)


def _nearest(images: np.ndarray, texts: np.ndarray) -> list[int]:
    return [
        int(index)
        for start in range(0, len(images), 1024)
        for index in (images[start : start + 1024] @ texts.T).argmax(1)
    ]


def evaluate_zero_shot(
    encoder: DualEncoder, pairs: Pairs, images: np.ndarray, names: Sequence[str], templates: Sequence[str]
) -> Evaluated | None:
    """Classes by their names alone.

    Args:
        encoder ([`DualEncoder`]): Embeds names in templates.
        pairs ([`Pairs`]): With labels; rows without one are left out.
        images (`np.ndarray`): `(P, D)`, of [`embed_split`].
        names (`Sequence[str]`): Of all classes.
        templates (`Sequence[str]`): With `{}`; their mean stands for a class.

    Returns:
        [`Evaluated`], or `None` when no row has a label.
    """
    kept = [row for row, label in enumerate(pairs.labels) if label is not None]
    if not kept:
        return None
    classes = encoder.embed_classes(names, templates).numpy()
    places = {name: place for place, name in enumerate(names)}
    scores = images[kept] @ classes.T
    metrics, per_picture = classification_scores(scores, [places[str(pairs.labels[row])] for row in kept])
    rows = [
        {"id": pairs.ids[row], "prediction": names[int(best)], "references": [pairs.labels[row]]}
        for row, best in zip(kept, scores.argmax(axis=1), strict=True)
    ]
    found = Scores(metrics, per_picture, "acc1")
    others = f"; {len(pairs) - len(kept)} pictures have no class, or several" if len(kept) < len(pairs) else ""
    found.notes.append(f"Zero-shot among {len(names)} names, {len(templates)} templates{others}.")
    return Evaluated("zero_shot", found, rows, per_picture)


def evaluate_all(
    encoder: DualEncoder,
    pairs: Pairs,
    images: np.ndarray,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    blind: bool = False,
) -> list[Evaluated]:
    """Retrieval where there are texts, and zero-shot classification where there are classes.

    Args:
        encoder, pairs, images, blind: Of [`evaluate_retrieval`].
        names, templates (`Sequence[str]`): Of [`evaluate_zero_shot`]; no names for none.
    """
    found = [evaluate_retrieval(encoder, pairs, images, blind=blind)] if any(pairs.texts) else []
    zero_shot = evaluate_zero_shot(encoder, pairs, images, names, templates) if names else None
    return found if zero_shot is None else [*found, zero_shot]


def write_evaluated(output_dir: Path, pairs: Pairs, found: Evaluated, suffix: str = "") -> str:
    """Writes predictions.jsonl and scores.json into `eval/<task>-<split><suffix>/`, and returns a line to print."""
    name = pairs.split.name
    folder = output_dir / "eval" / f"{found.task}-{file_name(name)}{suffix}"
    if pairs.split.left_out:
        found.scores.notes.append(f"{len(pairs.split.left_out)} rows left out: no readable picture, or no text.")
    write_predictions(folder / "predictions.jsonl", found.rows, found.per_row)
    write_scores(
        folder / "scores.json",
        found.scores,
        model=str(output_dir),
        dataset=pairs.split.data.dataset_name,
        task=found.task,
        split=name,
        condition=suffix.removeprefix("-") or "after",
    )
    shown = "  ".join(
        f"{metric.replace('_retrieval_recall', ' R').replace('_retrieval', '')} {value:.3f}"
        for metric, value in found.scores.metrics.items()
    )
    return f"{f'{found.task} {name}{suffix}':<28} n={len(found.rows)}  {shown}"


def file_name(split: str) -> str:
    """What the folder of a split like `train[90%:]` is called."""
    return "".join(letter if letter.isalnum() or letter in "_.+" else "_" for letter in split).strip("_")
