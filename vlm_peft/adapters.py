"""Adapters: what trains, and the one small folder that holds it.

Stage: model -> `PeftModel` for the trainer; folder <-> model. An adapter folder holds LoRA, the full projector and the
rows of turn tokens that were added to the decoder's vocabulary in one `adapter_model.safetensors`,
`adapter_config.json`, the composite `config.json` with both bases, and the processor. It holds no base weights and
nothing that would have to be unpickled.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .configuration_vision_qwen import VisionQwenConfig
from .hub.access import looks_local
from .hub.models import pull_model
from .modeling_vision_qwen import VisionQwen

PROJECTOR = "multi_modal_projector"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")
# Saved together by the processor; an adapter alone, without any of them, loads.
_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
_LORA_MATRIX = re.compile(r"\.lora_[AB]\.")


def lora_config(
    model: VisionQwen, *, target_modules: str | list[str] | None = None, lora_vision: bool = False, **arguments
) -> LoraConfig:
    """LoRA on the decoder's linear layers, the projector trained in full, and rows of added turn tokens.

    Args:
        model ([`VisionQwen`]): What will be adapted; [`add_turn_rows`] is called on it.
        target_modules (`str` or `list[str]`, *optional*): Names of layers (`["q_proj", "v_proj"]`), or a regular
            expression over full names. All linear layers by default and for `"all-linear"`. Plain names would also hit
            the encoder, so they are anchored here.
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
        parts = {r"model\.language_model\..*": True, r"model\.vision_tower\..*\.\d+\..*": lora_vision}
        target_modules = "|".join(_targets(model, part, names) for part, is_asked in parts.items() if is_asked)
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
    linear = [name for name, module in model.named_modules() if _is_linear(module) and re.fullmatch(part, name)]
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


def is_pissa(init_lora_weights: Any) -> bool:
    """Whether LoRA starts from principal singular vectors (PiSSA, arXiv 2404.02948), which it takes out of the base."""
    return str(init_lora_weights).startswith("pissa")


def lora_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the LoRA matrices under the names that they have in an adapter file."""
    state = get_peft_model_state_dict(model)
    return {name: value.detach().cpu().clone() for name, value in state.items() if _LORA_MATRIX.search(name)}


def save_pissa_as_lora(folder: str | Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrites a saved PiSSA adapter as LoRA of twice the rank on the unchanged base.

    What was learnt is BA - B_0 A_0 = [B, -B_0] [A; A_0], where B_0 A_0 was taken out of the base. The same as peft's
    `path_initial_model_for_weight_conversion`, which loses `modules_to_save`.

    Args:
        folder (`str` or `Path`): What `PeftModel.save_pretrained` wrote.
        start (`dict[str, torch.Tensor]`): [`lora_state`] before training.
    """
    folder = Path(folder)
    state = load_file(folder / "adapter_model.safetensors")
    for name, value in start.items():
        is_a = ".lora_A." in name
        state[name] = torch.cat([state[name], value if is_a else -value], dim=0 if is_a else 1).contiguous()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # The scale alpha / r, or alpha / sqrt(r), stays what it was.
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    save_file(state, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / f"{name}.tmp").rename(folder / name)


def load_pissa_from_lora(
    model: PeftModel, folder: str | Path, start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Goes on with PiSSA from a folder of [`save_pissa_as_lora`].

    Args:
        model (`PeftModel`): With PiSSA as it starts.
        folder (`str` or `Path`): The saved adapter.
        start (`dict[str, torch.Tensor]`): Where LoRA of this model starts from.

    Returns:
        `dict[str, torch.Tensor]`: Where the saved run started from; another machine, and the randomized
        decomposition, find other singular vectors, and the base is then left without those of the saved run.
    """
    state = load_file(Path(folder) / "adapter_model.safetensors")
    saved_start = {}
    for name in start:
        is_a = ".lora_A." in name
        state[name], half = (part.contiguous() for part in state[name].chunk(2, dim=0 if is_a else 1))
        saved_start[name] = half if is_a else -half
    if not all(torch.equal(value, saved_start[name]) for name, value in start.items()):
        for sign, values in ((1, start), (-1, saved_start)):
            set_peft_model_state_dict(model, {**state, **values})
            for layer in model.modules():
                if isinstance(layer, Linear):
                    base: Any = layer.get_base_layer()
                    base.weight.data += sign * layer.get_delta_weight(model.active_adapter)
    set_peft_model_state_dict(model, state)
    return saved_start


def base_model(model: PreTrainedModel | PeftModel) -> VisionQwen:
    """The model inside its adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, VisionQwen)
    return base


