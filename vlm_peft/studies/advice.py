"""Advice: sentences about a study's figures, each carried by an interval that knows of pictures and seeds.

Stage: below compare; from scores of rows to text. All comparisons that could be spoken of are counted, and their
intervals hold together (Bonferroni), so that the winner of many is no accident. How much a seed changes is learnt from
all strategies together, for three runs of one know little of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import fmean

from ..metrics.significance import runs_mean

Run = dict[str, float]
"""Id of a row -> its score, of one run."""


@dataclass
class Group:
    """Runs that differ in their seed only.

    Args:
        strategy (`str`): Name of the strategy, or of an untrained row such as `"zero-shot"`.
        pictures (`int`, *optional*): That were trained on; `None` for an untrained model.
        runs (`list[Run]`): Scores of the rows, a run for each seed.
        blind (`list[Run]`): The same of the blind control, as far as there is one.
        watched (`dict[str, tuple[list[Run], list[Run]]]`): Other data -> runs before and after training.
        trained_weights (`int`): Of one run.
    """

    strategy: str
    pictures: int | None
    runs: list[Run]
    blind: list[Run] = field(default_factory=list)
    watched: dict[str, tuple[list[Run], list[Run]]] = field(default_factory=dict)
    trained_weights: int = 0


@dataclass
class Comparison:
    """How much more `second` has than `first`; without an interval when there are too few runs to know one."""

    first: str
    second: str
    pictures: int | None
    difference: float
    interval: tuple[float, float] | None
    runs: int

    @property
    def is_more(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.interval is not None and self.interval[0] > 0

    def is_within(self, margin: float) -> bool:
        """Whether the whole interval is nearer to 0 than that."""
        return self.interval is not None and -margin < self.interval[0] and self.interval[1] < margin

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.difference:+.2f}, {_runs(self.runs)}"
        return f"{self.difference:+.2f} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"


def compare(
    first: Sequence[Run],
    second: Sequence[Run],
    level: float,
    *,
    names: tuple[str, str] = ("", ""),
    pictures: int | None = None,
    usual: tuple[float, int] | None = None,
) -> Comparison | None:
    """Compares runs of two systems on the rows that all of them answered; runs are paired in their order.

    Args:
        first, second (`Sequence[Run]`): Of each system.
        level (`float`): Of the interval.
        names, pictures (*optional*): Recorded.
        usual (*optional*): See [`~vlm_peft.metrics.significance.runs_mean`], of differences.

    Returns:
        [`Comparison`], *optional*: `None` when there is no row or no run to compare.
    """
    pairs = list(zip(first, second, strict=False))
    rows = sorted(set.intersection(*(set(run) for pair in pairs for run in pair))) if pairs else []
    if not rows:
        return None
    differences = [[after[row] - before[row] for row in rows] for before, after in pairs]
    mean = sum(map(sum, differences)) / (len(pairs) * len(rows))
    interval = runs_mean(differences, level, usual).interval if len(pairs) > 1 and len(rows) > 1 else None
    return Comparison(*names, pictures, mean, interval, len(pairs))


def advise(groups: Sequence[Group], metric: str, margin: float | None = None) -> list[str]:
    """Sentences that the figures carry; where they do not, that they do not.

    Args:
        groups (`Sequence[Group]`): Of a study, scored on the same rows.
        metric (`str`): Its name, for the sentences.
        margin (`float`, *optional*): Differences below it do not matter to whoever asks; 5 % of the best mean by
            default.

    Returns:
        `list[str]`: One sentence each; the last says how the intervals are meant.
    """
    groups = [group for group in groups if group.runs and any(group.runs)]
    if not groups:
        return ["Nothing can be said: no run has scores of single rows."]
    margin = 0.05 * max(map(_mean, groups)) if margin is None else margin
    trained = [group for group in groups if group.pictures is not None]
    untrained = [group for group in groups if group.pictures is None]
    amounts = sorted({group.pictures for group in trained if group.pictures is not None})
    at = {amount: [group for group in trained if group.pictures == amount] for amount in amounts}
    by_strategy = {
        name: sorted((group for group in trained if group.strategy == name), key=lambda group: group.pictures or 0)
        for name in dict.fromkeys(group.strategy for group in trained)
    }
    # All that could be looked at, not only what is then spoken of.
    count = sum(len(list(combinations([*found, *untrained], 2))) for found in at.values())
    count += sum(len(found) - 1 for found in by_strategy.values())
    count += sum(len(group.watched) + bool(group.blind) for group in trained)
    level = 1 - 0.05 / max(count, 1)

    usual = _usual(trained)
    said = _best(at, untrained, metric, margin, level, usual) + _more_pictures(by_strategy, metric, level, usual)
    said += _losses(trained, level) + _blind(trained, metric, level, usual)
    fewest = min(len(group.runs) for group in groups)
    if fewest < 2:
        said.append(
            "Some rows have one run: what another seed would change is not known, so no strategy can be called better "
            "there. Give at least three seeds."
        )
    said.append(
        f"Brackets: intervals over pictures and seeds that hold at 95 % for all {count} comparisons together, "
        "the spread between seeds taken as no smaller than is usual in this study; "
        f"as good as: within {margin:.2g} {metric}."
    )
    return said


def _best(
    at: dict[int, list[Group]],
    untrained: list[Group],
    metric: str,
    margin: float,
    level: float,
    usual: tuple[float, int] | None,
) -> list[str]:
    """The best of each amount of data against each of the others, equal verdicts in one sentence."""
    found: dict[tuple[str, str, str], list[Comparison]] = {}
    weights: dict[str, int] = {}
    for amount, trained in at.items():
        rivals = sorted([*trained, *untrained], key=_mean, reverse=True)
        weights |= {group.strategy: group.trained_weights for group in rivals}
        for other in rivals[1:]:
            best = rivals[0]
            names = (other.strategy, best.strategy)
            compared = compare(other.runs, best.runs, level, names=names, pictures=amount, usual=usual)
            if compared is None:
                continue
            verdict = "better" if compared.is_more else "equal" if compared.is_within(margin) else "open"
            # The better of two that cannot be told apart may change from one amount to the next.
            key = names if verdict == "better" else (min(names), max(names))
            if key != names:
                compared = compare(best.runs, other.runs, level, names=key, pictures=amount, usual=usual) or compared
            found.setdefault((verdict, *key), []).append(compared)
    said = []
    for (verdict, first, second), each in found.items():
        differences = "; ".join(map(str, each))
        with_pictures = f"With {_listed([compared.pictures or 0 for compared in each])} pictures"
        if verdict == "better":
            said.append(f"{with_pictures}, {second} is better than {first}: {metric} {differences}.")
        elif verdict == "equal":
            small, large = sorted((first, second), key=lambda name: weights[name])
            cost = f"; {small} trains {weights[small]:,} weights, {large} {weights[large]:,}"
            said.append(
                f"{with_pictures}, {first} is as good as {second} ({second} minus {first}: {metric} {differences})"
                f"{cost if weights[small] != weights[large] else ''}."
            )
        else:
            said.append(
                f"{with_pictures}, it cannot be told whether {first} or {second} is better ({second} minus {first}: "
                f"{metric} {differences})."
            )
    return said


def _more_pictures(
    by_strategy: dict[str, list[Group]], metric: str, level: float, usual: tuple[float, int] | None
) -> list[str]:
    """Whether the last step to more pictures still helped."""
    said = []
    for name, groups in by_strategy.items():
        for fewer, more in list(pairwise(groups))[-1:]:
            compared = compare(fewer.runs, more.runs, level, usual=usual)
            if compared is None:
                continue
            amounts = f"{more.pictures:,} pictures instead of {fewer.pictures:,}"
            if compared.is_more:
                said.append(f"{name} still gained by {amounts}: {metric} {compared}.")
            elif compared.interval is not None and compared.interval[1] < 0:
                said.append(f"{name} lost by {amounts}: {metric} {compared}.")
            else:
                said.append(f"Whether {name} gained by {amounts} cannot be told: {metric} {compared}.")
    return said


def _losses(trained: list[Group], level: float) -> list[str]:
    """What training cost on other data that were scored before it, too."""
    said = []
    for group in trained:
        for data, (before, after) in group.watched.items():
            compared = compare(before, after, level)
            if compared is not None and compared.interval is not None and compared.interval[1] < 0:
                said.append(f"With {group.pictures:,} pictures, {group.strategy} lost on {data}: {compared}.")
    return said


def _blind(trained: list[Group], metric: str, level: float, usual: tuple[float, int] | None) -> list[str]:
    """Who may as well not have looked."""
    said = []
    for group in trained:
        compared = compare(group.blind, group.runs, level, usual=usual)
        if compared is not None and compared.interval is not None and not compared.is_more:
            said.append(
                f"With {group.pictures:,} pictures, {group.strategy} cannot be told from its blind control, which sees "
                f"other pictures: {metric} {compared}."
            )
    return said


def _usual(groups: Sequence[Group]) -> tuple[float, int] | None:
    """How much differences of two strategies' runs vary with the seed in this study, with degrees of freedom."""
    squares, freedom = 0.0, 0
    for group in groups:
        means = [fmean(run.values()) for run in group.runs if run]
        squares += sum((mean - fmean(means)) ** 2 for mean in means)
        freedom += max(len(means) - 1, 0)
    return (2 * squares / freedom, freedom) if freedom else None


def _mean(group: Group) -> float:
    scores = [score for run in group.runs for score in run.values()]
    return sum(scores) / len(scores)


def _listed(amounts: Sequence[int]) -> str:
    *first, last = [f"{amount:,}" for amount in amounts]
    return f"{', '.join(first)} and {last}" if first else last


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
