"""Checkpoints: which of them are whole, and of which run they are.

Stage: before a run goes on; called by the run. A record of the options that decide the model, of its bases and of
its data lies in every checkpoint and is compared, so that no run goes on with another's weights.
"""

import json
import logging
import zipfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..adapters.folder import is_adapter_folder, weights_digest
from ..data.splits import Split, content_hash
from ..json_files import read_json
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..model.projector import ProjectorSettings
from ..tasks import DECIDED_BY_ROWS, TaskOptions
from .arguments import VisionArguments

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
_PICKLED = ("optimizer.pt", "scheduler.pt")
_VISION = (
    "vision_feature_layer",
    "image_size",
    "keep_class_token",
    *(each.name for each in fields(ProjectorSettings)),
    "strategy",
    "top_layers",
    "vision_layers",
    "layer_decay",
    "unfreeze_steps",
    "lora_vision",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "task",
    "instruction",
    *(each.name for each in fields(TaskOptions) if each.name not in DECIDED_BY_ROWS),
    "train_split",
    "train_limit",
)
_MODEL = ("lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora")


def run_record(
    vision: VisionArguments,
    training: Any,
    model_args: Any,
    config: VisionQwenConfig | None = None,
    splits: Iterable[Split] = (),
    *,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with.

    Args:
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
        config ([`VisionQwenConfig`], *optional*): Of the joined model, whose bases are then recorded.
        splits (`Iterable[Split]`, *optional*): That are trained on.
        start (`str` or `Path`, *optional*): Folder of an earlier training, which this one goes on from.

    Returns:
        `dict`: JSON values, without paths and names: what is equal elsewhere is the same.
    """
    found = {name: getattr(vision, name) for name in _VISION} | {name: getattr(model_args, name) for name in _MODEL}
    found |= {"seed": training.seed, "max_length": getattr(training, "max_length", None), "optim": str(training.optim)}
    # Their groups of weights are in the optimizer's state.
    for name in ("projector_learning_rate", "vision_learning_rate"):
        found[f"{name} given"] = getattr(vision, name) is not None
    found["rows a step"] = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    found["the start's weights"] = None if start is None else weights_digest(start)
    if config is not None:
        found |= {"encoder's weights": config.vision_fingerprint, "decoder's weights": config.text_fingerprint}
    hashes = [content_hash(split) for split in splits]
    return found | ({"training data": hashes} if hashes else {})


def check_same_run(checkpoint: str | Path, record: dict[str, Any]) -> None:
    """Compares the record in a checkpoint with that of the run that is to go on from it.

    Args:
        checkpoint (`str` or `Path`): Its folder; one without a record is taken, and it is said.
        record (`dict`): Of [`run_record`].

    Raises:
        ValueError: When they differ; names each option with both values.
    """
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        logger.info("%s has no %s: whether its options are the same is not known.", checkpoint, RUN_FILE)
        return
    saved, wanted = read_json(path), json.loads(json.dumps(record))
    differing = [name for name in wanted if name in saved and saved[name] != wanted[name]]
    if differing:
        shown = "; ".join(f"{name}: {saved[name]} there, {wanted[name]} here" for name in differing)
        raise ValueError(
            f"{checkpoint} is of another run ({shown}): give what it was trained with, or begin anew in another "
            "--output_dir."
        )


def why_broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint; `None` for one that training can go on from."""
    # The trainer writes this file last, so a folder without it was left half written.
    if not (folder / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    try:
        if not isinstance(read_json(folder / STATE_FILE).get("global_step"), int):
            return f"{STATE_FILE} names no global_step"
    except ValueError:
        return f"{STATE_FILE} is damaged"
    for name in _PICKLED:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is damaged"
    if not list(folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    is_full = not is_adapter_folder(folder) and (folder / "config.json").is_file()
    names = {path.name for path in folder.glob("model*.safetensors")} if is_full else set()
    for name in sorted(names) or ["adapter_model.safetensors"]:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{name} is missing or damaged"
    return None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Folders `checkpoint-*`, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def newest_whole(folder: str | Path) -> Path | None:
    """The newest checkpoint that training can go on from; says which newer ones are passed over, and why."""
    for path in checkpoints_in(folder):
        reason = why_broken(path)
        if reason is None:
            return path
        logger.info("%s is passed over: %s.", path, reason)
    return None


def checkpoint_to_resume(training: Any, *, overwrite: bool = False) -> str | None:
    """`--resume_from_checkpoint true` means the newest complete one in `--output_dir`; a path means itself.

    Args:
        training (`SFTConfig`): `resume_from_checkpoint` and `output_dir`.
        overwrite (`bool`, *optional*, defaults to `False`): A run may begin where an earlier one left checkpoints.

    Raises:
        FileNotFoundError: when there is none, or a file of it is missing or damaged.
        FileExistsError: when a run begins beside the checkpoints of an earlier one.
    """
    value = str(training.resume_from_checkpoint)
    if value.lower() in ("false", "none", ""):
        others = checkpoints_in(training.output_dir)
        if others and not overwrite:
            raise FileExistsError(
                f"--output_dir {training.output_dir} holds {others[0].name} of an earlier run: go on with it with "
                "--resume_from_checkpoint true, or begin anew in another --output_dir, or in this one with "
                "--overwrite_output_dir true, which removes its checkpoints."
            )
        return None
    if value.lower() != "true":
        reason = why_broken(Path(value))
        if reason is not None:
            raise FileNotFoundError(f"{value} is no checkpoint to resume from: {reason}.")
        return value
    folder = newest_whole(training.output_dir)
    if folder is None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint true: {training.output_dir} has no complete checkpoint-* folder. Leave the "
            "option out to train from the beginning."
        )
    return str(folder)