def save_composite_config(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Writes the composite `config.json` into an adapter folder; local bases are kept as absolute paths."""
    config = base_model(model).config
    for field in ("vision_name_or_path", "text_name_or_path"):
        name = getattr(config, field)
        if name is not None and Path(name).exists():
            setattr(config, field, str(Path(name).resolve()))
    config.save_pretrained(folder)


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a local folder holds an adapter rather than a full save."""
    return (Path(folder) / "adapter_config.json").is_file()


def load_adapter(
    name_or_path: str | Path,
    *,
    merge: bool = False,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    revision: str | None = None,
    is_trainable: bool = False,
    dtype: torch.dtype = torch.float32,
    **arguments,
) -> VisionQwen | PeftModel:
    """Reassembles encoder, decoder, projector and LoRA from an adapter folder.

    Args:
        name_or_path (`str` or `Path`): Adapter folder, or the id of a Hub repository that holds one.
        merge (`bool`, *optional*, defaults to `False`): Adds LoRA to the decoder's weights and returns a plain
            [`VisionQwen`]; otherwise a `PeftModel` around it, whose adapter can be disabled.
        vision, text (`str` or `Path`, *optional*): Where the bases lie when they moved.
        revision (`str`, *optional*): Of the adapter's Hub repository.
        is_trainable (`bool`, *optional*, defaults to `False`): Loads LoRA and projector ready to train on.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the bases.
        **arguments: Passed on to [`VisionQwen.from_vision_text_pretrained`] (`device_map`, `quantization_config`, ...).

    Returns:
        `PeftModel` or [`VisionQwen`] in evaluation mode.

    Raises:
        FileNotFoundError: When a file of the adapter, or a base's folder, is missing; names it.
        ValueError: When the folder is no adapter of a VisionQwen, a file is damaged, its tensors are not those that
            its configuration asks for or not finite, the bases are not those it was trained on, or it should be merged
            into quantized weights.
    """
    if merge and arguments.get("quantization_config") is not None:
        raise ValueError(
            "merge=True with a quantization_config would round the adapter away with the weights: merge into the full "
            "weights (without quantization_config) and quantize the saved result, or keep merge=False."
        )
    folder = Path(name_or_path)
    if not folder.exists():
        if looks_local(str(name_or_path)):
            raise FileNotFoundError(f"The adapter folder {name_or_path} is not there.")
        folder = pull_model(str(name_or_path), revision=revision)
    _check_adapter_files(folder)
    with reading(folder / "config.json"):
        config = VisionQwenConfig.from_pretrained(folder)
    if text is None and config.text_name_or_path is None:
        raise ValueError(
            f"The adapter {folder} was trained on a decoder that was drawn at random, not loaded: save that decoder "
            "and say where it lies with text=."
        )
    bases = {"vision": str(vision or config.vision_name_or_path), "text": str(text or config.text_name_or_path)}
    for part, base in bases.items():
        if looks_local(base) and not Path(base).exists():
            raise FileNotFoundError(
                f"The adapter {folder} was trained on the {part} base {base}, which is not there: say where it lies "
                f"with {part}=."
            )
    model = VisionQwen.from_vision_text_pretrained(
        bases["vision"],
        bases["text"],
        vision_revision=config.vision_revision,
        text_revision=config.text_revision,
        dtype=dtype,
        **config.joint_fields,
        **arguments,
    )
    add_turn_rows(model)
    _check_bases(config, model.config, folder)
    with reading(folder / "adapter_config.json and adapter_model.safetensors"), warnings.catch_warnings():
        # What it warns of is refused below, by name.
        warnings.filterwarnings("ignore", message="Found missing adapter keys|Some weights of PeftModel")
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, ignore_mismatched_sizes=True)
    _check_tensors(adapted, folder)
    if merge:
        return adapted.merge_and_unload().eval()
    if is_trainable:
        return adapted
    for layer in _row_layers(adapted):
        layer.merge()
    return adapted.eval()


def _row_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """What puts trained rows into embedding and head, where they are not in there yet."""
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer) and not module.merged]


