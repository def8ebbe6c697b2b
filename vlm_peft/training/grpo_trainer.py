"""Trainer: TRL's `GRPOTrainer`, with all samples of a question behind one prefix.

Stage: called by the recipe that trains for the score. Rewards, advantages, loss and metrics are TRL's own. Two things
are done otherwise, with the same result: samples are drawn by our generation, where a prompt is read once, pictures
come from the feature cache and ended texts leave the batch; and their log-probabilities are computed with the samples
of a question as branches of its prefix.
"""

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from ..adapters.folder import rows_in_place
from ..adapters.fused_lora import lora_in_place
from ..data.collator import SharedPrefixCollator
from ..evaluation.generation import generate_ids
from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.modeling_vision_qwen import base_model
from ..model.shared_prefix import lay_out
from .adapter_trainer import AdapterTrainer
from .trainer import use_frozen_head

_REFERENCE = "ref"
"""TRL's name of the copy of the adapter that KL is measured from."""

_UNKNOWN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
}
"""Options of TRL's sampling that ours does not have, and the values that mean nothing."""


@dataclass(frozen=True)
class Asked:
    """A question as the rollouts need it.

    Args:
        prompt_ids (`list[int]`): Of `processor.encode_prompt`, with N placeholders for each picture.
        image_ids (`list[int]`): Picture numbers, for `fetch_images` of the collator.
        answers (`list[list[int]]`): Tokens of the references, each with its end of the turn.
    """

    prompt_ids: list[int]
    image_ids: list[int]
    answers: list[list[int]]


