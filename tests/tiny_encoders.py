"""Tiny encoders of every kind that can be joined, with random weights and the image processor that each has on the Hub.

`examine` joins one, trains it, and measures what the tests demand and README's table shows.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from tiny_runs import quiet_config
from transformers import AutoModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.export import check_llava
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.data.feature_cache import build_feature_cache
from vlm_peft.data.pictures import Pictures
from vlm_peft.training.trainer import VisionSFTTrainer, prepare_training_arguments

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
COMPLETIONS = [["a dog", "two dogs"], ["a cat"], ["a horse"], ["b", "cc"]]
_STEPS = 2


@dataclass(frozen=True)
class TinyEncoder:
    """One kind of encoder, and what its architecture says that it must give.

    Args:
        config (`PreTrainedConfig`): Of the checkpoint.
        processor (`BaseImageProcessor` or `dict`): Of the checkpoint, or what its file says; its pictures have other
            sizes than the encoder's.
        tokens (`int`): Patches, or places of the map, of a picture of the encoder's own size.
        prefix (`int`): Class, distillation and register tokens.
        width (`int`): Of the hidden state that is chosen by default.
        size (`int`): Side of a picture in pixels.
        image_size (`int`, *optional*): Asked for at joining; the encoder's own by default.
        is_llava (`bool`): Whether stock Llava gives the same.
    """

    config: transformers.PreTrainedConfig
    processor: Any
    tokens: int
    prefix: int = 0
    width: int = 16
    size: int = 8
    image_size: int | None = None
    is_llava: bool = True


def _transformer(kind: str, **fields) -> transformers.PreTrainedConfig:
    """Three layers, 16 wide, patches of 2 pixels, of 8 pixels a side unless the kind has no such field."""
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"image_size": 8, "patch_size": 2, "mlp_ratio": 2, **fields}
    known = inspect.signature(getattr(transformers, kind)).parameters
    return getattr(transformers, kind)(**{name: value for name, value in small.items() if name in known})


def _vit() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 12, "width": 12})


def _clip() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12})


def _siglip() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": 12, "width": 12})


def _bit() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8})


def _convnext() -> ConvNextImageProcessorPil:
    return ConvNextImageProcessorPil(size={"shortest_edge": 24})


def _siglip2() -> transformers.PreTrainedConfig:
    """A pair, as SigLIP 2 lies on the Hub."""
    text = transformers.Siglip2TextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    vision = _transformer("Siglip2VisionConfig", num_patches=16)
    return transformers.Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict())


# As in its repositories; transformers has this class for torchvision only.
DINOV3_PROCESSOR = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "do_resize": True,
    "size": {"height": 12, "width": 12},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}

ENCODERS: dict[str, Callable[[], TinyEncoder]] = {
    "CLIP": lambda: TinyEncoder(_transformer("CLIPVisionConfig"), _clip(), 16, prefix=1),
    "SigLIP": lambda: TinyEncoder(_transformer("SiglipVisionConfig"), _siglip(), 16),
    "SigLIP 2 (NaFlex)": lambda: TinyEncoder(
        _siglip2(), Siglip2ImageProcessorPil(patch_size=2, max_num_patches=16), 16, is_llava=False
    ),
    "ViT": lambda: TinyEncoder(_transformer("ViTConfig"), _vit(), 16, prefix=1),
    "ViT, larger pictures": lambda: TinyEncoder(
        _transformer("ViTConfig"), _vit(), 36, prefix=1, size=12, image_size=12, is_llava=False
    ),
    "DeiT": lambda: TinyEncoder(_transformer("DeiTConfig"), _vit(), 16, prefix=2, is_llava=False),
    "BEiT": lambda: TinyEncoder(_transformer("BeitConfig"), _vit(), 16, prefix=1),
    "DINOv2": lambda: TinyEncoder(_transformer("Dinov2Config", image_size=12), _bit(), 36, prefix=1, size=12),
    "DINOv2, smaller pictures": lambda: TinyEncoder(
        _transformer("Dinov2Config", image_size=12), _bit(), 16, prefix=1, image_size=8
    ),
    "DINOv2 with registers": lambda: TinyEncoder(
        _transformer("Dinov2WithRegistersConfig", num_register_tokens=4), _bit(), 16, prefix=5, is_llava=False
    ),
    "DINOv3 ViT": lambda: TinyEncoder(
        _transformer("DINOv3ViTConfig", num_register_tokens=4), DINOV3_PROCESSOR, 16, prefix=5, is_llava=False
    ),
    "ViT-MSN": lambda: TinyEncoder(_transformer("ViTMSNConfig"), _vit(), 16, prefix=1),
    "I-JEPA": lambda: TinyEncoder(_transformer("IJepaConfig"), _vit(), 16),
    "AIMv2": lambda: TinyEncoder(_transformer("Aimv2VisionConfig"), _clip(), 16),
    "ViT-MAE": lambda: TinyEncoder(_transformer("ViTMAEConfig"), _vit(), 16, prefix=1, is_llava=False),
    "Swin": lambda: TinyEncoder(transformers.SwinConfig(**_SWIN), _vit(), 16, size=16, is_llava=False),
    "Swin V2": lambda: TinyEncoder(transformers.Swinv2Config(**_SWIN), _vit(), 16, size=16, is_llava=False),
    "ResNet": lambda: TinyEncoder(
        transformers.ResNetConfig(embedding_size=8, layer_type="basic", **_STAGES),
        _convnext(),
        16,
        size=32,
        image_size=32,
        is_llava=False,
    ),
    "ConvNeXt": lambda: TinyEncoder(
        transformers.ConvNextConfig(num_stages=2, image_size=32, **_STAGES), _convnext(), 16, size=32, is_llava=False
    ),
    "ConvNeXt V2": lambda: TinyEncoder(
        transformers.ConvNextV2Config(num_stages=2, image_size=32, **_STAGES), _convnext(), 16, size=32, is_llava=False
    ),
    "DINOv3 ConvNeXt": lambda: TinyEncoder(
        transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64),
        _vit(),
        4,
        size=64,
        is_llava=False,
    ),
    "MobileViT": lambda: TinyEncoder(
        transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 16, 16], num_attention_heads=2
        ),
        MobileViTImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
        4,
        size=64,
        is_llava=False,
    ),
}
"""By the name that README's table shows."""


