"""What any trainer of an adapted model needs: adapter folders as checkpoints, parts with own rates, scores.

Stage: below the trainers of single objectives, which put it before one of transformers' or TRL's.
"""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..adapters.folder import check_finite, rows_in_place, save_composite_config
from ..adapters.lora import PROJECTOR
from ..adapters.pissa import is_pissa, load_pissa_from_lora, lora_state, save_pissa_as_lora
from ..adapters.strategies import layers_from_top
from .callbacks import PrintedLines, ProgressLines

logger = logging.getLogger(__name__)


def _from(start: int, rate: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule that is 0 before its first step."""
    return lambda step: rate(step) if step >= start else 0.0


class AdapterTrainer(Trainer):
    """transformers' `Trainer` of an adapted model; every checkpoint is a complete adapter folder.

    A model that trains itself, without an adapter, is saved whole.

    A mixin, too: `class MyTrainer(AdapterTrainer, SFTTrainer)` puts it before any subclass of `Trainer`, of which the
    loss stays as it is.

    Args:
        model (`PeftModel`): Or what the other trainer makes one of, or a model whose own weights train.
        *args, **kwargs: Of `Trainer`, or of the other trainer.
        extra_files (`dict[str, str]`, *optional*): File name -> text, written beside every saved adapter.
        projector_learning_rate, vision_learning_rate (`float`, *optional*): Per optimizer step, for the projector and
            for what trains in the encoder; `args.learning_rate` by default. All follow the same schedule.
        loraplus_lr_ratio (`float`, *optional*): LoRA+ (arXiv 2402.12354): how many times the rate of A that of B is.
        layer_decay (`float`, *optional*): Factor on the rate for each layer that a weight lies below the top of its
            part; see [`~vlm_peft.adapters.strategies.layers_from_top`].
        unfreeze_steps (`int`, *optional*): Every so many optimizer steps one more layer learns, from the decoder's last
            one downwards, then the encoder's. All are in the optimizer from the beginning, at a rate of 0.
        score (`Callable[[model], dict[str, float]]`, *optional*): Called on all processes at every evaluation with the
            model; what it returns is logged as `eval_<name>` and may be the `metric_for_best_model`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *args,
        extra_files: dict[str, str] | None = None,
        projector_learning_rate: float | None = None,
        vision_learning_rate: float | None = None,
        loraplus_lr_ratio: float | None = None,
        layer_decay: float | None = None,
        unfreeze_steps: int | None = None,
        score: Callable[[Any], dict[str, float]] | None = None,
        **kwargs,
    ):
        self._extra_files = extra_files or {}
        self._learning_rates = {PROJECTOR: projector_learning_rate, "vision_tower": vision_learning_rate}
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._layer_decay, self._unfreeze_steps = layer_decay, unfreeze_steps
        self._score = score
        given = {id(parameter): parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(model, *args, **kwargs)
        adapted: Any = self.model
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                # Beside a quantized decoder TRL rounds them to bfloat16, where small updates are lost.
                parameter.data = given.get(id(parameter), parameter.data).to(parameter.device, torch.float32)
        is_pissa_run = isinstance(adapted, PeftModel) and is_pissa(adapted.active_peft_config.init_lora_weights)
        self._pissa_start = (lora_state(adapted) or None) if is_pissa_run else None
        for theirs, ours in ((ProgressCallback, ProgressLines), (PrinterCallback, PrintedLines)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's, of a text model, would lie beside an earlier run's weights until this run has its own."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the trainer's, or peft's for LoRA+; parts with a learning rate of their own are groups of their own."""
        trained: Any = model if model is not None else self.model
        if self.optimizer is not None:
            return super().create_optimizer(model)
        rates = {part: rate for part, rate in self._learning_rates.items() if rate is not None}
        if self._loraplus_lr_ratio is not None:
            optimizer_cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            arguments |= {"loraplus_lr_ratio": self._loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(trained, optimizer_cls, **arguments)
            # It would take the projector's biases for B.
            rates.setdefault(PROJECTOR, self.args.learning_rate)
        optimizer = super().create_optimizer(model)
        for part, rate in rates.items():
            chosen = {id(parameter) for name, parameter in trained.named_parameters() if part in name}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in chosen]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
                    ratio = 1.0 if part == PROJECTOR else group["lr"] / self.args.learning_rate
                    optimizer.add_param_group({**group, "params": own, "lr": rate * ratio})
        if self._layer_decay is not None or self._unfreeze_steps is not None:
            self._split_by_layer(optimizer, trained)
        return optimizer

    def _split_by_layer(self, optimizer: torch.optim.Optimizer, trained) -> None:
        """Gives each layer groups of its own, with its rate, and the `turn` in which it begins to learn."""
        find = layers_from_top(trained)
        places = {id(each): find(name, each) for name, each in trained.named_parameters() if each.requires_grad}
        # By their names the decoder comes before the encoder.
        order = sorted(place for place in set(places.values()) if place[0])
        turns = {place: turn for turn, place in enumerate(order)}
        for group in list(optimizer.param_groups):
            by_place: dict = {}
            for parameter in group["params"]:
                by_place.setdefault(places[id(parameter)], []).append(parameter)
            group["params"] = []
            for place, parameters in by_place.items():
                turn = turns.get(place, 0)
                rate = group["lr"] * (self._layer_decay or 1.0) ** place[1]
                optimizer.add_param_group({**group, "params": parameters, "lr": rate, "turn": turn})

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As the trainer's; with `unfreeze_steps` the rate of a layer is 0 until its turn."""
        is_first = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if self._unfreeze_steps is not None and is_first:
            starts = [group.get("turn", 0) * self._unfreeze_steps for group in scheduler.optimizer.param_groups]
            scheduler.lr_lambdas = [
                _from(start, rate) for start, rate in zip(starts, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * rate(0)
        return scheduler

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the trainer's; the scores are among its metrics, where callbacks and `metric_for_best_model` look."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._score is not None:
            model: Any = self.accelerator.unwrap_model(self.model)
            with rows_in_place(model):
                scores = self._score(model)
            assert output.metrics is not None
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        """As the trainer's, which would train one more step of a run that is finished."""
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs)
        if self.state.global_step < max_steps:
            return trained
        logger.info("Trained to step %d of %d already: nothing is left to train.", self.state.global_step, max_steps)
        return num_train_epochs, 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        adapted: Any = self.model
        if self._pissa_start is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._pissa_start = load_pissa_from_lora(adapted, resume_from_checkpoint, self._pissa_start)

    def _issue_warnings_after_load(self, load_result) -> None:
        """As the trainer's; of two names of one tensor a file has one."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """As the trainer's, which keeps the first of equals: the loss decides, then the later step."""
        name = str(self.args.metric_for_best_model)
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        is_better = super()._determine_best_metric(metrics, trial)
        if is_better or value is None or value != self.state.best_metric:
            return is_better
        losses: dict = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        before, now = losses.get(self.state.best_global_step), metrics.get("eval_loss")
        if before is not None and now is not None and now > before:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:
            said = str(error)
            if not isinstance(error, SafetensorError) and "inline_container" not in said and "StreamWriter" not in said:
                raise
            free = shutil.disk_usage(Path(str(self.args.output_dir)).absolute().parent).free
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {self.args.output_dir}, whose "
                f"disk has {free / 1e9:.2f} GB free ({' '.join(said.split())[:200]}): make room, and go on from the "
                "last whole one with --resume_from_checkpoint true."
            ) from error

    def _load_best_model(self) -> None:
        logger.info(
            "Kept step %s: %s %s is the best of all evaluations.",
            self.state.best_global_step,
            self.args.metric_for_best_model,
            self.state.best_metric,
        )
        if self._pissa_start is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        trained: Any = self.model
        weights = state_dict or {name: value for name, value in trained.named_parameters() if value.requires_grad}
        check_finite(weights.items(), f"Nothing is saved at step {self.state.global_step}")
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if self._pissa_start is not None:
            save_pissa_as_lora(folder, self._pissa_start)
        save_composite_config(self.accelerator.unwrap_model(self.model), folder)
        for name, text in self._extra_files.items():
            temporary = folder / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(folder / name)
        # A pickle that nothing here reads, in a folder that is meant to be passed on.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the trainer's.

        Raises:
            ValueError: When the loss is not finite: every later step and checkpoint would be lost.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"The loss is {logs['loss']} at step {self.state.global_step}: lower --learning_rate, or set "
                "--max_grad_norm. Earlier checkpoints are untouched."
            )
        super().log(logs, start_time)
