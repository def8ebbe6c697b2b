"""Options: what a YAML file says, typed as the options are, and the ranges of all of them, also of those used last.

Stage: below `arguments`; nothing is loaded before these checks.
"""

import enum
import math
import re
import types
from argparse import ArgumentTypeError
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.utils import DynamoBackend
from transformers.hf_argparser import string_to_bool

from ..model.projector import PROJECTOR_AT_MOST, ProjectorSettings
from ..tasks.example import check_text

_LARGEST_FILE = 10_000  # values, aliases counted as often as they are used

_AT_LEAST = {
    "train_limit": 1,
    "eval_limit": 1,
    "image_size": 1,
    **dict.fromkeys((each.name for each in fields(ProjectorSettings)), 1),
    "eval_samples": 0,
    "early_stopping_patience": 1,
    "generation_batch_size": 1,
    "max_new_tokens": 1,
    "num_beams": 1,
    "projector_learning_rate": 0,
    "vision_learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "save_total_limit": 1,
    "max_length": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "dataset_num_proc": 1,
    "seed": 0,
    "split_seed": 0,
    "data_seed": 0,
    "lora_r": 1,
    "top_layers": 1,
    "vision_layers": 1,
    "unfreeze_steps": 1,
}
_ABOVE_ZERO = (
    "weight",
    "layer_decay",
    "loraplus_lr_ratio",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "lora_alpha",
)
_BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor")
_AT_MOST = {
    "seed": 2**32 - 1,
    "data_seed": 2**32 - 1,
    # Sizes of weights that are made at once: a typing error would take all memory, or overflow.
    "lora_r": 2**16,
    **PROJECTOR_AT_MOST,
}
_COMPILE_MODES = ("default", "lite", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Mappings that may lie in a file."""
_INIT_LORA = re.compile("pissa(_niter_[1-9][0-9]*)?|gaussian|orthogonal")


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path (`str`): Of the file.

    Raises:
        OSError: When it cannot be read.
        ValueError: When it is no YAML, no mapping, names a key twice, or its aliases stand for too much.
    """
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (
        yaml.YAMLError,
        RecursionError,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:
        raise ValueError(f"{path} cannot be read as YAML options: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1.0e-4', got a {type(found).__name__}.")
    if _size(found, {}) > _LARGEST_FILE:
        raise ValueError(f"{path}: its aliases stand for more than {_LARGEST_FILE:,} values: write them out.")
    return found


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1} - {"<<"})
        if twice:
            raise ValueError(f"{twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _size(value: Any, known: dict[int, float]) -> float:
    """Values in a tree with its aliases written out; infinite for one that holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts: Iterable = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def typed(values: dict[str, Any], kinds: Iterable[type]) -> dict[str, Any]:
    """Values of a YAML file as the options' types want them: one word is a list of one, and `no` is a word.

    Args:
        values (`dict`): Names and values; names that are no option are left alone.
        kinds (`Iterable[type]`): Dataclasses of the options.

    Raises:
        ValueError: For a value of another kind; names the option.
    """
    found = dict(values)
    for kind in kinds:
        hints = get_type_hints(kind)
        for each in fields(kind):
            if each.name in found:
                found[each.name] = _typed(each, hints[each.name], found[each.name])
    return found


def take_config(given: list[str], kinds: Iterable[type]) -> dict[str, Any]:
    """Takes `--config FILE.yaml` out of a command line, and gives the file's values as [`typed`] makes them.

    Args:
        given (`list[str]`): The command line; changed in place.
        kinds (`Iterable[type]`): Dataclasses of the options.

    Returns:
        `dict`: Nothing without `--config`.

    Raises:
        OSError: When the file cannot be read.
        ValueError: When there is no file after it, or the file is wrong; see [`read_config`] and [`typed`].
    """
    if "--config" not in given:
        return {}
    place = given.index("--config")
    if place + 1 == len(given):
        raise ValueError("--config expects a YAML file.")
    config = typed(read_config(given[place + 1]), kinds)
    del given[place : place + 2]
    return config


def _typed(option: Field, hint: Any, value: Any) -> Any:
    members = _members(hint)
    kinds = {get_origin(member) or member for member in members}
    name = option.name
    if value is None:
        # An empty list is what a list is without its words.
        if option.default is MISSING and option.default_factory is not MISSING and list in kinds:
            return []
        if option.default not in (MISSING, None) and type(None) not in get_args(hint):
            raise ValueError(f"{name}: expected {_said(kinds)}, got null: leave it out for {option.default!r}.")
        return value
    if Any in kinds:
        return value
    if value is False and name.endswith("_strategy"):
        return "no"
    if list in kinds and not isinstance(value, dict) and not (str in kinds and isinstance(value, str)):
        (element,) = next(get_args(member) or (str,) for member in members if (get_origin(member) or member) is list)
        given = value if isinstance(value, list) else [value]
        # Whoever reads the mappings of a list says which of them is none.
        return given if element is dict else [_scalar(name, {get_origin(element) or element}, each) for each in given]
    return _scalar(name, kinds, value)


def _scalar(name: str, kinds: set, value: Any) -> Any:
    """One value; text that stands for a number or a yes is made one: the parser reads neither lists nor entries."""
    if isinstance(value, dict):
        if dict in kinds:
            return value
    elif isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int):
        if int in kinds or float in kinds:
            return value
    elif isinstance(value, float):
        if float in kinds or (int in kinds and value.is_integer()):
            return value if float in kinds else int(value)
    elif isinstance(value, str):
        found = value if str in kinds else _read(value, kinds)
        if found is not None:
            return found
    if str in kinds and isinstance(value, bool | int | float):
        raise ValueError(f"{name}: YAML reads this as {value!r}, and text is expected: put it into quotes.")
    raise ValueError(f"{name}: expected {_said(kinds)}, got {value!r}.")


def _read(text: str, kinds: set) -> bool | int | float | None:
    """What text says as a number or as yes or no; `None` when it says none of them."""
    for kind, read in ((int, int), (float, float), (bool, string_to_bool)):
        if kind in kinds:
            with suppress(ValueError, ArgumentTypeError):
                return read(text)
    return None


def _members(hint: Any) -> list[Any]:
    """Of a union, its members without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for each in get_args(hint) for member in _members(each) if member is not type(None)]
    return [hint]


