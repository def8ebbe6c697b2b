"""Configuration: the two pre-trained parts, how they are joined, and the one place that counts image tokens.

Stage: first. Imports nothing of ours; every other module reads it.
"""

import copy
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

IGNORE_INDEX = -100
"""Label of positions that carry no loss."""

IMAGE_TOKEN = "<|image_pad|>"
"""Placeholder of one image token in text; Qwen3's vocabulary has it, other tokenizers get it added."""

# These towers put no class token in front of the patches (transformers, `models/siglip*/modeling_*.py`).
_TOWERS_WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")

_JOINT_FIELDS = (
    "image_token_id",
    "turn_token_ids",
    "vision_feature_layer",
    "keep_class_token",
    "projector_type",
    "projector_hidden_act",
    "projector_bias",
    "projector_layer_norm",
    "pixel_shuffle_factor",
)


@strict
class VisionQwenConfig(PreTrainedConfig):
    """Composite configuration of [`VisionQwen`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision encoder: any `AutoModel` tower with square patches (CLIP, SigLIP, ViT, DINOv2).
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the decoder: any `AutoModelForCausalLM` text model.
        image_token_id (`int`, *optional*, defaults to 151655):
            Vocabulary id of the image placeholder (`<|image_pad|>` of Qwen3). It may lie outside the decoder's
            vocabulary: placeholders are replaced before the embedding is read and are never predicted.
        turn_token_ids (`list[int]`, *optional*):
            Vocabulary ids of `<|im_start|>` and `<|im_end|>` where they were added to the decoder's tokenizer. Their
            rows of the embedding and the head train, and are part of an adapter.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Index into the tower's hidden states (0 is the embedding, -1 the last layer, before the final norm). A list
            is concatenated along the feature axis. Layers above the highest one are neither built nor run.
        keep_class_token (`bool`, *optional*, defaults to `False`):
            Whether class and register tokens are passed on together with the patches.
        projector_type (`str`, *optional*, defaults to `"mlp"`):
            `"linear"` (one layer) or `"mlp"` (two layers with an activation, as LLaVA-1.5, arXiv 2310.03744).
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the `"mlp"` projector.
        projector_layer_norm (`bool`, *optional*, defaults to `False`):
            Whether the projector normalizes its input first, as InternVL's does (arXiv 2404.16821); it learns faster
            from encoders whose hidden states vary much in scale.
        projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the projector's layers have a bias.
        pixel_shuffle_factor (`int`, *optional*, defaults to 1):
            Side of the square of neighbouring patches that one image token carries; 2 gives a quarter of the tokens.
        vision_name_or_path (`str`, *optional*):
            Hub id or folder the encoder came from.
        vision_revision (`str`, *optional*):
            Commit or branch of the encoder's repository.
        text_name_or_path (`str`, *optional*):
            Hub id or folder the decoder came from; `None` for a decoder trained from scratch.
        text_revision (`str`, *optional*):
            Commit or branch of the decoder's repository.
        vision_fingerprint, text_fingerprint (`str`, *optional*):
            Hashes of the two bases, so that an adapter is never put on another base.

    Raises:
        ValueError: When the layers, the image size or the pixel-shuffle factor cannot fit the vision tower.
    """

    model_type = "vision_qwen"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    turn_token_ids: list[int] | None = None
    vision_feature_layer: int | list[int] = -2
    keep_class_token: bool = False
    projector_type: Literal["linear", "mlp"] = "mlp"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    projector_layer_norm: bool = False
    pixel_shuffle_factor: int = 1
    vision_name_or_path: str | None = None
    vision_revision: str | None = None
    text_name_or_path: str | None = None
    text_revision: str | None = None
    vision_fingerprint: str | None = None
    text_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        grid = self._patch_grid
        if grid % self.pixel_shuffle_factor:
            raise ValueError(
                f"pixel_shuffle_factor must divide the patch grid's side: expected a divisor of {grid} patches, got "
                f"{self.pixel_shuffle_factor}."
            )
        if self.pixel_shuffle_factor > 1 and self.keep_class_token:
            raise ValueError(
                f"pixel_shuffle_factor={self.pixel_shuffle_factor} regroups patches of a square grid and cannot hold "
                "the class token: set keep_class_token=False or pixel_shuffle_factor=1."
            )
        _ = self.hidden_state_indices

    @property
    def _patch_grid(self) -> int:
        """Patches along one side of the (square) picture."""
        vision = self.vision_config
        image_size, patch_size = vision.image_size, vision.patch_size
        if not isinstance(image_size, int) or not isinstance(patch_size, int):
            raise ValueError(
                f"The vision tower must take square pictures with square patches given as integers, got image_size="
                f"{image_size!r} and patch_size={patch_size!r}."
            )
        return image_size // patch_size

    @property
    def joint_fields(self) -> dict[str, Any]:
        """How the parts are joined, without the parts themselves: what rebuilds this model from its two bases."""
        return {name: getattr(self, name) for name in _JOINT_FIELDS}

    @property
    def vision_tower_config(self) -> PreTrainedConfig:
        """The encoder's configuration, cut above the highest chosen layer: what is not read is not built."""
        tower_config = copy.deepcopy(self.vision_config)
        tower_config.num_hidden_layers = max(self.hidden_state_indices)
        return tower_config

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens that the tower puts in front of the patches."""
        registers = getattr(self.vision_config, "num_register_tokens", 0) or 0
        has_class_token = self.vision_config.model_type not in _TOWERS_WITHOUT_CLASS_TOKEN
        return int(has_class_token) + registers

    @property
    def num_vision_tokens(self) -> int:
        """Tokens per image that leave the tower and enter the projector."""
        return self._patch_grid**2 + (self.num_prefix_tokens if self.keep_class_token else 0)

    @property
    def num_image_tokens(self) -> int:
        """N: image tokens per image in the decoder's sequence, after pixel shuffle."""
        return self.num_vision_tokens // self.pixel_shuffle_factor**2

    @property
    def hidden_state_indices(self) -> list[int]:
        """Selected hidden states as indices from 0 (the embedding) to the tower's depth."""
        depth = self.vision_config.num_hidden_layers
        layers = self.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        if not layers or any(not -depth - 1 <= layer <= depth for layer in layers):
            raise ValueError(
                f"vision_feature_layer must select from {depth + 1} hidden states, {-depth - 1} to {depth}, got "
                f"{self.vision_feature_layer}."
            )
        return [layer % (depth + 1) for layer in layers]

    @property
    def vision_feature_size(self) -> int:
        """D_v: width of the selected hidden states, concatenated, before pixel shuffle."""
        return self.vision_config.hidden_size * len(self.hidden_state_indices)


AutoConfig.register(VisionQwenConfig.model_type, VisionQwenConfig)
