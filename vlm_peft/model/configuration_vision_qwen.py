"""Configuration: the two pre-trained parts, how they are joined, and the one place that counts image tokens.

Stage: first, above what it asks: `vision_tower` for the tokens that a tower gives, `projector` for those that it makes
of them. Every other module reads it.
"""

from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .projector import ProjectorSettings, count_image_tokens
from .vision_tower import check_layout, measure, needs_interpolation, picture_size, resolve_layers, tower_config

IGNORE_INDEX = -100
"""Label of positions that carry no loss."""

IMAGE_TOKEN = "<|image_pad|>"
"""Placeholder of one image token in text; Qwen3's vocabulary has it, other tokenizers get it added."""

JOINT_FIELDS = (
    "image_token_id",
    "turn_token_ids",
    "vision_feature_layer",
    "keep_class_token",
    "image_size",
    "vision_layout",
    "projector_hidden_act",
    "projector_bias",
    *(each.name for each in fields(ProjectorSettings)),
)
"""How the parts are joined, without the parts themselves."""


@strict
class VisionQwenConfig(ProjectorSettings, PreTrainedConfig):
    """Composite configuration of [`VisionQwen`]; the projector's fields are those of [`ProjectorSettings`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision encoder: any `AutoModel` that gives tokens or feature maps of pictures (CLIP,
            SigLIP, ViT, DINOv2, Swin, ResNet, ConvNeXt, ...).
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the decoder: any `AutoModelForCausalLM` text model.
        image_token_id (`int`, *optional*, defaults to 151655):
            Vocabulary id of the image placeholder (`<|image_pad|>` of Qwen3). It may lie outside the decoder's
            vocabulary: placeholders are replaced before the embedding is read and are never predicted.
        turn_token_ids (`list[int]`, *optional*):
            Vocabulary ids of `<|im_start|>` and `<|im_end|>` where they were added to the decoder's tokenizer. Their
            rows of the embedding and the head train, and are part of an adapter.
        vision_feature_layer (`int` or `list[int]`, *optional*):
            Index into the tower's hidden states (0 is the embedding, -1 the last layer, before the final norm); of nets
            with stages, their stages. A list is concatenated along the feature axis. Layers above the highest one are
            neither built nor run where the tower can be cut. By default -2, and -1 of nets with stages: their last
            feature map.
        keep_class_token (`bool`, *optional*, defaults to `False`):
            Whether class and register tokens are passed on together with the patches.
        image_size (`int`, *optional*):
            Side of the (square) pictures in pixels, when the encoder shall get others than it was built for: its
            position embeddings are interpolated.
        vision_layout (`dict`, *optional*):
            What one forward pass of the tower said about its tokens, see [`~vlm_peft.model.vision_tower.measure`]; run
            when it is not given.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's two layers.
        projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the projector's layers have a bias.
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
        ValueError: When the encoder gives no tokens of pictures, or the layers, the image size or the projector's
            settings cannot fit it.
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
    vision_feature_layer: int | list[int] | None = None
    keep_class_token: bool = False
    image_size: int | None = None
    vision_layout: dict[str, Any] | None = None
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
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
        if self.vision_layout is None:
            self.vision_layout = measure(self.vision_config, self.vision_feature_layer, self.image_size)
        else:
            check_layout(self.vision_layout)
        self.vision_feature_layer = self.vision_layout["layers"]
        count_image_tokens(self)

    @property
    def joint_fields(self) -> dict[str, Any]:
        """How the parts are joined, without the parts themselves: what rebuilds this model from its two bases."""
        return {name: getattr(self, name) for name in JOINT_FIELDS}

    @property
    def vision_tower_config(self) -> PreTrainedConfig:
        """The encoder's configuration, cut above the highest chosen layer: what is not read is not built."""
        return tower_config(self.vision_config, max(self.hidden_state_indices) if self.vision_tower_is_cut else None)

    @property
    def vision_tower_is_cut(self) -> bool:
        """Whether the tower is built without the layers above the highest chosen one."""
        return self.vision_layout["is_cut"]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return picture_size(self.vision_config, self.image_size)

    @property
    def needs_interpolation(self) -> bool:
        """Whether the encoder must be told to interpolate its position embeddings to the size of the pictures."""
        return needs_interpolation(self.vision_config, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, or of places of a feature map."""
        rows, columns = self.vision_layout["grid"]
        return rows, columns

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens that the tower puts in front of the patches."""
        return self.vision_layout["num_prefix_tokens"]

    @property
    def num_vision_tokens(self) -> int:
        """Tokens per image that leave the tower and enter the projector."""
        rows, columns = self.grid
        return rows * columns + (self.num_prefix_tokens if self.keep_class_token else 0)

    @property
    def num_image_tokens(self) -> int:
        """N: image tokens per image in the decoder's sequence, after the projector."""
        return count_image_tokens(self)

    @property
    def hidden_state_indices(self) -> list[int]:
        """Selected hidden states as indices from 0 (the embedding) to the tower's depth."""
        return resolve_layers(self.vision_feature_layer, self.vision_layout["num_hidden_states"])

    @property
    def vision_feature_size(self) -> int:
        """D_v: width of the selected hidden states, concatenated, before pixel shuffle."""
        return self.vision_layout["feature_size"]


AutoConfig.register(VisionQwenConfig.model_type, VisionQwenConfig)