def _said(kinds: set) -> str:
    words: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words |= {list: "a list", dict: "a mapping"}
    return " or ".join(words[kind] for kind in words if kind in kinds) or "something else"


def name_choice(error: ValueError, kinds: Iterable[type]) -> str:
    """What an enumeration says of an unknown word, with the options that it belongs to.

    Args:
        error (`ValueError`): Of a dataclass of options.
        kinds (`Iterable[type]`): All of these dataclasses.
    """
    said = str(error)
    unknown = re.match(r"'?(.*?)'? is not a valid (\w+)", said)
    if unknown is None:
        return said
    names = [
        each.name
        for kind in kinds
        for each in fields(kind)
        if any(getattr(member, "__name__", "") == unknown[2] for member in _members(get_type_hints(kind)[each.name]))
    ]
    members: list = [
        member
        for kind in kinds
        for hint in get_type_hints(kind).values()
        for member in _members(hint)
        if isinstance(member, type) and issubclass(member, enum.Enum) and member.__name__ == unknown[2]
    ]
    choices = ", ".join(str(each.value) for each in members[0]) if members else ""
    return f"{' or '.join(dict.fromkeys(names)) or unknown[2]} is {unknown[1]!r}" + (
        f", expected one of {choices}." if choices else ", which is not known."
    )


def check_ranges(*options: Any) -> None:
    """Ranges and choices of all options, whenever they are used.

    Args:
        *options: Dataclasses of options.

    Raises:
        ValueError: For the first that is out of its range; names it.
    """
    for kind in options:
        hints = get_type_hints(type(kind))
        for each in fields(kind):
            value = getattr(kind, each.name)
            is_mapping = each.name not in _FILES and any(
                (get_origin(member) or member) is dict for member in _members(hints[each.name])
            )
            if is_mapping and value is not None and not isinstance(value, dict):
                raise ValueError(f"{each.name} is {value!r}, expected a mapping such as '{{\"a\": 1}}'.")
            for one in value if isinstance(value, list) else [value]:
                _check(each, one)


def check_optimizer(training: Any) -> None:
    """Refuses an optimizer that is not installed, and `optim_args` that it cannot read.

    Args:
        training (`TrainingArguments`): With `optim` and `optim_args`.

    Raises:
        ValueError: With what the library says.
    """
    from transformers import Trainer

    # Those that ask the model (GaLore, APOLLO) say before whether they are installed.
    with suppress(AttributeError):
        try:
            Trainer.get_optimizer_cls_and_kwargs(training)
        except (ImportError, ValueError) as error:
            name = getattr(training.optim, "value", training.optim)
            raise ValueError(
                f"optim {name} with optim_args {training.optim_args!r} cannot be used: expected an optimizer that is "
                f"installed, and arguments such as 'rank=64,scale=0.5' ({error})."
            ) from error


def _check(option: Field, value: Any) -> None:
    name = option.name
    if isinstance(value, str):
        # Whatever it is, it is written into records and cards in the end.
        check_text(value, name)
    choices = option.metadata.get("choices")
    if choices and value not in choices and value != option.default:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}.")
    if name == "init_lora_weights" and value is not None and not _INIT_LORA.fullmatch(value):
        raise ValueError(f"{name} is {value!r}, expected pissa, pissa_niter_4, ..., gaussian or orthogonal.")
    if name == "lora_task_type" and value != "CAUSAL_LM":
        raise ValueError(f"{name} is {value!r}, expected CAUSAL_LM, which the decoder is.")
    if name == "torch_compile_mode" and value is not None and value not in _COMPILE_MODES:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(_COMPILE_MODES)}.")
    if name == "torch_compile_backend" and value is not None:
        backends = [each.value.lower() for each in DynamoBackend]
        if str(value).lower() not in backends:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(backends)}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int) and abs(value) >= 2**63:
        # Libraries make floats of it, or numbers of 64 bits.
        raise ValueError(f"{name} is a whole number of {value.bit_length()} bits, expected 63 at most.")
    expected = None
    if not math.isfinite(value):
        expected = "a finite number"
    elif name in _AT_LEAST and value < _AT_LEAST[name]:
        expected = f"at least {_AT_LEAST[name]}"
    elif name in _AT_MOST and value > _AT_MOST[name]:
        expected = f"at most {_AT_MOST[name]}"
    elif name in _ABOVE_ZERO and value <= 0:
        expected = "more than 0"
    elif name in _BELOW_ONE and not 0 <= value < 1:
        expected = "at least 0 and below 1"
    elif name == "max_steps" and (value == 0 or value < -1):
        expected = "at least 1, or -1 for --num_train_epochs"
    if expected is not None:
        raise ValueError(f"{name} is {value}, expected {expected}.")
