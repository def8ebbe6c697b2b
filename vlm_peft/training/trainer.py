"""Trainer: TRL's `SFTTrainer` with what a shared-prefix run needs around it.

Stage: called by the set-up of a run. The loss is TRL's own; a frozen head is computed by `FrozenHeadLogProbs`, equal
and several times faster. Otherwise only tokens per second are added.
"""

import functools
import time
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, has_length
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.head import TILES, FrozenHeadLogProbs, with_row_gradients
from ..model.modeling_vision_qwen import VisionQwen, base_model
from .adapter_trainer import AdapterTrainer


class VisionSFTTrainer(AdapterTrainer, SFTTrainer):
    """`SFTTrainer` for encoded shared-prefix rows.

    Pass `args` of [`prepare_training_arguments`], `data_collator=SharedPrefixCollator(...)`, and a `PeftModel` or
    `peft_config`.

    Args:
        *args, **kwargs: Of `SFTTrainer`, and of [`~vlm_peft.training.adapter_trainer.AdapterTrainer`].
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        adapted: Any = self.model
        if isinstance(adapted.get_output_embeddings(), TrainableTokensWrapper):
            # TRL's fused head asks the head for its bias, and peft's wrapper answers for the weight only.
            adapted.get_output_embeddings().bias = None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            use_frozen_head(next(module for module in adapted.modules() if isinstance(module, VisionQwen)))
        self._token_counts: list[torch.Tensor] = []
        # Of each batch since the last entry: labels, the sum of their entropies, hits and nats.
        self._label_sums: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._weights_per_token = 6 * adapted.num_parameters(exclude_embeddings=True)
        _train_once(adapted)
        self._tokens_at_last_log = 0
        self._time_of_last_log = time.monotonic()

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
        sums = [outputs.label_mask, outputs.entropy, outputs.is_top1, -outputs.log_probs, inputs["attention_mask"]]
        figures = torch.stack([each.detach().sum().double() for each in sums])
        *of_labels, tokens = self.accelerator.gather(figures[None]).sum(0)
        self._label_sums[mode].append(torch.stack(of_labels))
        if mode == "train":
            self._token_counts.append(tokens)
        return loss

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As the trainer's, which takes the mean over batches: the loss is the mean over all labels."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._label_sums["eval"] and output.metrics is not None:
            labelled, _, _, nats = torch.stack(self._label_sums["eval"]).sum(0).tolist()
            output.metrics[f"{prefix}_loss"] = nats / max(labelled, 1)
        return output

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As the trainer's; evaluations and checkpoints are no time of training."""
        started = time.monotonic()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._time_of_last_log += time.monotonic() - started

    def _init_training_state(self, *args, **kwargs):
        """As the trainer's; counts on from where a checkpoint stood."""
        trained = super()._init_training_state(*args, **kwargs)
        self._total_train_tokens = self._tokens_at_last_log = self.state.num_input_tokens_seen
        self._time_of_last_log = time.monotonic()
        self._epochs_before = self.state.epoch or 0.0
        return trained

    def _save_checkpoint(self, model, trial) -> None:
        self._count_tokens()
        if self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen = self._total_train_tokens
        super()._save_checkpoint(model, trial)

    def _count_tokens(self) -> None:
        self._total_train_tokens += int(sum(self._token_counts))
        self._token_counts.clear()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the trainer's, without counting the weights anew in every step."""
        return self._weights_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `tokens_per_second`: tokens of all processes since the last entry, padding not counted.

        Entropy and token accuracy are means over the labels since then, as the loss is one over the labels of a step.
        """
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        self._count_tokens()
        if self._label_sums[mode]:
            labelled, entropy, hits, _ = torch.stack(self._label_sums[mode]).sum(0).tolist()
            self._label_sums[mode].clear()
            means = {"entropy": entropy, "mean_token_accuracy": hits}
            self._metrics[mode] |= {name: [value / max(labelled, 1)] for name, value in means.items()}
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if "train_samples_per_second" in logs and has_length(self.train_dataset):
            # The trainer multiplies steps by rows of a full step, and the last step of an epoch may have fewer.
            rows = ((self.state.epoch or 0.0) - self._epochs_before) * len(self.train_dataset)
            logs["train_samples_per_second"] = round(rows / max(logs["train_runtime"], 1e-4), 3)
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


def use_frozen_head(model: VisionQwen, temperature: float = 1.0) -> None:
    """Lets TRL's `model(..., fused_lm_head=True)` score `(1, L)` labels with [`FrozenHeadLogProbs`].

    Other layouts of labels, a head that trains, and devices that [`TILES`] lacks stay as they are. A head of which a
    few rows train counts as frozen; the rows get their gradient beside it.

    Args:
        model ([`VisionQwen`]): With TRL's fused head.
        temperature (`float`, *optional*, defaults to 1.0): By which TRL divides the logits.
    """
    fused_forward = model.forward

    # A method, as TRL's: accelerate takes its own wrappers of a method off again.
    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        head, shift_labels = model.get_output_embeddings(), kwargs.get("shift_labels")
        weight, rows = head.weight, _trained_rows(head)
        is_ours = kwargs.get("fused_lm_head") and kwargs.get("label_positions") is not None
        trains = weight.requires_grad and rows is None
        if not is_ours or shift_labels is None or trains or weight.device.type not in TILES:
            return fused_forward(*args, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        for name in ("fused_lm_head", "labels", "shift_labels"):
            kwargs.pop(name, None)
        kwargs["use_cache"] = False
        hidden_states = model.base_model(*args, **kwargs).last_hidden_state  # (1, L, D_t)
        if temperature != 1:
            hidden_states = hidden_states / temperature
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

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def _trained_rows(head: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows of a head that train, `(K, D_t)`, and where they are."""
    if not isinstance(head, TrainableTokensWrapper):
        return None
    adapter: Any = head.token_adapter
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    return rows, torch.tensor(adapter.token_indices[name], device=rows.device)


def prepare_training_arguments(args: SFTConfig) -> SFTConfig:
    """Sets what shared-prefix rows demand of TRL, in place: rows come encoded, and our collator does the packing.

    Raises:
        ValueError: When TRL's own packing is asked for, which would ignore the branches, or a loss that balances
            experts, which is one of whole batches.
    """
    if args.packing or args.padding_free:
        raise ValueError("packing and padding_free are TRL's and do not know branches: use --pack_rows instead.")
    if args.chat_template_path is not None:
        raise ValueError(
            f"--chat_template_path {args.chat_template_path}: rows come rendered, by the template that is saved with "
            "the model: leave it out."
        )
    if args.eos_token is not None:
        raise ValueError(
            f"--eos_token {args.eos_token}: texts end where the model's template ends a turn: leave it out."
        )
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
