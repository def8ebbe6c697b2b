"""Joining: a vision encoder and a decoder, each loaded from its own checkpoint, become one `VisionQwen`.

Stage: two Hub ids or folders -> model; called by `VisionQwen.from_vision_text_pretrained`.
"""

# transformers declares sub-configurations as `dict | PreTrainedConfig | None`.
# mypy: disable-error-code="union-attr, arg-type"

import copy
import logging
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from ..hub.weights import safetensors_revision
from .configuration_vision_qwen import VisionQwenConfig
from .modeling_vision_qwen import VisionQwen, share_vision_config
from .projector import projector_type
from .shared_prefix import check_attention
from .vision_tower import check_places

_SAMPLE = 64  # values of each tensor in a fingerprint


def join_pretrained(
    vision: str | Path,
    text: str | Path | None = None,
    *,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    text_config: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config=None,
    device_map=None,
    **config,
) -> VisionQwen:
    """Joins a pre-trained vision encoder and a pre-trained decoder; only the projector is drawn at random.

    Args:
        vision (`str` or `Path`): Hub id or folder of the encoder; the vision half of a CLIP or SigLIP pair is
            taken from its checkpoint.
        text (`str` or `Path`, *optional*): Hub id or folder of the decoder. Without it, `text_config` gives a
            decoder from scratch.
        vision_revision, text_revision (`str`, *optional*): Commit or branch of each repository. Where it has only
            pickled weights, the commit of its conversion to safetensors takes its place, also in the configuration.
        text_config (`PreTrainedConfig`, *optional*): Configuration of a decoder to be drawn at random.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of both parts; the projector, which
            trains, is always in float32.
        attn_implementation (`str`, *optional*): `"sdpa"`, `"flex_attention"`, ... for the decoder.
        quantization_config (`BitsAndBytesConfig`, *optional*): Quantizes the decoder only, never its head, the
            encoder or the projector.
        device_map (*optional*): Where the parts go, as in `from_pretrained`.
        **config: Further fields of [`VisionQwenConfig`], for example `vision_feature_layer`.

    Returns:
        [`VisionQwen`] in evaluation mode.

    Raises:
        ValueError: When neither or both of `text` and `text_config` are given, the decoder's head has a bias, its
            embedding is of another width than its layers, its attention cannot keep branches apart, or the encoder does
            not give the tokens of pictures in their order.
    """
    if attn_implementation is not None:
        check_attention(attn_implementation)
    if (text is None) == (text_config is None):
        raise ValueError("Expected exactly one of text (a pre-trained decoder) and text_config (one from scratch).")
    full_config = joint_config(
        vision, text, vision_revision=vision_revision, text_revision=text_revision, text_config=text_config, **config
    )
    tower = _load_vision_tower(full_config, dtype, device_map)
    if "vision_layout" not in config:
        check_places(tower, full_config.picture_size, interpolate=full_config.needs_interpolation)
    if text is None:
        decoder = AutoModelForCausalLM.from_config(
            full_config.text_config, dtype=dtype, attn_implementation=attn_implementation
        )
    else:
        decoder = _load_decoder(
            text,
            full_config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            device_map=device_map,
        )
        full_config.text_fingerprint = _text_fingerprint(decoder, text, full_config.text_revision)
    _settle_quantized(decoder)
    full_config.vision_fingerprint = fingerprint(tower)
    return _join(full_config, tower, decoder)


def joint_config(
    vision: str | Path,
    text: str | Path | None = None,
    *,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    text_config: PreTrainedConfig | None = None,
    **config,
) -> VisionQwenConfig:
    """Configuration of the model that [`join_pretrained`] would make of the same arguments; reads no weights.

    Its revisions are where the safetensors are: see [`~vlm_peft.hub.weights.safetensors_revision`].

    Raises:
        ValueError: When `text` is no decoder.
    """
    vision_revision = safetensors_revision(vision, vision_revision)
    with _safetensors_only(vision):
        vision_config = AutoConfig.from_pretrained(vision, revision=vision_revision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if text is not None:
        text_revision = safetensors_revision(text, text_revision)
        with _safetensors_only(text):
            text_config = AutoConfig.from_pretrained(text, revision=text_revision).get_text_config(decoder=True)
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{text} is a {text_config.model_type!r} model, which writes no text: expected a decoder, such as "
            "Qwen/Qwen3-0.6B-Base."
        )
    return VisionQwenConfig(
        vision_config=vision_config.to_dict(),
        text_config=text_config.to_dict(),
        vision_name_or_path=str(vision),
        vision_revision=vision_revision,
        text_name_or_path=None if text is None else str(text),
        text_revision=text_revision,
        **config,
    )


