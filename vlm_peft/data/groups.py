"""Groups: rows about the same pictures become one row, so that they share its prefix and are scored together.

Stage: rows as stored -> which of them belong together. Pictures are the same when their files' bytes are, whatever the
columns say: an `image_id` that two sources count alike joins nothing.
"""

import logging
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
        task ([`~vlm_peft.tasks.Task`]): With `group_key`, rows of a group have one key, too.
    """
    pictures = Pictures(rows, task.image_columns)
    groups: dict[Hashable, list[int]] = {}
    of_key: dict[str, set[Hashable]] = {}
    keys = (task.group_key(row) for row in texts) if task.group_key is not None else repeat(None, len(rows))
    for index, key in enumerate(keys):
        shown = tuple(picture_identity(cell) for cell in pictures.of_row_as_stored(index))
        # Rows without pictures and without a key have nothing in common.
        group = (key, shown) if shown or key is not None else index
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
