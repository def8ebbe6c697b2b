"""What trains: LoRA's layers, the projector and rows of turn tokens, and the table that shows it.

Stage: joined model -> `LoraConfig` for peft.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..model.modeling_vision_qwen import VisionQwen
from .pissa import is_pissa

PROJECTOR = "multi_modal_projector"

LAYERS = {"linear": r"model\.language_model\..*", "attention": r"model\.language_model\..*(?:attn|attention)\w*"}
"""Where in the decoder LoRA's layers are, as regular expressions over the full names of their parents."""


def lora_config(
    model: VisionQwen,
    *,
    target_modules: str | list[str] | None = None,
    layers: str | None = "linear",
    lora_vision: bool = False,
    **arguments,
) -> LoraConfig:
    """LoRA on the decoder's linear layers, the projector trained in full, and rows of added turn tokens.

    Args:
        model ([`VisionQwen`]): What will be adapted; [`add_turn_rows`] is called on it.
        target_modules (`str` or `list[str]`, *optional*): Names of layers (`["q_proj", "v_proj"]`), or a regular
            expression over full names. All linear layers by default and for `"all-linear"`. Plain names would also hit
            the encoder, so they are anchored here.
        layers (`str`, *optional*, defaults to `"linear"`): Which of [`LAYERS`]; `None` leaves the decoder without LoRA.
        lora_vision (`bool`, *optional*, defaults to `False`): Also adapts the encoder's layers of these names.
        **arguments: Further fields of `peft.LoraConfig` (`r`, `lora_alpha`, `use_dora`, `init_lora_weights`, ...).

    Returns:
        `peft.LoraConfig`: With the projector in `modules_to_save`.

    Raises:
        ValueError: When the targets include the head, hit no layer of a part, or the decoder is quantized and PiSSA
            needs its weights; or when a tied head or embedding should train whole beside rows of added turn tokens.
    """
    if isinstance(target_modules, str) and target_modules.isidentifier():
        # Of a list of one, TRL makes a text.
        target_modules = [target_modules]
    if not isinstance(target_modules, str) or target_modules == "all-linear":
        names = None if target_modules in (None, "all-linear", ["all-linear"]) else list(target_modules)
        if names is not None and "lm_head" in names:
            raise ValueError("LoRA on lm_head is not supported: the loss reads the head's weight directly.")
        # Only the encoder's numbered layers: its pooling head has no part in the hidden states.
        parts = ([LAYERS[layers]] if layers else []) + ([r"model\.vision_tower\..*\.\d+\..*"] if lora_vision else [])
        target_modules = "|".join(_targets(model, part, names) for part in parts) or DUMMY_TARGET_MODULES
    elif not any(re.fullmatch(target_modules, name) for name, _ in model.named_modules()):
        raise ValueError(f"target_modules hit no layer of the model: {target_modules}.")
    if is_pissa(arguments.get("init_lora_weights")) and getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            "PiSSA starts from the singular vectors of full-precision weights: leave quantization out, or start LoRA "
            "at zero (init_lora_weights=True)."
        )
    modules_to_save = list(dict.fromkeys([PROJECTOR, *(arguments.pop("modules_to_save", None) or [])]))
    if model.config.turn_token_ids is not None:
        add_turn_rows(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is embedding or module is head]
        whole = [name for name in names if any(f".{name}".endswith(f".{saved}") for saved in modules_to_save)]
        is_tied = head.weight is embedding.weight
        if is_tied and whole:
            raise ValueError(
                f"The decoder's head is its embedding, and rows of it train for added turn tokens: leave {whole[0]} "
                "out of modules_to_save."
            )
        # peft ties the rows of a tied head by itself.
        chosen = names[:1] if is_tied else [name for name in names if name not in whole]
        arguments["trainable_token_indices"] = dict.fromkeys(chosen, model.config.turn_token_ids)
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=target_modules, modules_to_save=modules_to_save, **arguments
    )


def add_turn_rows(model: VisionQwen) -> None:
    """Gives `config.turn_token_ids` their first rows in embedding and head, which grow when they have none to spare.

    A turn ends as a text ends, with the row of the decoder's own end-of-text token. It begins with the mean of all
    rows, whose logit is never the largest. Called again, it changes nothing.

    Args:
        model ([`VisionQwen`]): Before it gets an adapter, after the processor has set the ids.

    Raises:
        ValueError: When the head has a bias, which peft would leave out of its rows.
    """
    begin_and_end = model.config.turn_token_ids
    if begin_and_end is None:
        return
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            "Turn tokens cannot be added to a decoder whose head has a bias: expected a tokenizer with "
            "<|im_start|> and <|im_end|>, or with a chat template."
        )
    text_config: Any = model.config.text_config
    if text_config.vocab_size <= max(begin_and_end):
        model.resize_token_embeddings(max(begin_and_end) + 1, mean_resizing=False)
    begin, end = begin_and_end
    end_of_text = model.generation_config.eos_token_id
    if end_of_text is None:
        end_of_text = text_config.eos_token_id
    if isinstance(end_of_text, list):
        end_of_text = end_of_text[0]
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight: Any = module.weight
            known = weight[: min(begin_and_end)]
            mean = known.mean(dim=0, dtype=torch.float32)
            weight[begin] = mean
            weight[end] = mean if end_of_text is None or end_of_text >= len(known) else known[end_of_text]


