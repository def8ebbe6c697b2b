"""The trainer of a CLIP: transformers' own, with a contrastive loss over the batches of all processes.

Stage: adapted [`DualEncoder`] and pairs -> adapter folders.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..training.callbacks import PrintedLines, ProgressLines
from .encoder import DualEncoder
from .folder import load_trained, save_clip
from .loss import info_nce, matches, sigmoid_loss

MAX_SCALE = math.log(100)
"""CLIP's bound of `logit_scale`."""

LOSSES = ("info_nce", "sigmoid")


class ContrastiveTrainer(Trainer):
    """transformers' `Trainer` with the negatives of all processes; every checkpoint is a complete adapter folder.

    Args:
        model ([`DualEncoder`]): What trains is what requires gradients.
        *args, **kwargs: Of `Trainer`.
        loss (`str`): One of [`LOSSES`].
        extra_files (`dict[str, str]`, *optional*): File name -> text, written beside every saved adapter.
        score (`Callable[[], dict[str, float]]`, *optional*): Called at every evaluation on all processes; what it
            returns is logged as `eval_<name>` and may be the `metric_for_best_model`.
    """

    def __init__(
        self,
        model: DualEncoder,
        *args,
        loss: str = "info_nce",
        extra_files: dict[str, str] | None = None,
        score: Callable[[], dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(model, *args, **kwargs)
        self._loss, self._extra_files, self._score = loss, extra_files or {}, score
        for theirs, ours in ((ProgressCallback, ProgressLines), (PrinterCallback, PrintedLines)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours)
        # The loss is a mean over all pairs at once: nothing is to be divided by a count of tokens.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_BoundedScale())
        # accelerate tells the epoch to a sampler or to the data set, as the number of processes has it.
        self.add_callback(_Epochs(self.train_dataset))

    def compute_loss(self, model: Any, inputs, return_outputs: bool = False, num_items_in_batch=None) -> Any:
        """The loss of all processes' pairs together, the same on each.

        DDP averages gradients, and each process has those of its own embeddings, times the number of processes:
        what comes out is the gradient of one process with the whole batch.
        """
        images, texts, scale, bias = model(inputs["text"], inputs["image"])
        picture_of, picture_ids, text_ids = (inputs[name] for name in ("picture_of", "picture_ids", "text_ids"))
        if self.args.world_size > 1:
            images, texts = _gather(images), _gather(texts)
            counts = _gather(torch.tensor([len(picture_ids)], device=picture_ids.device))
            before = counts.cumsum(0) - counts
            picture_of = _gather(picture_of + before[self.args.process_index])
            picture_ids, text_ids = _gather(picture_ids), _gather(text_ids)
        true = matches(picture_ids, picture_of, text_ids)
        # Mixed precision would round the products that the softmax compares.
        with torch.autocast(images.device.type, enabled=False):
            logits = images @ texts.T * scale
            # It changes no softmax; but DDP waits for the gradient of all that trains.
            logits = logits if bias is None else logits + bias
            loss = info_nce(logits, picture_of, true) if self._loss == "info_nce" else sigmoid_loss(logits, true)
        return (loss, {"images": images, "texts": texts}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores in the place of a loss, which depends on the size of the batch."""
        self.accelerator.unwrap_model(self.model).eval()
        found = self._score() if self._score is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save_clip(self.accelerator.unwrap_model(self.model), folder)
        for name, text in self._extra_files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model).clip, resume_from_checkpoint)


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, one after the other, which may have different numbers; gradients flow to the own ones."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, count)
    most = int(max(counts))
    padded = torch.cat([rows.detach(), rows.new_zeros(most - len(rows), *rows.shape[1:])])
    found = [torch.zeros_like(padded) for _ in counts]
    torch.distributed.all_gather(found, padded)
    parts = [each[: int(size)] for each, size in zip(found, counts, strict=True)]
    if rows.requires_grad:
        rows.register_hook(lambda gradient: gradient * len(parts))
        parts[torch.distributed.get_rank()] = rows
    return torch.cat(parts)


class _Epochs(TrainerCallback):
    """Tells the training rows which epoch it is, by which they draw texts."""

    def __init__(self, rows: Any):
        self._rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self._rows.set_epoch(int(round(state.epoch or 0, 6)))


class _BoundedScale(TrainerCallback):
    """Keeps the temperature within CLIP's bound."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        scale = getattr(model, "module", model).logit_scale
        if scale.requires_grad:
            scale.data.clamp_(max=MAX_SCALE)
