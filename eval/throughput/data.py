"""Stand-in data and models for eval/throughput.py: pictures, captions, a tokenizer and configurations, made in code.

Speed depends on none of the values, only on sizes: JPEG files of 500 x 375, five captions of 10 to 12 words a picture,
and Qwen3's vocabulary of 151,936 with its control tokens at their own ids.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_peft import VisionQwenConfig, VisionQwenProcessor

VOCABULARY = 151_936
IMAGE_TOKEN_ID = 151_655
INSTRUCTION = "Describe the picture."
CAPTIONS_PER_PICTURE = 5

_CONTROL_TOKENS = {
    "<|endoftext|>": 151_643,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<|image_pad|>": IMAGE_TOKEN_ID,
}
_SUBJECTS = "dog cat man woman child cyclist farmer singer horse surfer".split()
_COLOURS = "black white brown red young old small tall wet tired".split()
_ACTIONS = "runs sits jumps walks waits plays sleeps stands smiles turns".split()
_RELATIONS = "near behind beside under across above".split()
_PLACES = "river fence market bridge house field station tree beach road".split()
_ENDINGS = ["in the rain", "on a sunny day", "with a red ball", "late at night", "while people watch"]
_TEMPLATE_WORDS = ["Describe", "user", "assistant", "system", "A", "Two"]


@dataclass(frozen=True)
class Preset:
    """Shapes and settings of one comparison.

    Args:
        summary: One line for the report.
        vision: Fields of `CLIPVisionConfig`.
        text: Fields of `Qwen3Config`; the vocabulary is added.
        device: `cpu` or `cuda`.
        dtype: Of the timed steps, on both sides: `fp32`, or `bf16` (bf16 weights and autocast).
        pictures: Of an epoch.
        pictures_per_step: Of an optimizer step, on both sides.
        steps: Timed steps of each side in one turn.
        warm_up_steps: Untimed steps before them in each turn.
        turns: How often the sides take turns.
        max_length: Tokens of a packed sequence; on a GPU of a row, all rows of a step being one sequence.
        packing: Whether our side packs rows by default; the other setting is the switch.
        attn_implementation: Of our decoder.
        switches: Ideas that are turned off, or on, one at a time.
        peers: Sides that ours is compared with; none where only its use of the device is measured.
        generated_pictures: Pictures to generate for.
        workers: Processes that load data, on both sides.
    """

    summary: str
    vision: dict
    text: dict
    device: str
    dtype: str
    pictures: int
    pictures_per_step: int
    steps: int
    warm_up_steps: int
    turns: int
    max_length: int | None
    packing: bool
    attn_implementation: str
    switches: tuple[str, ...]
    peers: tuple[str, ...] = ("peer",)
    generated_pictures: int = 64
    workers: int = 0
    lora: dict = field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0})


_QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_QWEN3_17B = {**_QWEN3_06B, "hidden_size": 2048, "intermediate_size": 6144}
_QWEN3_4B = {
    **_QWEN3_06B,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
_GPU = {"device": "cuda", "dtype": "bf16", "turns": 3, "warm_up_steps": 4, "packing": True, "workers": 12}
_GPU |= {"max_length": 1024, "attn_implementation": "flex_attention"}
_GPU_SWITCHES = (
    "no shared prefix",
    "no feature cache",
    "no compiled layers",
    "no CUDA graph",
    "no fused LoRA",
    "TRL's head",
)
_CLIP_B32 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}

PRESETS = {
    "cpu": Preset(
        summary="CLIP-like encoder 192 wide x 6 layers, 224 px in patches of 32 (49 image tokens); Qwen3-like decoder "
        "192 wide x 5 layers",
        vision={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 224,
            "patch_size": 32,
        },
        text={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
        },
        device="cpu",
        dtype="fp32",
        pictures=96,
        pictures_per_step=4,
        steps=1,
        warm_up_steps=0,
        turns=3,
        max_length=1024,
        packing=False,
        attn_implementation="sdpa",
        switches=("no shared prefix", "no feature cache", "no labelled-only head", "TRL's head", "packing"),
        generated_pictures=40,
    ),
    "b32": Preset(
        summary="CLIP-B/32 at 224 px (50 image tokens, class token kept) and Qwen3-0.6B shapes",
        vision=_CLIP_B32,
        text=_QWEN3_06B,
        pictures=2048,
        pictures_per_step=64,
        # More steps than the loader has batches in store, so that its rate counts, too.
        steps=16,
        peers=("peer", "peer, compiled layers"),
        switches=_GPU_SWITCHES,
        generated_pictures=512,
        **_GPU,
    ),
    "b32-1.7b": Preset(
        summary="CLIP-B/32 at 224 px (50 image tokens, class token kept) and Qwen3-1.7B shapes",
        vision=_CLIP_B32,
        text=_QWEN3_17B,
        pictures=512,
        pictures_per_step=64,
        steps=8,
        peers=(),
        switches=(),
        **_GPU,
    ),
    "b32-4b": Preset(
        summary="CLIP-B/32 at 224 px (50 image tokens, class token kept) and Qwen3-4B shapes",
        vision=_CLIP_B32,
        text=_QWEN3_4B,
        pictures=512,
        pictures_per_step=64,
        steps=6,
        peers=(),
        switches=(),
        **_GPU,
    ),
    "l14-336": Preset(
        summary="CLIP-L/14 at 336 px (577 image tokens, class token kept) and Qwen3-0.6B shapes",
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text=_QWEN3_06B,
        pictures=512,
        # Of 12 pictures the peer's activations take 73 GB.
        pictures_per_step=8,
        steps=14,
        peers=("peer", "peer, compiled layers"),
        switches=_GPU_SWITCHES,
        generated_pictures=256,
        **_GPU,
    ),
}


def make_captions(picture: int) -> list[str]:
    """Five captions of 10 to 12 words, the same in every run."""
    draw = random.Random(picture)
    captions = []
    for _ in range(CAPTIONS_PER_PICTURE):
        words = ["A", draw.choice(_COLOURS), draw.choice(_SUBJECTS), draw.choice(_ACTIONS), draw.choice(_RELATIONS)]
        captions.append(" ".join([*words, "the", draw.choice(_PLACES), draw.choice(_ENDINGS)]) + ".")
    return captions


def make_pictures(folder: Path, count: int) -> list[str]:
    """Writes JPEG files of 500 x 375 with photo-like detail; returns their paths."""
    paths = []
    for index in range(count):
        draw = np.random.default_rng(index)
        coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        picture = np.clip(picture + draw.integers(-24, 25, picture.shape), 0, 255).astype(np.uint8)
        path = folder / f"{index:06d}.jpg"
        Image.fromarray(picture).save(path, quality=90)
        paths.append(str(path))
    return paths


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has the captions' words as single tokens and fills the rest of Qwen3's 151,936 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    endings = {word for ending in _ENDINGS for word in ending.split()}
    words = [*_SUBJECTS, *_COLOURS, *_ACTIONS, *_RELATIONS, *_PLACES, *sorted(endings), "the", "picture"]
    merges = []
    for word in [*(f"Ġ{word}" for word in words), *_TEMPLATE_WORDS]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    first_control = min(_CONTROL_TOKENS.values())
    controls = {index: token for token, index in _CONTROL_TOKENS.items()}
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[controls.get(index, f"Ġ{'x' if index < first_control else 'y'}{index}")] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def make_config(preset: Preset) -> VisionQwenConfig:
    """Configuration of our model; the class token is kept where the preset counts it."""
    text = Qwen3Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=_CONTROL_TOKENS["<|im_end|>"],
        pad_token_id=_CONTROL_TOKENS["<|endoftext|>"],
        bos_token_id=None,
        # Wider than usual, so that the best two next tokens of a random model are never close to a tie.
        initializer_range=0.05,
        **preset.text,
    )
    return VisionQwenConfig(
        vision_config=CLIPVisionConfig(**preset.vision).to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE_TOKEN_ID,
        keep_class_token=preset.device == "cuda",
    )


def make_processor(config: VisionQwenConfig, tokenizer: PreTrainedTokenizerFast) -> VisionQwenProcessor:
    """Our processor: CLIP's resizing and cropping, our template."""
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_center_crop=True
    )
    return VisionQwenProcessor(image_processor, tokenizer, num_image_tokens=config.num_image_tokens)