@contextmanager
def rows_in_place(model: nn.Module) -> Iterator[None]:
    """Runs the block with the trained rows in embedding and head: to generate a token would copy both of them.

    Args:
        model (`PeftModel` or what it is in): Not under `torch.inference_mode`, whose tensors cannot train.
    """
    layers = _row_layers(model)
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def _check_adapter_files(folder: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    unfit = [name for name in _PROCESSOR_FILES if not (folder / name).is_file()]
    if len(unfit) < len(_PROCESSOR_FILES):
        missing += unfit
    if missing == ["adapter_model.safetensors"] and (folder / "adapter_model.bin").is_file():
        raise FileNotFoundError(
            f"{folder} holds its weights as adapter_model.bin, a pickle, which could run any program and is never "
            "loaded: ask for adapter_model.safetensors."
        )
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} is no adapter folder: {', '.join(missing)} missing; it holds {', '.join(found) or 'nothing'}."
        )
    configs = {name: read_object(folder / name) for name in ("adapter_config.json", "config.json")}
    model_type = configs["config.json"].get("model_type")
    if model_type != VisionQwenConfig.model_type:
        raise ValueError(f"{folder} is an adapter of a {model_type!r} model, expected {VisionQwenConfig.model_type!r}.")
    kind = configs["adapter_config.json"].get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / 'adapter_config.json'}: peft_type is {kind!r}, expected 'LORA'.")
    weights = folder / "adapter_model.safetensors"
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}): copy or download it again.") from error
    names = list(state)
    # peft only warns, and would leave a projector at its random start.
    if not any(f".{PROJECTOR}." in name for name in names):
        raise ValueError(
            f"{weights} holds no projector among its {len(names)} tensors: it was saved by another program."
        )
    check_finite(state.items(), str(weights))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes whatever a library says about the content of a file one line that names the file.

    Args:
        path (`Path`): What the block reads.

    Raises:
        ValueError: For any error but those of the file system and of libraries that are not installed.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= 300 else f"{said[:300]}..."
        raise ValueError(
            f"{path} cannot be used, damaged or of another program ({type(error).__name__}: {said}): copy or download "
            "it again."
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: When it holds something else; names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got a {type(found).__name__}.")
    return found


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Refuses weights that are no numbers.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Names and weights.
        where (`str`): Put before the message.

    Raises:
        ValueError: For NaN or infinity; names the first tensor and counts the others.
    """
    broken = [
        (name, value) for name, value in tensors if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        name, value = broken[0]
        others = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(
            f"{where}: {int((~value.isfinite()).sum()):,} of {value.numel():,} weights of {name} are NaN or infinite"
            f"{others}: take an earlier checkpoint, or train again with a lower learning rate."
        )


def _check_tensors(model: PeftModel, folder: Path) -> None:
    """Compares names and shapes in the file with those that the configuration asks for: peft loads what fits."""
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    asked = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(value.shape) for name, value in asked.items()}
    for names, said in (
        (expected.keys() - found.keys(), "are missing"),
        (found.keys() - expected.keys(), "belong to no layer that adapter_config.json names"),
    ):
        if names:
            raise ValueError(
                f"{weights} does not fit adapter_config.json and the bases: {len(names)} tensors {said}, {min(names)} "
                f"the first; expected {len(expected)}, got {len(found)}."
            )
    wrong = sorted(name for name, shape in expected.items() if found[name] != shape)
    if wrong:
        raise ValueError(
            f"{weights} does not fit adapter_config.json and the bases: {wrong[0]} has the shape "
            f"{found[wrong[0]]}, expected {expected[wrong[0]]} ({len(wrong)} of {len(expected)} tensors differ)."
        )


def _check_bases(saved: VisionQwenConfig, loaded: VisionQwenConfig, folder: Path) -> None:
    """Compares the bases that an adapter was trained on with those that were loaded.

    A part without a fingerprint, such as a decoder from scratch, is compared by its shapes.
    """
    for part in ("vision", "text"):
        old, new = getattr(saved, f"{part}_config"), getattr(loaded, f"{part}_config")
        fields = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "image_size", "patch_size")
        differing = [
            f"{field}: {getattr(old, field, None)} against {getattr(new, field, None)}"
            for field in fields
            if getattr(old, field, None) != getattr(new, field, None)
        ]
        expected, found = getattr(saved, f"{part}_fingerprint"), getattr(loaded, f"{part}_fingerprint")
        if not differing and (None in (expected, found) or expected == found):
            continue
        raise ValueError(
            f"The adapter {folder} was trained on another {part} base: expected {_base_name(saved, part)}, got "
            f"{_base_name(loaded, part)} ("
            f"{'; '.join(differing) or 'the same shape with other weights'})."
        )


def _base_name(config: VisionQwenConfig, part: str) -> str:
    name, revision = getattr(config, f"{part}_name_or_path"), getattr(config, f"{part}_revision")
    return f"{name} at revision {revision}" if revision else str(name)