def save_encoder(encoder: TinyEncoder, folder: Path) -> Path:
    """A folder as the encoder would lie on the Hub, with weights that let a picture's signal through all layers."""
    torch.manual_seed(0)
    model = AutoModel.from_config(encoder.config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.1)
    model.save_pretrained(folder)
    if isinstance(encoder.processor, dict):
        (folder / "preprocessor_config.json").write_text(json.dumps(encoder.processor))
    else:
        encoder.processor.save_pretrained(folder)
    return folder


def make_pictures() -> Pictures:
    """Four pictures of noise, wide and tall ones."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(len(COMPLETIONS)):
        width, height = (24, 18) if number % 2 else (18, 24)
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        rows.append(PILImage.fromarray(pixels.numpy()))
    return Pictures(Dataset.from_dict({"image": rows}, features=Features({"image": Image()})), ["image"])


@dataclass(frozen=True)
class Examined:
    """What was measured with one encoder.

    Args:
        model ([`VisionQwen`]): Joined, with frozen encoder, as it was before training.
        processor ([`VisionQwenProcessor`]): Of the same bases.
        pixel_values (`torch.Tensor` of shape `(4, 3, H, W)`): What its image processor makes of the pictures.
        features (`torch.Tensor` of shape `(4, N_v, D_v)`): The encoder's, made anew.
        untrained (`torch.Tensor` of shape `(1, T, V)`): Logits of a prompt with the first picture, before training.
        cached (`float`): Largest difference of a feature in the float32 cache, as a share of the largest feature.
        reloaded (`float`): Largest difference of a logit after the trained adapter is loaded again, likewise.
        losses (`list[float]`): Of the training steps.
        moved (`bool`): Whether every weight of the projector changed.
        generated (`int`): Tokens generated from the trained adapter.
        export (`str`): Empty when the model can be written as a stock Llava, else the refusal.
        adapter (`Path`): The trained adapter.
        full (`Path`): The model before training, saved with all its weights.
    """

    model: VisionQwen
    processor: VisionQwenProcessor
    pixel_values: torch.Tensor
    features: torch.Tensor
    untrained: torch.Tensor
    cached: float
    reloaded: float
    losses: list[float]
    moved: bool
    generated: int
    export: str
    adapter: Path
    full: Path


def examine(encoder: Path, decoder: Path, folder: Path, **joint) -> Examined:
    """Joins an encoder and a decoder, trains two steps on cached features, saves, loads, generates.

    Args:
        encoder (`Path`): Of [`save_encoder`].
        decoder (`Path`): Folder of a decoder with its tokenizer.
        folder (`Path`): Where cache and adapter go.
        **joint: How they are joined, such as `image_size` and `projector_type`.
    """
    torch.manual_seed(0)
    model = VisionQwen.from_vision_text_pretrained(encoder, decoder, **joint)
    model.model.vision_tower.requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(encoder, decoder, model.config)
    pictures = make_pictures()
    opened = [pictures.open(number) for number in range(len(pictures))]
    pixel_values = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    prompt = torch.tensor([processor.encode_prompt(PROMPT)])
    with torch.inference_mode():
        features = model.model.get_vision_features(pixel_values)
        untrained = model(input_ids=prompt, pixel_values=pixel_values[:1]).logits
    cache = build_feature_cache(model, processor.image_processor, pictures, directory=folder / "cache", dtype="float32")

    rows = [
        {**vars(processor.encode_row(PROMPT, texts)), "image_ids": [number]} for number, texts in enumerate(COMPLETIONS)
    ]
    model.save_pretrained(folder / "full")
    start = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    trainer = VisionSFTTrainer(
        model=model,
        args=prepare_training_arguments(quiet_config(folder / "adapter", max_steps=_STEPS)),
        train_dataset=Dataset.from_list(rows),
        data_collator=SharedPrefixCollator(
            processor.tokenizer.pad_token_id, lambda numbers: {"image_features": cache.get(numbers)}
        ),
        processing_class=processor,
        peft_config=lora_config(model, r=4),
    )
    trainer.train()
    trainer.save_model()
    trained = trainer.model.eval()
    projector = trained.base_model.model.model.multi_modal_projector.modules_to_save["default"].state_dict()

    loaded = VisionQwen.from_adapter(folder / "adapter")
    with torch.inference_mode():
        expected = trained(input_ids=prompt, image_features=cache.get([0])).logits
        found = loaded(input_ids=prompt, pixel_values=pixel_values[:1]).logits
        generated = loaded.generate(
            input_ids=prompt, pixel_values=pixel_values[:1], max_new_tokens=3, eos_token_id=None
        )
    try:
        check_llava(model.config)
        export = ""
    except ValueError as error:
        export = str(error)
    return Examined(
        model=model,
        processor=processor,
        pixel_values=pixel_values,
        features=features,
        untrained=untrained,
        cached=relative(cache.get(list(range(len(pictures)))), features),
        reloaded=relative(found, expected),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        moved=all(not torch.equal(projector[name], value) for name, value in start.items()),
        generated=generated.shape[1] - prompt.shape[1],
        export=export,
        adapter=folder / "adapter",
        full=folder / "full",
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; infinite when a value is none."""
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return difference if math.isfinite(difference) else math.inf
