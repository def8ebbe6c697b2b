"""Model: a vision tower, a projector and a decoder as one `PreTrainedModel`.

Stage: batch -> loss or logits. The way of one batch:

1. `vision_tower`: `pixel_values` `(I, 3, H, W)` -> the chosen hidden states `(I, N_v, D_v)`; skipped when the batch
   carries `image_features` from the feature cache.
2. `multi_modal_projector`: `(I, N_v, D_v)` -> `(I, N, D_t)`.
3. splice: the I * N rows replace the embeddings of the image placeholders of `input_ids` `(B, T)` (or of
   `inputs_embeds`), in order.
4. `language_model`: `(B, T, D_t)` -> hidden states `(B, T, D_t)`; `segment_ids` say who sees whom.
5. `lm_head`: logits `(B, T, V)`, or `(1, L, V)` at the L labelled positions only.

Letters of all shapes in this package: B sequences, T tokens, I images in the batch, N image tokens per image (N_v
before pixel shuffle), D_v vision width, D_t text width, V vocabulary, L labelled positions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.peft_utils import find_adapter_config_file

from .configuration_vision_qwen import IGNORE_INDEX, VisionQwenConfig
from .projector import projector_type
from .shared_prefix import check_attention, decoder_mask
from .vision_tower import as_tokens, run_tower

if TYPE_CHECKING:
    from peft import PeftModel

# Decoders that rescale their logits would be wrong under a plain linear head (names as transformers spells them).
_LOGIT_RESCALING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass
class VisionQwenOutput(CausalLMOutputWithPast):
    """Output of [`VisionQwen`].

    Args:
        loss (`torch.Tensor`, scalar, *optional*): Nats per labelled token, when labels are given.
        logits (`torch.Tensor` of shape `(B, T, V)`, or `(1, L, V)` with `label_positions`): Scores before softmax.
        past_key_values (`Cache`, *optional*): Keys and values of the decoder.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Of the decoder, `(B, T, D_t)` each.
        attentions (`tuple[torch.Tensor]`, *optional*): Of the decoder.
        image_hidden_states (`torch.Tensor` of shape `(I, N, D_t)`, *optional*): Image tokens after the projector.
    """

    image_hidden_states: torch.Tensor | None = None


class VisionQwenPreTrainedModel(PreTrainedModel):
    """What [`VisionQwenModel`] and [`VisionQwen`] share: configuration class and what the stack may do with them."""

    config_class = VisionQwenConfig
    config: VisionQwenConfig
    # TRL computes its loss from `model.base_model(...)`: it must be the trunk that sees the images, not the decoder.
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: loading then sets up every part, also those that have buffers and no weights of their own (Falcon-H1)."""
        return False

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As `PreTrainedModel.set_attn_implementation`, for what [`~vlm_peft.model.shared_prefix.decoder_mask`] knows.

        Args:
            attn_implementation (`str` or `dict`): For all parts, or for each: `{"text_config": "eager"}`.

        Raises:
            ValueError: For implementations of the decoder's attention that cannot keep branches apart.
        """
        if isinstance(attn_implementation, dict):
            wanted = attn_implementation.get("text_config")
        else:
            wanted = attn_implementation
        if isinstance(wanted, str):
            check_attention(wanted)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


class VisionQwenModel(VisionQwenPreTrainedModel):
    """The multimodal trunk without the language-model head: `last_hidden_state` with the images spliced in.

    Args:
        config ([`VisionQwenConfig`]): Composite configuration.
    """

    def __init__(self, config: VisionQwenConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_tower_config)
        share_vision_config(self.vision_tower, config)
        self.multi_modal_projector = projector_type(config)(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's token embedding."""
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that a frozen vision tower stays in evaluation mode, and batch norm always."""
        super().train(mode)
        if not self._vision_tower_trains:
            self.vision_tower.eval()
        for module in self.vision_tower.modules():
            # It would mix the pictures of a batch.
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def _vision_tower_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs the vision tower up to the highest chosen layer; what the feature cache stores.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): Pictures from the image processor.

        Returns:
            `torch.Tensor` of shape `(I, N_v, D_v)`: Hidden states of the chosen layers, concatenated.

        Raises:
            ValueError: When the pictures are not of the tower's size.
        """
        return self._choose_layers(self._run_vision_tower(pixel_values).hidden_states)

    def _run_vision_tower(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """All that the tower returns for pictures `(I, 3, H, W)`, with its hidden states."""
        height, width = self.config.picture_size
        if pixel_values.ndim != 4 or pixel_values.shape[-2:] != (height, width):
            raise ValueError(
                f"pixel_values must have the shape (images, 3, {height}, {width}) in pixels, got "
                f"{tuple(pixel_values.shape)}. Use the processor that was saved with the model."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_tower_trains):
            return run_tower(
                self.vision_tower,
                pixel_values.to(self.vision_tower.dtype),
                interpolate=self.config.needs_interpolation,
                **kwargs,
            )

    def _choose_layers(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The chosen of the tower's hidden states, concatenated, as `(I, N_v, D_v)`."""
        chosen = [as_tokens(hidden_states[index]) for index in self.config.hidden_state_indices]
        if not self.config.keep_class_token:
            chosen = [state[:, self.config.num_prefix_tokens :] for state in chosen]
        return torch.cat(chosen, dim=-1)  # (I, N_v, D_v)

    def project_vision_features(self, vision_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """Projects `(I, N_v, D_v)` vision features; `pooler_output` holds the image tokens `(I, N, D_t)`.

        Raises:
            ValueError: When the features are not of this model's encoder and layers.
        """
        expected = (self.config.num_vision_tokens, self.config.vision_feature_size)
        if vision_features.shape[1:] != expected:
            raise ValueError(
                f"Vision features must have the shape (images, {expected[0]} tokens, {expected[1]}), got "
                f"{tuple(vision_features.shape)}: they come from another encoder, layer or class-token setting."
            )
        return BaseModelOutputWithPooling(pooler_output=self.multi_modal_projector(vision_features))

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Image tokens of pictures; the name and output that transformers' `generate` calls once before it expands.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): Pictures from the image processor.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict` as in stock models; by default what
                the configuration says. Others go to the tower.

        Returns:
            `BaseModelOutputWithPooling`, or the tuple of its fields with `return_dict=False`: `pooler_output` holds the
            image tokens `(I, N, D_t)`, the other fields are the tower's own, up to the highest chosen layer:
            `last_hidden_state` `(I, N_v, D_v)` with its class token, and where asked for `hidden_states` and
            `attentions`, one per layer.
        """
        hidden_states_asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        outputs = self._run_vision_tower(pixel_values, **kwargs)
        image_outputs = self.project_vision_features(self._choose_layers(outputs.hidden_states))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=image_outputs.pooler_output,
            hidden_states=outputs.hidden_states if hidden_states_asked else None,
            attentions=outputs.get("attentions"),
        )

    def _find_placeholders(
        self, inputs_embeds: torch.Tensor, positions: torch.Tensor | None, has_images: bool
    ) -> torch.Tensor:
        """Where `inputs_embeds` `(B, T, D_t)` are the placeholder's embedding, `(B, T)` of `torch.bool`."""
        placeholder = self.config.image_token_id
        embedding: Any = self.get_input_embeddings()
        num_rows = embedding.weight.shape[0]
        if placeholder < num_rows:
            # Also with positions, which peft's virtual tokens have moved.
            row = embedding(torch.tensor(placeholder, device=embedding.weight.device))
            return (inputs_embeds == row.to(inputs_embeds)).all(dim=-1)
        if has_images and positions is None:
            raise ValueError(
                f"The placeholder {placeholder} lies outside the decoder's vocabulary of {num_rows} tokens, so that "
                "inputs_embeds cannot hold it: pass image_positions, which say where the pictures go."
            )
        is_image = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if positions is not None:
            is_image.view(-1)[positions] = True
        return is_image

    def _splice(
        self,
        input_ids: torch.Tensor | None,
        image_tokens: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeds `input_ids` `(B, T)` and puts the image tokens `(I, N, D_t)` at the placeholders, in order.

        `positions` `(I * N,)`, of the placeholders in the flattened `(B * T)` sequence, spare a GPU the search for
        them, for which the host would have to wait.
        """
        if inputs_embeds is not None:
            is_image = self._find_placeholders(inputs_embeds, positions, image_tokens is not None)  # (B, T)
            positions = None
        else:
            is_image = input_ids == self.config.image_token_id  # (B, T)
            # The placeholder may lie outside the decoder's vocabulary.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (B, T, D_t)
        if not torch.compiler.is_compiling():
            num_placeholders = int(is_image.sum()) if positions is None else len(positions)
            num_images = 0 if image_tokens is None else image_tokens.shape[0]
            per_image = self.config.num_image_tokens
            if num_placeholders != num_images * per_image:
                # TRL recognises this error by its first words and adds a hint on `max_length`.
                raise ValueError(
                    f"Image features and image tokens do not match: got {num_images} images, and placeholders for "
                    f"{num_placeholders / per_image:g} images ({num_placeholders} tokens, {per_image} per image). "
                    "Pass as many images as the text has, and never cut a sequence inside an image."
                )
        if image_tokens is None:
            return inputs_embeds
        image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        if positions is not None:
            flat = inputs_embeds.flatten(0, 1).index_copy(0, positions, image_tokens.flatten(0, 1))
            return flat.view_as(inputs_embeds)  # (B, T, D_t)
        return inputs_embeds.masked_scatter(is_image[..., None], image_tokens)  # (B, T, D_t)

    def run_laid_out(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None, segment_ids: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPast:
        """Runs the decoder over rows as the collator lays them out: `(B, T, D_t)` -> `(B, T, D_t)`."""
        mask = decoder_mask(self.language_model.config, segment_ids, position_ids, inputs_embeds.dtype)
        return self.language_model(
            attention_mask=mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        label_positions: torch.LongTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs tower, projector, splice and decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Tokens with N placeholders per image.
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`, *optional*): All pictures of the batch, in the order
                of their placeholders.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for tokens, 0 for padding; or an already
                built 4-D mask, which is passed through.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Restart in every branch.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D_t)`, *optional*): In place of the embeddings of
                `input_ids`. Placeholders are found where it equals the placeholder's embedding; by `image_positions`
                when the placeholder lies outside the vocabulary.
            image_features (`torch.Tensor` of shape `(I, N_v, D_v)`, *optional*): Cached output of
                [`~VisionQwenModel.get_vision_features`] instead of `pixel_values`.
            segment_ids (`torch.LongTensor` of shape `(B, T, 2)`, *optional*): Row and branch of each token (see
                `shared_prefix`); replaces `attention_mask` in the decoder.
            label_positions (`torch.LongTensor` of shape `(L,)`, *optional*): Positions in the flattened `(B * T)`
                sequence; only their hidden states are returned.
            image_positions (`torch.LongTensor` of shape `(I * N,)`, *optional*): Positions of the placeholders in the
                flattened `(B * T)` sequence, in order; looked for without them.
            mm_encoder_outputs (`dict`, *optional*): Image tokens that `generate` computed beforehand.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(B, T, D_t)`, or `(1, L, D_t)` with
            `label_positions`.

        Raises:
            ValueError: When placeholders and images do not match, or the inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if sum(value is not None for value in (pixel_values, image_features, image_outputs)) > 1:
            raise ValueError("Expected one of pixel_values, image_features and mm_encoder_outputs, got several.")
        if pixel_values is not None:
            image_features = self.get_vision_features(pixel_values)
        if image_features is not None:
            image_outputs = self.project_vision_features(image_features)
        image_tokens = image_outputs.pooler_output if image_outputs is not None else None
        if isinstance(image_tokens, list | tuple):
            image_tokens = torch.stack(list(image_tokens))

        is_step = past_key_values is not None and inputs_embeds is not None
        is_step = is_step and (inputs_embeds.shape[1] == 1 or (attention_mask is not None and attention_mask.ndim == 4))
        # A step of decoding, which may be part of a CUDA graph, is not searched: the host would have to wait for it.
        if image_tokens is not None or not is_step:
            inputs_embeds = self._splice(input_ids, image_tokens, image_positions, inputs_embeds)
        if segment_ids is not None and past_key_values is None:
            outputs = self.run_laid_out(inputs_embeds, position_ids, segment_ids, **kwargs)
        else:
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        if label_positions is not None:
            hidden_states = outputs.last_hidden_state
            outputs.last_hidden_state = hidden_states.flatten(0, 1)[label_positions][None]  # (1, L, D_t)
        outputs["image_hidden_states"] = image_tokens
        return outputs


class VisionQwen(VisionQwenPreTrainedModel, GenerationMixin):
    """A vision-language model from two pre-trained parts and a projector.

    `VisionQwen.from_vision_text_pretrained("openai/clip-vit-base-patch32", "Qwen/Qwen3-0.6B-Base")` joins the parts;
    `VisionQwen.from_pretrained(folder)` loads a full save; `VisionQwen.from_adapter(folder)` reassembles an adapter.

    Args:
        config ([`VisionQwenConfig`]): Composite configuration.

    Raises:
        ValueError: When the decoder rescales its logits, which a plain head would get wrong.
    """

    # Tied to the embedding, the head is a shard of it under tensor parallelism and has to gather its output.
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisionQwenConfig):
        super().__init__(config)
        rescaling = [name for name in _LOGIT_RESCALING if getattr(config.text_config, name, None) not in (None, 1, 1.0)]
        if rescaling:
            raise ValueError(
                f"Decoders that rescale their logits are not supported: {config.text_config.model_type} sets "
                f"{', '.join(rescaling)}."
            )
        self.loss_type = "ForCausalLM"
        self.model = VisionQwenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{_embedding_name(self.model)}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head, `(V, D_t)`."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language-model head."""
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`VisionQwenModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def generate(self, *args, image_features: torch.Tensor | None = None, **kwargs):
        """As `GenerationMixin.generate`; the images are encoded once, before beams are expanded.

        Args:
            image_features (`torch.Tensor` of shape `(I, N_v, D_v)`, *optional*): Cached vision features instead of
                `pixel_values`.
        """
        if image_features is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.model.project_vision_features(image_features)}
        # A decoder whose vocabulary has the placeholder may predict it, and would then ask for a picture in its answer.
        kwargs.setdefault("suppress_tokens", [self.config.image_token_id])
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_features: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        label_positions: torch.LongTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> VisionQwenOutput:
        """The trunk (see [`VisionQwenModel.forward`] for the shared arguments), the head and the loss.

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Target of the position before each one; -100
                carries no loss.
            shift_labels (`torch.LongTensor` of shape `(B, T)`, or `(1, L)` with `label_positions`, *optional*): Target
                of each position itself; takes the place of `labels`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Logits of the last so many positions
                only; 0 keeps all.

        Returns:
            [`VisionQwenOutput`]: Loss in nats per labelled token.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            segment_ids=segment_ids,
            label_positions=label_positions,
            image_positions=image_positions,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                ignore_index=IGNORE_INDEX,
            )
        return VisionQwenOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.get("image_hidden_states"),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a full save; a folder or repository with an adapter is reassembled by [`~VisionQwen.from_adapter`].

        So `AutoModelForImageTextToText.from_pretrained` takes both.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id.
            *model_args, **kwargs: Of `PreTrainedModel.from_pretrained`; with an adapter those that say how its bases
                are loaded: `dtype`, `device_map`, `attn_implementation`, `quantization_config` and `revision`.

        Returns:
            [`VisionQwen`], or a `PeftModel` around it, in evaluation mode.
        """
        revision = kwargs.get("revision")
        if find_adapter_config_file(pretrained_model_name_or_path, revision=revision) is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        loading = ("dtype", "device_map", "attn_implementation", "quantization_config", "revision")
        return cls.from_adapter(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in loading if kwargs.get(name) is not None}
        )

    @classmethod
    def from_vision_text_pretrained(cls, vision: str | Path, text: str | Path | None = None, **arguments):
        """Joins a pre-trained vision encoder and a pre-trained decoder; only the projector is drawn at random.

        See [`~vlm_peft.model.joining.join_pretrained`] for all arguments.

        Args:
            vision (`str` or `Path`): Hub id or folder of the encoder.
            text (`str` or `Path`, *optional*): Hub id or folder of the decoder.

        Returns:
            [`VisionQwen`] in evaluation mode.
        """
        from .joining import join_pretrained

        return join_pretrained(vision, text, **arguments)

    @classmethod
    def from_adapter(cls, name_or_path: str | Path, *, merge: bool = False, **arguments):
        """Reassembles a trained adapter on its bases; see [`~vlm_peft.adapters.folder.load_adapter`] for all arguments.

        Args:
            name_or_path (`str` or `Path`): Adapter folder or Hub id.
            merge (`bool`, *optional*, defaults to `False`): Returns a plain [`VisionQwen`] with LoRA added to the
                weights instead of a `PeftModel`.

        Returns:
            `PeftModel` around a [`VisionQwen`], or a [`VisionQwen`].
        """
        from ..adapters.folder import load_adapter

        return load_adapter(name_or_path, merge=merge, **arguments)


def share_vision_config(tower: PreTrainedModel, config: VisionQwenConfig) -> None:
    """Gives a tower built from the cut configuration the composite's own one: what is set on either holds for both.

    Args:
        tower (`PreTrainedModel`): As built, or loaded, from `config.vision_tower_config`.
        config ([`VisionQwenConfig`]): Its `vision_config` keeps the encoder's full depth.
    """
    cut = tower.config
    for name, value in vars(cut).items():
        if name != "num_hidden_layers":
            setattr(config.vision_config, name, value)
    for module in tower.modules():
        if getattr(module, "config", None) is cut:
            module.config = config.vision_config


def _embedding_name(model: VisionQwenModel) -> str:
    """Name of the token embedding inside the decoder (`embed_tokens`, `wte`, ...)."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.language_model.named_modules() if module is embedding)


def base_model(model: "PreTrainedModel | PeftModel") -> VisionQwen:
    """The model inside its adapter."""
    base = model if isinstance(model, VisionQwen) else model.get_base_model()
    assert isinstance(base, VisionQwen)
    return base


AutoModelForImageTextToText.register(VisionQwenConfig, VisionQwen)
