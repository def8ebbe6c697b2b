"""Trainer: TRL's `SFTTrainer` with what a shared-prefix run needs around it.

Stage: last; called by the recipe. The loss is TRL's own; a frozen head is computed by `FrozenHeadLogProbs`, equal
and several times faster. Otherwise only what a run leaves and shows is added: complete adapter folders as checkpoints,
one readable line per log entry with tokens per second, and a checkpoint when the run is told to stop.
"""

import functools
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..adapters.folder import check_finite, rows_in_place, save_composite_config
from ..adapters.lora import PROJECTOR
from ..adapters.pissa import is_pissa, load_pissa_from_lora, lora_state, save_pissa_as_lora
from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.cuda.training import plain_decoder
from ..model.head import TILES, FrozenHeadLogProbs, with_row_gradients
from ..model.modeling_vision_qwen import VisionQwen, base_model

logger = logging.getLogger(__name__)


class VisionSFTTrainer(SFTTrainer):
    """`SFTTrainer` for encoded shared-prefix rows.

    Pass `args` of [`prepare_training_arguments`], `data_collator=SharedPrefixCollator(...)`, and a `PeftModel` or
    `peft_config`. Every checkpoint is a complete adapter folder.

    Args:
        *args, **kwargs: Of `SFTTrainer`.
        extra_files (`dict[str, str]`, *optional*): File name -> text, written beside every saved adapter.
        projector_learning_rate, vision_learning_rate (`float`, *optional*): Per optimizer step, for the projector and
            for LoRA on the encoder; `args.learning_rate` by default. All follow the same schedule.
        loraplus_lr_ratio (`float`, *optional*): LoRA+ (arXiv 2402.12354): how many times the rate of A that of B is.
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
        score: Callable[[Any], dict[str, float]] | None = None,
        **kwargs,
    ):
        self._score = score
        self._learning_rates = {PROJECTOR: projector_learning_rate, "vision_tower": vision_learning_rate}
        self._loraplus_lr_ratio = loraplus_lr_ratio
        given = {id(parameter): parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(model, *args, **kwargs)
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Beside a quantized decoder TRL rounds them to bfloat16, where small updates are lost.
                parameter.data = given.get(id(parameter), parameter.data).to(parameter.device, torch.float32)
        adapted: Any = self.model
        if isinstance(adapted.get_output_embeddings(), TrainableTokensWrapper):
            # TRL's fused head asks the head for its bias, and peft's wrapper answers for the weight only.
            adapted.get_output_embeddings().bias = None
        starts_as = adapted.active_peft_config.init_lora_weights
        self._pissa_start = lora_state(adapted) if is_pissa(starts_as) else None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            use_frozen_head(next(module for module in self.model.modules() if isinstance(module, VisionQwen)))
        self._extra_files = extra_files or {}
        self._token_counts: list[torch.Tensor] = []
        self._weights_per_token = 6 * adapted.num_parameters(exclude_embeddings=True)
        _train_once(self.model)
        self._tokens_at_last_log = 0
        self._time_of_last_log = time.monotonic()
        for theirs, ours in ((ProgressCallback, ProgressLines), (PrinterCallback, PrintedLines)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours)

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
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's plain loss; what is logged beside it stays on the device until then: no step waits for a figure.

        Other losses (label smoothing, DFT, a router's, one of the caller's) are computed by TRL.
        """
        is_plain = self.args.loss_type == "nll" and self.label_smoother is None and self.compute_loss_func is None
        if return_outputs or self.aux_loss_enabled or not is_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if model.training else "eval"
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -outputs.log_probs.sum() / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all processes, and DDP averages their gradients.
            loss = loss * self.accelerator.num_processes
        sums = [outputs.label_mask, outputs.entropy.detach(), outputs.is_top1, inputs["attention_mask"]]
        figures = torch.stack([each.sum().double() for each in sums])
        labelled, entropy, hits, tokens = self.accelerator.gather(figures[None]).sum(0)
        self._metrics[mode]["entropy"].append(entropy / labelled.clamp(min=1))
        self._metrics[mode]["mean_token_accuracy"].append(hits / labelled.clamp(min=1))
        if mode == "train":
            self._token_counts.append(tokens)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the trainer's, without counting the weights anew in every step."""
        return self._weights_per_token * inputs["input_ids"].numel()

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
            with plain_decoder(model), rows_in_place(model):
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
        """Adds `tokens_per_second`: tokens of all processes since the last entry, padding not counted.

        Raises:
            ValueError: When the loss is not finite: every later step and checkpoint would be lost.
        """
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        self._total_train_tokens += int(sum(self._token_counts))
        self._token_counts.clear()
        self._metrics[mode] |= {
            name: [float(value) for value in values] for name, values in self._metrics[mode].items()
        }
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"The loss is {logs['loss']} at step {self.state.global_step}: lower --learning_rate, or set "
                "--max_grad_norm. Earlier checkpoints are untouched."
            )
        if "loss" in logs:
            now, tokens = time.monotonic(), self._total_train_tokens
            logs["tokens_per_second"] = round((tokens - self._tokens_at_last_log) / (now - self._time_of_last_log))
            self._tokens_at_last_log, self._time_of_last_log = tokens, now
        super().log(logs, start_time)


def _train_once(model: Any) -> None:
    """Lets `model.train()`, which the trainer calls in every step, walk over the modules only where it changes any."""
    switch = model.train
    parts = [model, base_model(model).model, base_model(model).model.language_model]

    def train(mode: bool = True):
        return model if mode and all(part.training for part in parts) else switch(mode)

    model.train = train


