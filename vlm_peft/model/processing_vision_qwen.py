"""Processor: pictures and messages -> token ids with N placeholders per picture, and `pixel_values`.

Stage: in front of the model, in training (`encode_row`) as in generation (`apply_chat_template`). Text of users can
never become a special token: control tokens inside messages are encoded as plain text.
"""

import logging
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .configuration_vision_qwen import IGNORE_INDEX, IMAGE_TOKEN, VisionQwenConfig
from .shared_prefix import SharedPrefixRow, lay_out
from .turns import BEGIN, CHATML, TURN_TOKENS, choose_turns

logger = logging.getLogger(__name__)

# Stands for a text while its surroundings are rendered. Private-use characters never come this far as text.
_ANY_TEXT = "\uf8ff"
# Template, roles and kinds of parts -> what our template writes around their texts.
_FRAMES: dict[tuple, list[str]] = {}


class VisionQwenProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer; knows how many tokens a picture takes.

    Args:
        image_processor (`BaseImageProcessor`): Of the vision encoder.
        tokenizer (`PreTrainedTokenizerBase`): Of the decoder, with the image placeholder in its vocabulary.
        num_image_tokens (`int`): N, image tokens per picture; `VisionQwenConfig.num_image_tokens`.
        chat_template (`str`, *optional*): Jinja template; ours by default, since Qwen3's own drops image parts.
        image_token (`str`, *optional*, defaults to `"<|image_pad|>"`): The placeholder.
        end_of_turn_token (`str`, *optional*, defaults to `"<|im_end|>"`): What the template writes after every answer.

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
        end_of_turn_token: str = TURN_TOKENS[1],
        **kwargs,
    ):
        if num_image_tokens is None:
            raise ValueError("Expected num_image_tokens, the tokens per picture (VisionQwenConfig.num_image_tokens).")
        self.num_image_tokens: int = num_image_tokens
        self.image_token = image_token
        self.end_of_turn_token = end_of_turn_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no {image_token!r}: build the processor with from_vision_text_pretrained, which "
                "adds it."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad_token, which batches are filled up with: give it one, or build the processor "
                "with from_vision_text_pretrained, which does."
            )
        template = chat_template if chat_template is not None else CHATML
        super().__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | Path, text: str | Path, config: VisionQwenConfig, **kwargs
    ) -> "VisionQwenProcessor":
        """Joins the image processor of `vision` and the tokenizer of `text` for a model of `config`.

        Turns are written as [`~vlm_peft.model.turns.choose_turns`] finds. Tokens that the tokenizer lacks are added,
        and `config` learns their ids. Pictures are scaled and cut to the size that the encoder was built for (DINOv2's
        own processor makes smaller ones).

        Args:
            vision, text (`str` or `Path`): Hub ids or folders, as for [`VisionQwen.from_vision_text_pretrained`].
            config ([`VisionQwenConfig`]): Of the model; its `image_token_id` and `turn_token_ids` are updated.
        """
        image_processor = _fit_picture_size(_load_image_processor(vision, config), config.picture_size)
        tokenizer = AutoTokenizer.from_pretrained(text, revision=config.text_revision)
        turns = choose_turns(tokenizer)
        # The placeholder comes last: outside the vocabulary it needs no row.
        needed = [*(TURN_TOKENS if turns.is_added else ()), turns.end_of_turn_token, IMAGE_TOKEN]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        missing = [token for token in dict.fromkeys(needed) if token not in special]
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        tokenizer.chat_control_tokens = _unspoken_tokens(tokenizer)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or turns.end_of_turn_token
        processor = cls(
            image_processor,
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            chat_template=turns.chat_template,
            end_of_turn_token=turns.end_of_turn_token,
        )
        config.image_token_id = processor.image_token_id
        if turns.is_added:
            logger.info("%s gets %s and %s, whose rows train.", text, *TURN_TOKENS)
        elif turns.end_of_turn_token != TURN_TOKENS[1]:
            logger.info("%s has a chat template, which ends answers with %s.", text, turns.end_of_turn_token)
        ids: Any = tokenizer.convert_tokens_to_ids(list(TURN_TOKENS))
        config.turn_token_ids = ids if turns.is_added else None
        return processor

    @property
    def end_of_turn_token_id(self) -> int:
        """Id of the token that ends every answer and every generation."""
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn_token)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The N placeholders of one picture (called by `ProcessorMixin`)."""
        return self.image_token * self.num_image_tokens

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`; with `tokenize=True`, control tokens in messages stay plain text."""
        if kwargs.get("tokenize") and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(*args, **kwargs)

    def encode_row(self, prompt: list[dict], completions: list, *, labels_prompt: bool = True) -> SharedPrefixRow:
        """Token ids, positions, branches and labels of one row with all its completions.

        Args:
            prompt (`list[dict]`): Messages that all completions share, with `{"type": "image"}` parts.
            completions (`list[str]` or `list[list[dict]]`):
                Each is a text (the assistant's answer) or the messages that follow, for example a question and its
                answer. A first message of the prompt's last role continues that turn. Every assistant turn is labelled,
                with its end-of-turn token; nothing else is.
            labels_prompt (`bool`, *optional*, defaults to `True`): Otherwise assistant turns of the prompt are not.

        Returns:
            [`SharedPrefixRow`]: Each picture's placeholder expanded to N tokens.

        Raises:
            ValueError: When a completion is empty or has no assistant turn.
        """
        conversations: list[tuple[list[dict], bool]] = []
        counts: list[int] = []
        asked = 0 if labels_prompt else len(_merge_turns(prompt))
        for completion in completions:
            following = (
                [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
            )
            messages = _merge_turns([*prompt, *following])
            turns = [index for index in range(asked, len(messages)) if messages[index]["role"] == "assistant"]
            if not turns or any(not _text_of(messages[index]).strip() for index in turns):
                raise ValueError(f"Expected a completion with text, got {completion!r}.")
            conversations += [(messages[:index], True) for index in turns]
            conversations.append((messages[: turns[-1] + 1], False))
            counts.append(len(turns) + 1)
        encoded = iter(self._encode(conversations))
        branches = []
        for count in counts:
            *prompts, whole = (next(encoded) for _ in range(count))
            branches.append(self._label(prompts, whole))
        return lay_out([self._expand(*branch) for branch in branches])

    def _label(self, prompts: list[list[int]], whole: list[int]) -> tuple[list[int], list[int]]:
        """A conversation up to the end of its last answer, and labels from each prompt's end to its answer's."""
        labels = [IGNORE_INDEX] * len(whole)
        stop = 0
        for prompt in prompts:
            begin = len(prompt)
            if whole[:begin] != prompt and not self._is_chatml:
                raise ValueError("The decoder's chat template writes this conversation otherwise once it is answered.")
            if self.end_of_turn_token_id not in whole[begin:]:
                raise ValueError(f"Expected a chat template that ends every answer with {self.end_of_turn_token!r}.")
            stop = whole.index(self.end_of_turn_token_id, begin) + 1
            labels[begin:stop] = whole[begin:stop]
        # Some templates write more after the last turn, which is never predicted.
        return whole[:stop], labels[:stop]

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
        if not self._is_chatml or not all(isinstance(text, str) for text in texts):
            return self._apply(messages, add_prompt, tokenize=False)
        key = (
            self.chat_template,
            self.tokenizer.bos_token,
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

    @property
    def _is_chatml(self) -> bool:
        """Whether the template is ours, as the package has it."""
        return self.chat_template in (CHATML, BEGIN + CHATML)

    def _apply(self, messages: list[dict], add_prompt: bool, **arguments):
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=add_prompt, **arguments
            )
        except TemplateError as error:
            raise ValueError(f"The decoder's chat template refuses this conversation: {error}") from error

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
    # Some tokenizers have added tokens for runs of spaces or newlines, which are text.
    words = (re.escape(token) for token in added_tokens if not token.isspace())
    return re.compile("|".join([*words, "[\ue000-\uf8ff\U000f0000-\U0010fffd]"]))


def _unspoken_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Added tokens, special or not, that no text makes by its characters, such as `<think>`."""
    return [
        token
        for token, index in tokenizer.added_tokens_encoder.items()
        # What transformers encodes a control token with that must stay text.
        if not token.isspace() and index not in tokenizer._encode_without_added_tokens(token)
    ]


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
