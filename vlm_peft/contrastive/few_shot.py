"""Few-shot heads on features: how far a few labelled pictures of each class go, on a CPU, in seconds.

Stage: embeddings of unit length -> class scores. No head sees the test split, and none is tuned on a validation split
that a user with 4 pictures a class would not have (arXiv 2312.12730): what must be chosen is chosen on one half of the
shots by the other, or has its paper's value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..json_files import read_json
from ..metrics.classification import classification_scores

SHOTS = (1, 2, 4, 8, 16)
STRENGTHS = (0.1, 1.0, 10.0)
"""L2 regularisation of the linear probe, tried in this order of strength: the sum of squared weights times a half."""

_TIP_ALPHA, _TIP_BETA = 1.0, 5.5
_STEPS, _FEW_STEPS = 300, 50
_SCALE = 100.0  # CLIP's inverse temperature: under it a softmax over cosines, where a probe starts, says something


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    strength: float,
    start: np.ndarray | None = None,
    *,
    steps: int = _STEPS,
) -> np.ndarray:
    """Multinomial logistic regression, as scikit-learn's `LogisticRegression(C=1 / strength)` solves it.

    Args:
        features (`np.ndarray`): `(N, D)`.
        labels (`np.ndarray`): `(N,)`, from 0.
        classes (`int`): C.
        strength (`float`): Of L2 regularisation, above 0; of the distance from `start`. The bias has none.
        start (`np.ndarray`, *optional*): `(C, D)`, weights to stay near (a zero-shot-initialised probe); 0 by default.
        steps (`int`, *optional*, defaults to 300): Of L-BFGS at most.

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
        [weight, bias], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-10, line_search_fn="strong_wolfe"
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
    """The strength that does best on one half of the shots after the other; of equal ones the stronger.

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
        for half in range(2):
            out = folds % 2 == half
            # Which strength is best shows long before the minimum.
            probe = linear_probe(features[~out], labels[~out], classes, strength, start, steps=_FEW_STEPS)
            scores = apply_probe(probe, features[out])
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


def draw_shots(labels: Sequence[int] | np.ndarray, shots: int, seed: int) -> np.ndarray:
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
    tests: Mapping[str, tuple[np.ndarray, Sequence[int]]],
    classes: np.ndarray,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of each head for each number of shots, over several draws.

    Args:
        train (`tuple`): Features `(N, D)` of unit length, and labels.
        tests (`Mapping`): The same of each split to score, by its name.
        classes (`np.ndarray`): `(C, D)`, embeddings of the names.
        shots, seeds (`Sequence[int]`, *optional*): 1, 2, 4, 8, 16 shots and three draws.

    Returns:
        `dict`: Name of a split -> `list[dict]` of `head`, `shots`, `acc1` (mean over draws), `deviation` (between them)
        and `pictures`. The head `zero_shot` has 0 shots.
    """
    features, known = train[0] * np.sqrt(_SCALE), np.asarray(train[1], dtype=np.int64)
    starts = {"linear_probe": None, "zero_shot_probe": classes * np.sqrt(_SCALE)}
    shown = {name: (found * np.sqrt(_SCALE), truth) for name, (found, truth) in tests.items()}
    table: dict[str, list[dict[str, Any]]] = {}
    for name, (found, truth) in shown.items():
        table[name] = [_row("zero_shot", 0, [_accuracy(found @ classes.T, truth)], [0])]
    for count in shots:
        hits: dict[tuple[str, str], list[float]] = {}
        draws = [draw_shots(known, count, seed) for seed in seeds]
        for rows in draws:
            few, labels = features[rows], known[rows]
            for head, start in starts.items():
                strength = choose_strength(few, labels, len(classes), start)
                probe = linear_probe(few, labels, len(classes), strength, start)
                for name, (found, truth) in shown.items():
                    hits.setdefault((head, name), []).append(_accuracy(apply_probe(probe, found), truth))
            for name, (found, truth) in tests.items():
                scores = tip_adapter(train[0][rows], labels, classes, found)
                hits.setdefault(("tip_adapter", name), []).append(_accuracy(scores, truth))
        for (head, name), values in hits.items():
            table[name].append(_row(head, count, values, [len(rows) for rows in draws]))
    return table


def _accuracy(scores: np.ndarray, truth: Sequence[int]) -> float:
    return classification_scores(scores, truth)[0]["acc1"]


def _row(head: str, shots: int, values: list[float], sizes: list[int]) -> dict[str, Any]:
    mean, deviation = float(np.mean(values)), float(np.std(values))
    return {"head": head, "shots": shots, "acc1": mean, "deviation": deviation, "pictures": int(np.mean(sizes))}


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
        stored = read_json(path)
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
