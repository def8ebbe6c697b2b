"""Collator: laid-out rows -> one batch of shared-prefix sequences.

Stage: encoded data set -> batch for `SFTTrainer` (`data_collator=`). Several rows may share one sequence; a row is
never cut.
"""

from collections.abc import Callable

import torch

from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.shared_prefix import FLEX_BLOCK, PADDING_SEGMENT


def pack_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing.

    Args:
        lengths (`list[int]`): Tokens of each row.
        capacity (`int`): Tokens of a sequence.

    Returns:
        `list[list[int]]`: Row numbers of each sequence, in ascending order inside a sequence.

    Raises:
        ValueError: When a row is longer than a sequence.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[row] > capacity:
            raise ValueError(
                f"Row {row} of the batch has {lengths[row]} tokens and does not fit into max_length={capacity} tokens. "
                "Raise max_length; rows are never cut, since that could fall inside a picture."
            )
        fitting = [index for index, free in enumerate(room) if free >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda index: room[index])
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(row)
        room[best] -= lengths[row]
    return [sorted(rows) for rows in bins]


def separate_branches(row: dict) -> list[dict]:
    """A laid-out row as one row for each of its branches, each behind the prefix and with all pictures.

    Args:
        row (`dict`): With the lists of [`~vlm_peft.model.shared_prefix.SharedPrefixRow`] and `image_ids`.
    """
    branch_ids = row["branch_ids"]
    parts = []
    for branch in range(1, max(branch_ids) + 1):
        kept = [place for place, owner in enumerate(branch_ids) if owner in (0, branch)]
        lists = ("input_ids", "position_ids", "shift_labels")
        part = {name: [row[name][place] for place in kept] for name in lists}
        parts.append(
            {**part, "branch_ids": [min(branch_ids[place], 1) for place in kept], "image_ids": row["image_ids"]}
        )
    return parts


class SharedPrefixCollator:
    """Lays encoded rows out as sequences of shared prefixes.

    Args:
        pad_token_id (`int`): Fills sequences up to the longest of the batch.
        fetch_images (`Callable[[list[int]], dict[str, torch.Tensor]]`):
            Picture numbers -> `{"image_features": (I, N_v, D_v)}` from the cache or `{"pixel_values": (I, 3, H, W)}`.
        max_length (`int`, *optional*): Tokens of a sequence at most. Needed for packing.
        packing (`bool`, *optional*, defaults to `False`): Puts several rows into one sequence, best fit first.
        image_token_id (`int`, *optional*): The picture placeholder; with it the batch says where its image tokens go,
            so that the model need not look for them.
        sequence_length (`int`, *optional*): For GPUs: all rows of the batch lie in one sequence, padded to so many
            tokens (or to the next multiple of 128 above them), and the labels to a multiple of 256, so that a compiled
            model sees one shape. Takes the place of `packing`; `max_length` then limits single rows.
        sharing (`bool`, *optional*, defaults to `True`): Whether the decoder keeps branches apart (see `probe`).
            Without it, each branch is a sequence of its own behind a copy of the prefix, nothing is packed or laid into
            one sequence, and the batch has no `segment_ids`: loss and gradients are those of the same rows.

    Rows are dicts with the lists of [`~vlm_peft.model.shared_prefix.SharedPrefixRow`] and `image_ids`, the row's
    picture numbers. The batch, for two rows of 5 and 3 tokens with 2 and 1 labels:

    | key | shape | content |
    |---|---|---|
    | `input_ids` | (2, 5) | right-padded |
    | `attention_mask` | (2, 5) | 1 for tokens; only counted, since `segment_ids` rule the decoder's mask |
    | `position_ids` | (2, 5) | restart in each branch |
    | `segment_ids` | (2, 5, 2) | row and branch; padding -1, -1 |
    | `label_positions` | (3,) | flat positions of the labels |
    | `image_positions` | (I N,) | flat positions of the placeholders, with `image_token_id` |
    | `labels`, `shift_labels` | (1, 3) | the token that each of them must predict |
    """

    def __init__(
        self,
        pad_token_id: int,
        fetch_images: Callable[[list[int]], dict[str, torch.Tensor]],
        *,
        max_length: int | None = None,
        packing: bool = False,
        image_token_id: int | None = None,
        sequence_length: int | None = None,
        sharing: bool = True,
    ):
        if packing and max_length is None:
            raise ValueError("packing needs max_length, the tokens of a sequence; got None.")
        self.pad_token_id = pad_token_id
        self.fetch_images = fetch_images
        self.max_length = max_length
        self.packing = packing and sharing
        self.image_token_id = image_token_id
        self.sequence_length = sequence_length if sharing else None
        self.sharing = sharing

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows -> batch; see the class for shapes."""
        if not self.sharing:
            rows = [part for row in rows for part in separate_branches(row)]
        lengths = [len(row["input_ids"]) for row in rows]
        capacity = self.max_length if self.max_length is not None else max(lengths)
        bins = pack_best_fit(lengths, capacity)
        if self.sequence_length is not None:
            bins = [list(range(len(rows)))]
        elif not self.packing:
            bins = [[index] for index in range(len(rows))]
        width = max(sum(lengths[row] for row in members) for members in bins)
        if self.sequence_length is not None:
            width = self.sequence_length if width <= self.sequence_length else width + -width % FLEX_BLOCK

        shape = (len(bins), width)
        input_ids = torch.full(shape, self.pad_token_id)
        position_ids = torch.zeros(shape, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        segment_ids = torch.full((*shape, 2), PADDING_SEGMENT)
        shift_labels = torch.full(shape, IGNORE_INDEX)
        image_ids = []
        for sequence, members in enumerate(bins):
            start = 0
            for row_id, member in enumerate(members):
                row, stop = rows[member], start + lengths[member]
                input_ids[sequence, start:stop] = torch.tensor(row["input_ids"])
                position_ids[sequence, start:stop] = torch.tensor(row["position_ids"])
                attention_mask[sequence, start:stop] = 1
                segment_ids[sequence, start:stop, 0] = row_id
                segment_ids[sequence, start:stop, 1] = torch.tensor(row["branch_ids"])
                shift_labels[sequence, start:stop] = torch.tensor(row["shift_labels"])
                image_ids += row["image_ids"]
                start = stop

        flat_labels = shift_labels.flatten()
        label_positions = (flat_labels != IGNORE_INDEX).nonzero().flatten()  # (L,)
        if self.sequence_length is not None:
            # Spare positions point at the first token and carry no label.
            spare = -len(label_positions) % 256
            targets = torch.cat([flat_labels[label_positions], torch.full((spare,), IGNORE_INDEX)])
            label_positions = torch.cat([label_positions, torch.zeros(spare, dtype=torch.long)])
        else:
            targets = flat_labels[label_positions]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **({"segment_ids": segment_ids} if self.sharing else {}),
            "label_positions": label_positions,
            # TRL reads `shift_labels`; transformers counts the batch's items when `labels` is there, too.
            "labels": targets[None],
            "shift_labels": targets[None],
        }
        if image_ids:
            batch |= self.fetch_images(image_ids)
            if self.image_token_id is not None:
                batch["image_positions"] = (input_ids.flatten() == self.image_token_id).nonzero().flatten()
        return batch
