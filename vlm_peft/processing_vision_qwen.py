"""Processor: pictures and messages -> token ids with N placeholders per picture, and `pixel_values`.

Stage: in front of the model, in training (`encode_row`) as in generation (`apply_chat_template`). Text of users can
never become a special token: control tokens inside messages are encoded as plain text.
"""

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BaseImageProcessor, ProcessorMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .configuration_vision_qwen import IGNORE_INDEX, IMAGE_TOKEN, VisionQwenConfig
from .shared_prefix import SharedPrefixRow, lay_out

_OUR_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
_TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
# Stands for a text while its surroundings are rendered. Private-use characters never come this far as text.
_ANY_TEXT = "\uf8ff"
# Roles and kinds of parts -> what our template writes around their texts.
_FRAMES: dict[tuple, list[str]] = {}


class VisionQwenProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer; knows how many tokens a picture takes.

    Args:
        image_processor (`BaseImageProcessor`): Of the vision encoder.
        tokenizer (`PreTrainedTokenizerBase`): Of the decoder, with the image placeholder in its vocabulary.
        num_image_tokens (`int`): N, image tokens per picture; `VisionQwenConfig.num_image_tokens`.
        chat_template (`str`, *optional*): Jinja template; ours by default, since Qwen3's own drops image parts.
        image_token (`str`, *optional*, defaults to `"<|image_pad|>"`): The placeholder.

    Raises:
        ValueError: When the number of image tokens is not given, or the tokenizer lacks the placeholder.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        **kwargs,
    ):
        if num_image_tokens is None:
            raise ValueError("Expected num_image_tokens, the tokens per picture (VisionQwenConfig.num_image_tokens).")
        self.num_image_tokens: int = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no {image_token!r}: build the processor with from_vision_text_pretrained, which "
                "adds it."
            )
        template = chat_template if chat_template is not None else _OUR_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | Path, text: str | Path, config: VisionQwenConfig, **kwargs
    ) -> "VisionQwenProcessor":
        """Joins the image processor of `vision` and the tokenizer of `text` for a model of `config`.

        A placeholder that the tokenizer lacks is added, and `config.image_token_id` is set from the tokenizer. Pictures
        are scaled and cut to the size that the encoder was built for (DINOv2's own processor makes smaller ones).

        Args:
            vision, text (`str` or `Path`): Hub ids or folders, as for [`VisionQwen.from_vision_text_pretrained`].
            config ([`VisionQwenConfig`]): Of the model; its `image_token_id` is updated.

        Raises:
            ValueError: When the tokenizer has no ChatML turn tokens.
        """
        image_processor = _fit_picture_size(_load_image_processor(vision, config), config.picture_size)
        tokenizer = AutoTokenizer.from_pretrained(text, revision=config.text_revision)
        missing = [token for token in (IMAGE_TOKEN, *_TURN_TOKENS) if token not in tokenizer.get_vocab()]
        turns = [token for token in missing if token in _TURN_TOKENS]
        if turns:
            raise ValueError(
                f"The tokenizer of {text} has no {' and '.join(turns)}: a decoder with ChatML turn tokens is needed "
                "(all Qwen decoders have them), or add them to its tokenizer and embedding first."
            )
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        processor = cls(image_processor, tokenizer, num_image_tokens=config.num_image_tokens)
        config.image_token_id = processor.image_token_id
        return processor

    @property
    def end_of_turn_token_id(self) -> int:
        """Id of `<|im_end|>`, which ends every turn and every generation."""
        return self.tokenizer.convert_tokens_to_ids(_TURN_TOKENS[1])

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The N placeholders of one picture (called by `ProcessorMixin`)."""
        return self.image_token * self.num_image_tokens

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`; with `tokenize=True`, control tokens in messages stay plain text."""
        if kwargs.get("tokenize") and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(*args, **kwargs)

    def encode_row(self, prompt: list[dict], completions: list) -> SharedPrefixRow:
        """Token ids, positions, branches and labels of one row with all its completions.

        Args:
            prompt (`list[dict]`): Messages that all completions share, with `{"type": "image"}` parts.
            completions (`list[str]` or `list[list[dict]]`):
                Each is a text (the assistant's answer) or the messages that follow, for example a question and its
                answer. A first message of the prompt's last role continues that turn. Every assistant turn is labelled,
                with its end-of-turn token; nothing else is.

        Returns:
            [`SharedPrefixRow`]: Each picture's placeholder expanded to N tokens.

        Raises:
            ValueError: When a completion is empty or has no assistant turn.
        """
        conversations: list[tuple[list[dict], bool]] = []
        ends: list[list[int]] = []
        for completion in completions:
            following = (
                [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
            )
            messages = _merge_turns([*prompt, *following])
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if not turns or any(not _text_of(messages[index]).strip() for index in turns):
                raise ValueError(f"Expected a completion with text, got {completion!r}.")
            ends.append([])
            for index in turns:
                conversations.append((messages[:index], True))
                conversations.append((messages[: index + 1], False))
                ends[-1].append(len(conversations) - 1)
        encoded = self._encode(conversations)

        branches = []
        for turns in ends:
            input_ids = encoded[turns[-1]]
            labels = [IGNORE_INDEX] * len(input_ids)
            for end in turns:
                begin, stop = len(encoded[end - 1]), len(encoded[end])
                labels[begin:stop] = input_ids[begin:stop]
            branches.append((input_ids, labels))
        return lay_out([self._expand(*branch) for branch in branches])

    def encode_prompt(self, prompt: list[dict]) -> list[int]:
        """Token ids of a prompt up to where the assistant answers, each placeholder expanded to N.

        Args:
            prompt (`list[dict]`): Messages; neighbouring ones of one role are one turn.
        """
        input_ids = self._encode([(_merge_turns(prompt), True)])[0]
        return self._expand(input_ids, input_ids)[0]

    def _encode(self, conversations: list[tuple[list[dict], bool]]) -> list[list[int]]:
        """Ids of conversations, each with or without the generation prompt; one placeholder per picture.

        Equal prompts (five captions of one picture) are encoded once.
        """
        keys = [f"{add_prompt}{messages}" for messages, add_prompt in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        suspicious = _control_tokens(tuple(self.tokenizer.added_tokens_encoder))
        encoded, texts = {}, {}
        for key, (messages, add_prompt) in distinct.items():
            if any(suspicious.search(_text_of(message)) for message in messages):
                arguments = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
                encoded[key] = self._apply(messages, add_prompt, **arguments)["input_ids"]
            else:
                texts[key] = self._render(messages, add_prompt)
        if texts:
            ids = self.tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
            encoded |= zip(texts, ids, strict=True)
        return [encoded[key] for key in keys]

    def _render(self, messages: list[dict], add_prompt: bool) -> str:
        """Text of a conversation; those that differ in their texts only are rendered once."""
        texts: list[Any] = [
            part.get("text") for message in messages for part in _parts(message) if part.get("type") == "text"
        ]
        # Another template may do more with a text than copy it.
        if self.chat_template != _OUR_TEMPLATE or not all(isinstance(text, str) for text in texts):
            return self._apply(messages, add_prompt, tokenize=False)
        key = (
            add_prompt,
            *((message["role"], *(part.get("type") for part in _parts(message))) for message in messages),
        )
        if key not in _FRAMES:
            marked = [
                {**message, "content": [{**part, "text": _ANY_TEXT} for part in _parts(message)]}
                for message in messages
            ]
            _FRAMES[key] = self._apply(marked, add_prompt, tokenize=False).split(_ANY_TEXT)
        first, *following = _FRAMES[key]
        return first + "".join(text + frame for text, frame in zip(texts, following, strict=True))

    def _apply(self, messages: list[dict], add_prompt: bool, **arguments):
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_prompt, **arguments
        )

    def _expand(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Expands each placeholder to N."""
        expanded_ids, expanded_labels = [], []
        for token, label in zip(input_ids, labels, strict=True):
            repeats = self.num_image_tokens if token == self.image_token_id else 1
            expanded_ids += [token] * repeats
            expanded_labels += [label] * repeats
        return expanded_ids, expanded_labels


def _load_image_processor(vision: str | Path, config: VisionQwenConfig):
    """The image processor of an encoder; of timm's, whose own cannot be saved, one that does the same.

    DINOv3's exists for torchvision only; without it, pictures are scaled by Pillow, which rounds them to 8 bits first.

    Raises:
        ValueError: When a library that the image processor needs is not installed.
    """
    timm = getattr(config.vision_config, "pretrained_cfg", None)
    if timm is None:
        try:
            return AutoImageProcessor.from_pretrained(vision, revision=config.vision_revision)
        except ImportError as error:
            settings, _ = BaseImageProcessor.get_image_processor_dict(vision, revision=config.vision_revision)
            kind = settings["image_processor_type"]
            if not kind.startswith("DINOv3ViT"):
                raise ValueError(
                    f"The image processor of {vision}, {kind}, needs a library that is not installed: "
                    f"{' '.join(str(error).split())}"
                ) from error
            names = ("size", "resample", "image_mean", "image_std")
            return ViTImageProcessorPil(**{name: settings[name] for name in names})
    height, width = timm.get("input_size", (3, 224, 224))[-2:]
    edge = math.floor(min(height, width) / timm.get("crop_pct", 0.875))
    squashes = timm.get("crop_mode") == "squash"
    return CLIPImageProcessorPil(
        size={"height": height, "width": width} if squashes else {"shortest_edge": edge},
        do_center_crop=not squashes,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[timm.get("interpolation", "bicubic").upper()],
        image_mean=timm.get("mean", IMAGENET_DEFAULT_MEAN),
        image_std=timm.get("std", IMAGENET_DEFAULT_STD),
    )


def _fit_picture_size(image_processor, size: tuple[int, int]):
    """Makes an image processor give pictures of `size`, height and width, cut from the middle where it cuts already.

    Returns:
        The image processor; in place of one that cuts pictures into patches, one that leaves this to the model.

    Raises:
        ValueError: When it cannot give pictures of this size.
    """
    if hasattr(image_processor, "max_num_patches"):
        settings = (
            "do_convert_rgb",
            "resample",
            "do_rescale",
            "rescale_factor",
            "do_normalize",
            "image_mean",
            "image_std",
        )
        image_processor = SiglipImageProcessorPil(**{name: getattr(image_processor, name) for name in settings})
    square = {"height": size[0], "width": size[1]}
    edge = {"shortest_edge": max(size)}
    cuts = getattr(image_processor, "do_center_crop", False)
    # Some take only one of the two spellings, and fail in their own ways with the other.
    for changes in ({}, {"size": edge, "crop_size": square}) if cuts else ({}, {"size": square}, {"size": edge}):
        try:
            made = _made_size(image_processor, changes)
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
        if made == size:
            for name, value in changes.items():
                setattr(image_processor, name, value)
            return image_processor
    raise ValueError(
        f"The encoder takes pictures of {size[0]} x {size[1]} pixels, and its {type(image_processor).__name__} cannot "
        "be set to make them: choose another image_size."
    )


def _made_size(image_processor, changes: dict[str, dict[str, int]]) -> tuple[int, ...] | None:
    """Height and width that an image processor makes of a wide and of a tall picture; None when they differ."""
    pictures = [Image.new("RGB", size) for size in ((30, 20), (20, 30))]
    made = [image_processor(picture, return_tensors="pt", **changes)["pixel_values"].shape[2:] for picture in pictures]
    return made[0] if made[0] == made[1] else None


@lru_cache
def _control_tokens(added_tokens: tuple[str, ...]) -> re.Pattern:
    """Matches text that could become a control token, or is a mark (private use) that transformers tells them by."""
    return re.compile("|".join([*map(re.escape, added_tokens), "[\ue000-\uf8ff\U000f0000-\U0010fffd]"]))


def _merge_turns(messages: list[dict]) -> list[dict]:
    """Joins neighbouring messages of one role into one turn."""
    merged: list[dict] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**merged[-1], "content": [*_parts(merged[-1]), *_parts(message)]}
        else:
            merged.append(message)
    return merged


def _parts(message: dict) -> list[dict]:
    """Content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text_of(message: dict) -> str:
    """All text of a message."""
    return "".join(part.get("text", "") for part in _parts(message))


AutoProcessor.register(VisionQwenConfig, VisionQwenProcessor, exist_ok=True)