@contextmanager
def _safetensors_only(name: str | Path):
    """Says why a checkpoint that has only pickled weights, or that transformers cannot load as asked, is not loaded."""
    try:
        yield
    except ValueError as error:
        # For example an attention implementation that the architecture lacks.
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    except OSError as error:
        if SAFE_WEIGHTS_NAME not in str(error):
            raise
        raise OSError(
            f"{name} has no {SAFE_WEIGHTS_NAME}, and pickled weights (pytorch_model.bin), which could run any program, "
            "are never loaded: look for a revision with safetensors, or convert a copy with "
            f"`vlm-peft convert {name} --to FOLDER` and name that folder."
        ) from error


def _settle_quantized(decoder: PreTrainedModel) -> None:
    """Keeps 4-bit weights as they were loaded, and bitsandbytes quiet about its 8-bit products.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first pass without gradients: their scales are
    rounded for good, and a training step that follows gets no gradient.

    Raises:
        ValueError: On a CPU, for widths whose 4-bit weights bitsandbytes restores wrongly there.
    """
    for name, module in decoder.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        blocksize = module.weight.quant_state.blocksize
        if module.weight.device.type == "cpu" and module.in_features % blocksize:
            raise ValueError(
                f"On a CPU, bitsandbytes restores 4-bit weights wrongly unless the inputs of a layer are a multiple of "
                f"{blocksize}: {name} has {module.in_features}. Load in 8 bits, or not quantized."
            )
    if getattr(decoder, "is_loaded_in_8bit", False):
        # It says for each layer of each step that inputs are cast to float16, as LLM.int8 is defined.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _join(config: VisionQwenConfig, tower: nn.Module, decoder: PreTrainedModel) -> VisionQwen:
    """Builds the shell without weights and puts the loaded parts and a fresh projector in."""
    head = decoder.get_output_embeddings()
    check_attention(decoder.config._attn_implementation)
    embedding: Any = decoder.get_input_embeddings()
    width, hidden_size = embedding.weight.shape[1], config.text_config.hidden_size
    if width != hidden_size:
        raise ValueError(
            "Decoders whose embedding is not as wide as their layers are not supported: "
            f"{config.text_config.model_type} has {width} and {hidden_size}."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"Decoders whose head has a bias are not supported: {config.text_config.model_type}.")
    if not head.weight.is_floating_point():
        raise ValueError(
            "The decoder's head is quantized, and the loss reads its weight directly: add 'lm_head' to "
            "llm_int8_skip_modules of the quantization_config."
        )
    with torch.device("meta"):
        model = VisionQwen(config)
    model.config.text_config = decoder.config
    model.config.name_or_path = config.text_name_or_path or ""
    # It trains, so it stays in float32 whatever the bases are in.
    projector = projector_type(config)(config).to(decoder.device)
    projector.start(std=getattr(config.text_config, "initializer_range", 0.02))
    share_vision_config(tower, model.config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = decoder.base_model
    model.lm_head = head
    model.generation_config = copy.deepcopy(decoder.generation_config)
    for attribute in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer"):
        if hasattr(decoder, attribute):
            setattr(model, attribute, getattr(decoder, attribute))
    return model.eval()


def _load_vision_tower(config: VisionQwenConfig, dtype: torch.dtype, device_map) -> PreTrainedModel:
    """Loads the encoder without the layers above the chosen ones and without the text half of a pair.

    Raises:
        ValueError: When the checkpoint lacks weights that the features need.
    """
    verbosity = transformers_logging.get_verbosity()
    # The report of unused weights would list the text half and the upper layers on every load.
    transformers_logging.set_verbosity_error()
    try:
        with _safetensors_only(config.vision_name_or_path):
            name = str(config.vision_name_or_path)
            weights: dict[str, Any] = {}
            load: Any = AutoModel.from_pretrained
            if (Path(name) / "adapter_config.json").is_file():
                load, weights = _fine_tuned_vision(name, config.vision_tower_config)
            tower, info = load(
                None if weights else name,
                **weights,
                config=config.vision_tower_config,
                revision=config.vision_revision,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(("pooler.", "head.")))
    if missing:
        raise ValueError(
            f"{config.vision_name_or_path} lacks {len(missing)} weights of its {config.vision_config.model_type} "
            f"encoder, for example {missing[0]}."
        )
    return tower


def _fine_tuned_vision(folder: str, config: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """How the encoder of a fine-tuned CLIP's adapter folder is loaded: by which function, and with which weights."""
    from ..contrastive.folder import load_clip

    return MODEL_MAPPING[type(config)].from_pretrained, {"state_dict": load_clip(folder).clip.state_dict()}


def _load_decoder(name: str | Path, config: VisionQwenConfig, **arguments) -> PreTrainedModel:
    """Loads the decoder; of a checkpoint that sees, hears or speaks by itself (Qwen3.5, Gemma 3), its decoder alone.

    Raises:
        ValueError: When the checkpoint lacks weights of its decoder.
    """
    arguments |= {"revision": config.text_revision, "use_safetensors": True}
    load: Any = AutoModelForCausalLM.from_pretrained
    with _safetensors_only(name):
        whole = AutoConfig.from_pretrained(name, revision=config.text_revision)
        own = whole.get_text_config(decoder=True)
        if own is whole:
            return load(name, **arguments)
        verbosity = transformers_logging.get_verbosity()
        # The report of unused weights would list the other parts on every load.
        transformers_logging.set_verbosity_error()
        try:
            decoder, info = load(
                name,
                config=own,
                # As transformers writes them, and as older checkpoints have them.
                key_mapping={r"^model\.language_model\.": "model.", r"^language_model\.(model\.|(?=lm_head))": r"\1"},
                output_loading_info=True,
                **arguments,
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of its decoder {own.model_type}, such as {missing[0]}.")
    return decoder


def _text_fingerprint(decoder: PreTrainedModel, name: str | Path, revision: str | None) -> str | None:
    """The trunk's fingerprint; quantized weights are looked up in the checkpoint, as they were before.

    Returns:
        `str`, or `None` when the checkpoint spells the names of the quantized weights in another way.
    """
    trunk = decoder.base_model
    quantized = [name for name, parameter in trunk.named_parameters() if not parameter.is_floating_point()]
    if not quantized:
        return fingerprint(trunk)
    # Without a connection, a sharded checkpoint in the cache must not be asked for its single file.
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    single = cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, **quietly)
    if single is not None:
        files = [single]
    else:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
        files, _ = get_checkpoint_shard_files(name, index, revision=revision)
    names = {f"{prefix}{name}": name for name in quantized for prefix in ("", f"{decoder.base_model_prefix}.")}
    stored = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in names.keys() & set(tensors.keys()):
                stored[names[key]] = tensors.get_slice(key)
    return fingerprint(trunk, stored) if len(stored) == len(quantized) else None


def fingerprint(module: nn.Module, stored: dict[str, Any] | None = None) -> str:
    """Hash that tells one base from another: names, shapes and a sample of each unquantized tensor.

    Values enter rounded to bfloat16, so that a base loaded in another dtype is recognised.

    Args:
        module (`nn.Module`): A vision tower or a decoder's trunk.
        stored (`dict[str, PySafeSlice]`, *optional*): What the checkpoint holds in place of quantized parameters.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    samples = {
        name: (tuple(parameter.shape), parameter.detach().flatten()[:_SAMPLE])
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point()
    }
    for name, tensor in (stored or {}).items():
        shape = tuple(tensor.get_shape())
        rows = math.ceil(_SAMPLE / math.prod(shape[1:]))
        samples[name] = (shape, tensor[:rows].flatten()[:_SAMPLE])
    digest = xxhash.xxh3_128()
    for name, (shape, sample) in sorted(samples.items()):
        digest.update(f"{name} {shape}".encode())
        digest.update(sample.cpu().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