class VisionGRPOTrainer(AdapterTrainer, GRPOTrainer):
    """`GRPOTrainer` for questions about pictures.

    Args:
        model, *args, **kwargs: Of `GRPOTrainer`, and of [`~vlm_peft.training.adapter_trainer.AdapterTrainer`]. Rows of
            `train_dataset` and `eval_dataset` have `prompt`, a text, and `row`, the number of their question.
        asked (`Sequence[Asked]`): The questions.
        collator ([`~vlm_peft.data.collator.SharedPrefixCollator`]): Fetches their pictures; without packing.
        baseline (`str`, *optional*, defaults to `"mean"`): What a sample's reward is compared with: `"mean"`, that of
            its group as TRL has it, or `"greedy"`, that of the greedy text (self-critical training, arXiv 1612.00563),
            and not scaled.
        supervised_coef (`float`, *optional*, defaults to 0.0): Weight of a further loss: nats per token of the
            references, which are branches of the same prefixes.

    Raises:
        ValueError: For options of TRL's sampling that ours does not have.
    """

    model: Any
    args: Any
    processing_class: Any
    max_completion_length: Any

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *args,
        asked: Sequence[Asked],
        collator: SharedPrefixCollator,
        baseline: str = "mean",
        supervised_coef: float = 0.0,
        **kwargs,
    ):
        self._asked, self._collator = asked, collator
        self._baseline, self._supervised_coef = baseline, supervised_coef
        self._rows: list[int] = []
        self._answers_loss: torch.Tensor | None = None
        self._advantages: torch.Tensor | None = None
        with warnings.catch_warnings():
            # That `rollout_func` may change.
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(model, *args, rollout_func=roll_out, **kwargs)
        # TRL takes those of tokenizer and model, and a template may end a turn by another token.
        self.eos_token_ids = [self.processing_class.end_of_turn_token_id]
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self._entropy_bonus_enabled):
            use_frozen_head(base_model(self.model), self.temperature)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL's; the batch says of which questions its samples are."""
        self._rows = [each["row"] for each in inputs]
        output = super()._generate_and_score_completions(inputs)
        if self._advantages is not None:
            output["advantages"], self._advantages = self._advantages, None
        return output | {"rows": torch.tensor(self._rows, device=self.accelerator.device)}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """As TRL's, `(B, F)` of all processes; the greedy texts' are subtracted where these are the baseline."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._baseline == "greedy" and self.model.training:
            distinct = list(dict.fromkeys(self._rows))
            ids = dict(zip(distinct, self.generate(distinct, None), strict=True))
            greedy_ids = [ids[row] for row in self._rows]
            texts = self.processing_class.batch_decode(greedy_ids, skip_special_tokens=True)
            greedy = super()._calculate_rewards(inputs, prompts, texts, greedy_ids)
            weights = self.reward_weights.to(rewards.device)
            advantages = ((rewards - greedy) * weights).nansum(-1)
            self._metrics["train"]["reward_greedy"].append((greedy * weights).nansum(-1).mean().item())
            first = self.accelerator.process_index * len(prompts)
            self._advantages = advantages[first : first + len(prompts)]
        return rewards

    def generate(self, rows: Sequence[int], temperature: float | None) -> list[list[int]]:
        """Answers questions with the model as it is.

        Args:
            rows (`Sequence[int]`): Numbers of the questions; one text for each.
            temperature (`float`, *optional*): Of sampling; greedy without it.

        Returns:
            `list[list[int]]`: Tokens of the texts, with the end of the turn where it was reached.
        """
        chosen = [self._asked[row] for row in rows]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            rows_in_place(model),
            lora_in_place(model),
        ):
            return generate_ids(
                model,
                self.processing_class,
                [each.prompt_ids for each in chosen],
                [each.image_ids for each in chosen],
                self._collator.fetch_images,
                batch_size=len(chosen),
                max_new_tokens=self.max_completion_length,
                temperature=temperature,
            )

    def _compute_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        self._rows = inputs["rows"].tolist()
        loss = super()._compute_loss(model, inputs)
        if self._answers_loss is not None:
            answers, self._answers_loss = self._answers_loss, None
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["supervised_loss"].append(self.accelerator.gather(answers.detach()).mean().item())
            normalizer = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self._supervised_coef * answers / normalizer
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **pictures,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """As TRL's, `(B, C)` each: log-probabilities and entropies of the C tokens that are kept, in nats.

        The rows of a question, which are equal up to there, become one sequence.
        """
        batch_size = batch_size or len(input_ids)
        parts = [
            self._score_branches(
                model,
                self._rows[start : start + batch_size],
                input_ids[start : start + batch_size],
                attention_mask[start : start + batch_size],
                logits_to_keep,
            )
            for start in range(0, len(input_ids), batch_size)
        ]
        log_probs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropies if compute_entropy else None, None

    def _score_branches(
        self, model, rows: list[int], input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row, []).append(place)
        # A text that is masked as a whole keeps its first token, which no loss counts.
        lengths = attention_mask[:, -kept:].sum(-1).clamp(min=1).tolist()
        texts = [ids[:length] for ids, length in zip(input_ids[:, -kept:].tolist(), lengths, strict=True)]
        with_answers = self._supervised_coef > 0 and torch.is_grad_enabled()
        laid_out, targets = [], []
        for row, places in groups.items():
            question = self._asked[row]
            prompt, none = question.prompt_ids, [IGNORE_INDEX] * len(question.prompt_ids)
            answers = question.answers if with_answers else []
            found = lay_out([([*prompt, *text], [*none, *text]) for text in [*(texts[p] for p in places), *answers]])
            laid_out.append({**vars(found), "image_ids": question.image_ids})
            targets += [place * kept + column for place in places for column in range(lengths[place])]
            targets += [len(rows) * kept] * sum(map(len, answers))
        device = self.accelerator.device
        batch = {name: value.to(device) for name, value in self._collator(laid_out).items()}
        with self.accelerator.autocast():
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
        target = torch.tensor(targets, device=device)
        log_probs, entropies = outputs.log_probs[0], outputs.entropy[0].to(outputs.log_probs.dtype)
        if with_answers:
            is_answer = target == len(rows) * kept
            self._answers_loss = -log_probs[is_answer].mean()
            log_probs, entropies, target = (each[~is_answer] for each in (log_probs, entropies, target))
        empty = log_probs.new_zeros(len(rows) * kept)
        return (
            empty.index_copy(0, target, log_probs).view(-1, kept),
            empty.index_copy(0, target, entropies).view(-1, kept),
        )

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # The start is read again from where it lies.
        shutil.rmtree(Path(output_dir or str(self.args.output_dir)) / _REFERENCE, ignore_errors=True)


def roll_out(prompts: list[str], trainer: VisionGRPOTrainer) -> dict[str, Any]:
    """TRL's `rollout_func`: a sample for each prompt.

    Args:
        prompts (`list[str]`): As many as there are samples.
        trainer ([`VisionGRPOTrainer`]): Knows of which questions they are.
    """
    rows = trainer._rows
    return {
        "prompt_ids": [trainer._asked[row].prompt_ids for row in rows],
        "completion_ids": trainer.generate(rows, trainer.temperature),
        "logprobs": None,
    }


def prepare_grpo_arguments(args: GRPOConfig, model: PreTrainedModel | PeftModel) -> GRPOConfig:
    """Sets what shared-prefix rollouts demand of TRL, in place.

    Args:
        args (`GRPOConfig`): Changed.
        model (`PreTrainedModel` or `PeftModel`): To train.

    Raises:
        ValueError: For options of TRL's sampling that ours does not have, and for KL without an adapter, whose start
            nobody could ask.
    """
    for name, none in _UNKNOWN.items():
        value = getattr(args, name)
        if value != none:
            raise ValueError(
                f"{name} is {value!r}: samples are drawn with the model's own probabilities at --temperature, so that "
                f"their gradient is that of the reward: leave it out."
            )
    if args.beta and not isinstance(model, PeftModel):
        raise ValueError(f"beta is {args.beta}: KL is measured from the adapter's start, and the model has no adapter.")
    if args.router_aux_loss_coef:
        raise ValueError("router_aux_loss_coef balances experts, and the routers do not train: leave it out.")
    args.router_aux_loss_coef = 0.0
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    return args
