"""Few-shot heads on features: how far a few labelled pictures of each class go, on a CPU, in seconds.

Stage: embeddings of unit length -> class scores. No head sees the test split, and none is tuned on a validation split
that a user with 4 pictures a class would not have (arXiv 2312.12730): what must be chosen is chosen by leaving out one
shot after the other, or has its paper's value.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..metrics.classification import classification_scores

SHOTS = (1, 2, 4, 8, 16)
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""L2 regularisation of the linear probe, tried in this order of strength: the sum of squared weights times a half."""

_TIP_ALPHA, _TIP_BETA = 1.0, 5.5
_SCALE = 100.0  # CLIP's inverse temperature, under which a softmax over cosines says something


def linear_probe(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Multinomial logistic regression, as scikit-learn's `LogisticRegression(C=1 / strength)` solves it.

    Args:
        features (`np.ndarray`): `(N, D)`.
        labels (`np.ndarray`): `(N,)`, from 0.
        classes (`int`): C.
        strength (`float`): Of L2 regularisation, above 0; of the distance from `start`. The bias has none.
        start (`np.ndarray`, *optional*): `(C, D)`, weights to stay near (a zero-shot-initialised probe); 0 by default.

    Returns:
        `np.ndarray` of shape `(C, D + 1)`: weights, and biases in the last column.
    """
    inputs = torch.from_numpy(np.asarray(features, dtype=np.float64))
    truth = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    origin = torch.zeros(classes, inputs.shape[1], dtype=torch.float64)
    if start is not None:
        origin += torch.from_numpy(start)
    weight, bias = origin.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, truth, reduction="sum")
        loss = loss + strength / 2 * (weight - origin).square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return torch.cat([weight.detach(), bias.detach()[:, None]], dim=1).numpy()


def apply_probe(probe: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Scores `(N, C)` of features `(N, D)` by a probe of [`linear_probe`]."""
    return features @ probe[:, :-1].T + probe[:, -1]


def choose_strength(features: np.ndarray, labels: np.ndarray, classes: int, start: np.ndarray | None = None) -> float:
    """The strength that does best on shots left out in turn; of equal ones the stronger.

    Args:
        features, labels, classes, start: Of [`linear_probe`].

    Returns:
        `float`: 1 where there is one shot a class, since nothing can be left out.
    """
    folds = _folds(labels)
    if folds.max() == 0:
        return 1.0
    losses = []
    for strength in STRENGTHS:
        lost = 0.0
        for fold in range(min(int(folds.max()) + 1, 4)):
            out = folds % 4 == fold
            scores = apply_probe(linear_probe(features[~out], labels[~out], classes, strength, start), features[out])
            lost += float(
                torch.nn.functional.cross_entropy(
                    torch.from_numpy(scores), torch.from_numpy(labels[out]), reduction="sum"
                )
            )
        losses.append(lost)
    best = min(losses)
    return max(strength for strength, lost in zip(STRENGTHS, losses, strict=True) if lost <= best + 1e-9)


def _folds(labels: np.ndarray) -> np.ndarray:
    """Which of its class's shots each row is."""
    seen: dict[int, int] = {}
    found = []
    for label in labels.tolist():
        found.append(seen.get(label, 0))
        seen[label] = found[-1] + 1
    return np.array(found)


def tip_adapter(shots: np.ndarray, labels: np.ndarray, classes: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Tip-Adapter without training (arXiv 2111.03930): zero-shot scores, and a cache of the shots.

    Args:
        shots (`np.ndarray`): `(N, D)`, of unit length.
        labels (`np.ndarray`): `(N,)`.
        classes (`np.ndarray`): `(C, D)`, embeddings of the names.
        features (`np.ndarray`): `(P, D)`, of unit length.

    Returns:
        `np.ndarray` of shape `(P, C)`: 100 f W + alpha exp(-beta (1 - f F)) L, with the paper's alpha 1 and beta 5.5.
    """
    affinity = np.exp(-_TIP_BETA * (1 - features @ shots.T))
    return _SCALE * features @ classes.T + _TIP_ALPHA * affinity @ np.eye(len(classes))[labels]


def draw_shots(labels: Sequence[int], shots: int, seed: int) -> np.ndarray:
    """Rows of so many pictures of each class, fewer where a class has fewer, class after class.

    Args:
        labels (`Sequence[int]`): Of the training rows.
        shots (`int`): Of each class at most.
        seed (`int`): Other draws for other seeds.
    """
    generator = np.random.default_rng(seed)
    truth = np.asarray(labels)
    drawn = [generator.permutation(np.flatnonzero(truth == each))[:shots] for each in np.unique(truth)]
    return np.concatenate(drawn)


def few_shot_table(
    train: tuple[np.ndarray, Sequence[int]],
    test: tuple[np.ndarray, Sequence[int]],
    classes: np.ndarray,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """Accuracy of each head for each number of shots, over several draws.

    Args:
        train, test (`tuple`): Features `(N, D)` of unit length, and labels.
        classes (`np.ndarray`): `(C, D)`, embeddings of the names.
        shots, seeds (`Sequence[int]`, *optional*): 1, 2, 4, 8, 16 shots and three draws.

    Returns:
        `list[dict]`: `head`, `shots`, `acc1` (mean over draws), `deviation` (between them) and `pictures`. The head
        `zero_shot` has 0 shots.
    """
    (features, labels), (shown, truth) = train, test
    known = np.asarray(labels, dtype=np.int64)

    def accuracy(scores: np.ndarray) -> float:
        return classification_scores(scores, truth)[0]["acc1"]

    table = [{"head": "zero_shot", "shots": 0, "acc1": accuracy(shown @ classes.T), "deviation": 0.0, "pictures": 0}]
    # The scale makes a probe's scores, which start as cosines, speak in a softmax.
    starts = {"linear_probe": None, "zero_shot_probe": classes}
    for count in shots:
        found: dict[str, list[float]] = {"linear_probe": [], "zero_shot_probe": [], "tip_adapter": []}
        sizes = []
        for seed in seeds:
            rows = draw_shots(known, count, seed)
            sizes.append(len(rows))
            for head, start in starts.items():
                scaled = features[rows] * np.sqrt(_SCALE)
                begin = None if start is None else start * np.sqrt(_SCALE)
                strength = choose_strength(scaled, known[rows], len(classes), begin)
                probe = linear_probe(scaled, known[rows], len(classes), strength, begin)
                found[head].append(accuracy(apply_probe(probe, shown * np.sqrt(_SCALE))))
            found["tip_adapter"].append(accuracy(tip_adapter(features[rows], known[rows], classes, shown)))
        table += [
            {
                "head": head,
                "shots": count,
                "acc1": float(np.mean(values)),
                "deviation": float(np.std(values)),
                "pictures": int(np.mean(sizes)),
            }
            for head, values in found.items()
        ]
    return table


def read_zhou_split(path: str | Path) -> dict[str, list[tuple[str, int, str]]]:
    """The rows of a published split file `split_zhou_<data set>.json` (arXiv 2109.01134).

    Args:
        path (`str` or `Path`): Of the file.

    Returns:
        `dict`: `train`, `val` and `test` -> (path of the picture in the data set's folder, number of its class, name).

    Raises:
        ValueError: When the file is something else.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {
            part: [(str(place), int(label), str(name)) for place, label, name in stored[part]]
            for part in ("train", "val", "test")
        }
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a split file with train, val and test, each a list of [path, class, name] ({error})."
        ) from error
    named: dict[int, set[str]] = {}
    for rows in found.values():
        for _, label, name in rows:
            named.setdefault(label, set()).add(name)
    several = [names for names in named.values() if len(names) > 1]
    if several:
        raise ValueError(f"{path}: one class has several names: {', '.join(sorted(several[0]))}.")
    return found
