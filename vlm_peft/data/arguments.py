"""Options of a data set: where its rows come from and what they mean.

Stage: part of the options of a run; each entry of a mixture has its own.
"""

from dataclasses import dataclass, field

from ..tasks import DEFAULT_TASK, TASKS, TaskOptions


@dataclass
class DataArguments(TaskOptions):
    """Where rows come from and what they mean, with the tasks' own options. In a `mixture`, each entry has its own."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, table (parquet, CSV, JSON, JSON Lines) or folder of tables, or image folder."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit or branch of the data set."})
    stored_split: str | None = field(default=None, metadata={"help": "The one stored split, with --split_column."})
    split_column: str | None = field(default=None, metadata={"help": "Column that names each row's true split."})
    task: str = field(default=DEFAULT_TASK, metadata={"help": "What rows mean.", "choices": list(TASKS)})
    image_column: str = field(default="image", metadata={"help": "Column with the picture."})
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Where relative paths in the picture's column begin; the table's own folder by default."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the texts; found by usual names."})
    instruction: str | None = field(
        default=None, metadata={"help": "What the user says beside the picture; each task has its own by default."}
    )
    train_split: str | None = field(
        default="train",
        metadata={"help": "Rows to train on; train+restval are two splits. null in a mixture: to be scored only."},
    )
    eval_splits: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={
            "help": "Held-out splits to score; train[10%%] is a tenth of the split train, drawn by pictures and not "
            "trained on; none is no split."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Draws what train[10%%] holds out."})
    train_limit: int | None = field(default=None, metadata={"help": "First so many training rows only."})
    eval_limit: int | None = field(default=None, metadata={"help": "First so many rows of each held-out split only."})
    blind_splits: list[str] = field(default_factory=list, metadata={"help": "Splits to score with swapped pictures."})
    weight: float | None = field(
        default=None, metadata={"help": "In a mixture: how often rows are drawn, relative to the other entries'."}
    )
