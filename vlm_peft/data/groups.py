"""Groups: rows about the same pictures become one row, so that they share its prefix and are scored together.

Stage: rows as stored -> which of them belong together. Pictures are the same when their files' bytes are, whatever the
columns say: an `image_id` that two sources count alike joins nothing.
"""

import logging
import random
from collections.abc import Hashable
from itertools import repeat

from datasets import Dataset

from ..tasks import Task
from .pictures import Pictures, picture_identity

logger = logging.getLogger(__name__)


def group_rows(texts: Dataset, rows: Dataset, task: Task) -> list[list[int]]:
    """Row numbers of each group, in the order in which the groups begin.

    Args:
        texts (`Dataset`): Rows without pictures.
        rows (`Dataset`): The same rows' pictures.
        task ([`~vlm_peft.tasks.Task`]): With `group_key`, rows of a group have one key, too; with `beginning`, one
            beginning.
    """
    pictures = Pictures(rows, task.image_columns)
    groups: dict[Hashable, list[int]] = {}
    of_key: dict[str, set[Hashable]] = {}
    keys = (task.group_key(row) for row in texts) if task.group_key is not None else repeat(None, len(rows))
    for index, key in enumerate(keys):
        shown = tuple(picture_identity(cell) for cell in pictures.of_row_as_stored(index))
        # Rows without pictures and without a key have nothing in common.
        begun = task.beginning(texts[index]) if shown and task.beginning is not None else None
        group = (key, shown, begun) if shown or key is not None else index
        groups.setdefault(group, []).append(index)
        if key is not None:
            of_key.setdefault(key, set()).add(group)
    split = [[groups[group][0] for group in found] for found in of_key.values() if len(found) > 1]
    if split:
        logger.warning(
            "%d groups of rows have one name and different pictures; each picture keeps its own rows (for example rows "
            "%s).",
            len(split),
            ", ".join(map(str, sorted(split[0])[:5])),
        )
    return list(groups.values())


def hold_out(rows: Dataset, columns: list[str], share: float, seed: int) -> list[int]:
    """Draws rows to score: no picture of theirs is another row's.

    Args:
        rows (`Dataset`): With pictures, whose paths are resolved.
        columns (`list[str]`): That hold them; without any, each row is drawn by itself.
        share (`float`): Of the rows, above 0 and below 1; reached as nearly as rows that share pictures allow.
        seed (`int`): Of the draw, which depends on nothing else.

    Returns:
        `list[int]`: Row numbers, in order.

    Raises:
        ValueError: When the share is none, or all rows are about the same pictures.
    """
    if not 0 < share < 1:
        raise ValueError(f"Expected a share between 0% and 100% to hold out, got {100 * share:g}%.")
    first = list(range(len(rows)))

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    pictures = Pictures(rows, columns)
    shown_by: dict[str, int] = {}
    for row in range(len(rows)) if columns else ():
        for cell in pictures.of_row_as_stored(row):
            first[root(row)] = root(shown_by.setdefault(picture_identity(cell), row))
    members: dict[int, list[int]] = {}
    for row in range(len(rows)):
        members.setdefault(root(row), []).append(row)
    groups = list(members.values())
    if len(groups) < 2:
        raise ValueError(f"Nothing can be held out: {len(rows)} rows, all about the same pictures.")
    random.Random(seed).shuffle(groups)
    held: list[int] = []
    for group in groups:
        if len(held) + len(group) <= max(1, round(share * len(rows))):
            held += group
    held = held or min(groups, key=len)
    return sorted(held)