def use_frozen_head(model: VisionQwen) -> None:
    """Lets TRL's `model(..., fused_lm_head=True)` score `(1, L)` labels with [`FrozenHeadLogProbs`] in training.

    Evaluation, other layouts of labels, a head that trains, and devices that [`TILES`] lacks stay as they are. A head
    of which a few rows train counts as frozen; the rows get their gradient beside it.
    """
    fused_forward = model.forward

    @functools.wraps(fused_forward)
    def forward(*args, **kwargs):
        head, shift_labels = model.get_output_embeddings(), kwargs.get("shift_labels")
        weight, rows = head.weight, _trained_rows(head)
        is_ours = kwargs.get("fused_lm_head") and kwargs.get("label_positions") is not None and torch.is_grad_enabled()
        trains = weight.requires_grad and rows is None
        if not is_ours or shift_labels is None or trains or weight.device.type not in TILES:
            return fused_forward(*args, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        for name in ("fused_lm_head", "labels", "shift_labels"):
            kwargs.pop(name, None)
        kwargs["use_cache"] = False
        hidden_states = model.base_model(*args, **kwargs).last_hidden_state  # (1, L, D_t)
        is_label = shift_labels != IGNORE_INDEX
        labels = shift_labels[0].clamp(min=0)
        scored, entropy, log_total, is_top1 = FrozenHeadLogProbs.apply(hidden_states[0], weight.detach(), labels)
        if rows is not None:
            scored = with_row_gradients(scored, log_total, hidden_states[0], labels, *rows)
        log_probs, entropy, is_top1 = (each[None].masked_fill(~is_label, 0) for each in (scored, entropy, is_top1))
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (is_label.sum().clamp(min=1) if num_items is None else num_items),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=is_label,
        )

    model.forward = forward


def _trained_rows(head: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows of a head that train, `(K, D_t)`, and where they are."""
    if not isinstance(head, TrainableTokensWrapper):
        return None
    adapter: Any = head.token_adapter
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    return rows, torch.tensor(adapter.token_indices[name], device=rows.device)


# What the trainer and TRL log at an evaluation beside the loss and our scores.
_NOT_SHOWN = ("_runtime", "_per_second", "_num_tokens", "_entropy", "_time", "_mean_token_accuracy")


def log_line(logs: dict[str, Any], state: TrainerState) -> str:
    """One log entry as a line to read; all its numbers are in the trainer's log history and in `--report_to`.

    Args:
        logs (`dict`): The entry.
        state (`TrainerState`): Where the run stands.
    """
    if "train_runtime" in logs:
        return (
            f"Trained to step {state.global_step} in {logs['train_runtime']:.0f} s, "
            f"{logs['train_samples_per_second']:.1f} rows/s; mean loss {logs['train_loss']:.4f}"
        )
    parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.2f}"]
    names = {"loss": "loss", "eval_loss": "eval loss", "mean_token_accuracy": "token accuracy"}
    parts += [f"{name} {logs[key]:.4f}" for key, name in names.items() if key in logs]
    parts += [
        f"{key.removeprefix('eval_')} {value:.4f}"
        for key, value in logs.items()
        if key.startswith("eval_") and key not in names and not key.endswith(_NOT_SHOWN) and "[" not in key
    ]
    if "learning_rate" in logs:
        parts.append(f"rate {logs['learning_rate']:.1e}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,} tokens/s")
    return "  ".join(parts)


class ProgressLines(ProgressCallback):
    """The trainer's progress bar, with log entries as lines instead of dictionaries."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        """Writes the entry above the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs, state))


class PrintedLines(PrinterCallback):
    """The same lines without a bar, for `--disable_tqdm true`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        """Prints the entry."""
        if state.is_world_process_zero:
            print(log_line(logs, state), flush=True)  # noqa: T201


def prepare_training_arguments(args: SFTConfig) -> SFTConfig:
    """Sets what shared-prefix rows demand of TRL, in place: rows come encoded, and our collator does the packing.

    Raises:
        ValueError: When TRL's own packing is asked for, which would ignore the branches, or a loss that balances
            experts, which is one of whole batches.
    """
    if args.packing or args.padding_free:
        raise ValueError("packing and padding_free are TRL's and do not know branches: use --pack_rows instead.")
    if args.router_aux_loss_coef:
        raise ValueError(
            "router_aux_loss_coef balances experts over all tokens of a batch, shared prefixes once, and the routers "
            "do not train: leave it out."
        )
    # Unasked, TRL would take the decoder's own coefficient.
    args.router_aux_loss_coef = 0.0
    args.remove_unused_columns = False
    # A loss that is not finite ends the run when it is logged; hiding it costs a GPU a wait in each step.
    args.logging_nan_inf_filter = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    if args.ddp_find_unused_parameters is None:
        # Every batch has pictures, so every trained weight gets a gradient; looking for others costs time in each step.
        args.ddp_find_unused_parameters = False
    return args


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training in order when SIGINT or SIGTERM arrives; a second signal ends at once.

    `received` is the signal's number, or `None`. All processes stop after the same step. When `accelerate launch` is
    ended, which does not tell the process that it started, training stops as for SIGTERM.
    """

    # Ctrl-C in a terminal reaches a process twice, from the terminal and from a launcher that passes it on.
    _SAME_SIGNAL_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        # Without a launcher, a parent that ends is a shell that was left: nohup and disown must work.
        self._launcher = os.getppid() if "ACCELERATE_USE_CPU" in os.environ else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes over the two signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # print() is not safe inside a signal handler.
                os.write(2, b"\nStopping: a checkpoint is saved after this step. A second signal ends at once.\n")
        elif time.monotonic() - self._since > self._SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Asks the trainer for a checkpoint and the end."""
        if self.received is None and self._launcher not in (None, os.getppid()):
            self.received = signal.SIGTERM
        if args.world_size > 1:
            # A process that stops alone would leave the others waiting for it in the next step.
            told = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.received = int(told) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