def _targets(model: VisionQwen, part: str, names: list[str] | None) -> str:
    """A regular expression over the linear layers of one part; over all of them without names."""
    within = re.compile(rf"{part}\.[^.]+")
    linear = [name for name, module in model.named_modules() if _is_linear(module) and within.fullmatch(name)]
    names = names or sorted({name.rpartition(".")[2] for name in linear})
    target = rf"{part}\.({'|'.join(map(re.escape, names))})"
    if not any(re.fullmatch(target, name) for name in linear):
        raise ValueError(f"target_modules hit no layer of the model: {target}.")
    return target


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, quantized ones included, and GPT-2's transposed ones."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def unadapted_experts(model: nn.Module) -> list[str]:
    """Weights of a decoder's experts, which are no linear layers: LoRA has no part in them.

    Returns:
        `list[str]`: Their names inside a layer, for example `mlp.experts.down_proj`.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name]
    return sorted({re.split(r"\.\d+\.", name)[-1] for name in names})


@dataclass(frozen=True)
class TrainableRow:
    """One line of the start-up table.

    Args:
        module (`str`): `vision_tower`, `multi_modal_projector`, `language_model` or `lm_head`.
        parameters (`int`): Weights in the module, adapters included; a copy that peft trains counts once, and packed
            weights as many as they stand for.
        trainable (`int`): Of these, trained.
        dtypes (`str`): Storage dtypes of its weights, of packed ones with their format: `nf4 (uint8)`.
    """

    module: str
    parameters: int
    trainable: int
    dtypes: str


def trainable_table(model: nn.Module) -> list[TrainableRow]:
    """What trains, module by module; a head tied to the embedding is counted there, once."""
    counts: dict[str, list] = {name: [0, 0, set()] for name in ("vision_tower", PROJECTOR, "language_model", "lm_head")}
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue
        module = next((part for part in counts if f".{part}." in f".{name}."), None)
        if module is None:
            raise ValueError(f"The parameter {name} belongs to none of {', '.join(counts)}.")
        packed = getattr(parameter, "quant_state", None)
        numel = packed.shape.numel() if packed is not None else parameter.numel()
        dtype = str(parameter.dtype).removeprefix("torch.")
        counts[module][0] += numel
        counts[module][1] += numel if parameter.requires_grad else 0
        counts[module][2].add(f"{packed.quant_type} ({dtype})" if packed is not None else dtype)
    return [
        TrainableRow(module, parameters, trainable, ", ".join(sorted(dtypes)))
        for module, (parameters, trainable, dtypes) in counts.items()
        if parameters
    ]


def format_trainable_table(rows: list[TrainableRow]) -> str:
    """The table as aligned text with a total line."""
    total = sum(row.parameters for row in rows)
    trained = sum(row.trainable for row in rows)
    lines = [f"{'module':<24}{'parameters':>15}{'trainable':>15}  dtype"]
    lines += [f"{row.module:<24}{row.parameters:>15,}{row.trainable:>15,}  {row.dtypes}" for row in rows]
    lines.append(f"{'total':<24}{total:>15,}{trained:>15,}  {100 * trained / total:.2f} % trained")
    return "\n".join(lines)


def check_trainable(rows: list[TrainableRow], *, vision_tower_trains: bool = False) -> None:
    """Refuses to train what nobody asked for, or without the projector.

    Raises:
        ValueError: When the encoder has trainable parameters unasked, or the projector has none.
    """
    trained = {row.module: row.trainable for row in rows}
    if trained.get("vision_tower") and not vision_tower_trains:
        raise ValueError(
            f"The vision tower has {trained['vision_tower']:,} trainable parameters that nobody asked for: restrict "
            "target_modules to the decoder (a regular expression over full names), or freeze the tower."
        )
    if not trained.get(PROJECTOR):
        raise ValueError(
            "The projector has no trainable parameters: the decoder would train without ever seeing a picture. Put "
            f"{PROJECTOR!r} into modules_to_save."
        )
