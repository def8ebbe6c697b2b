"""Turns: how a decoder's conversations are written, found by trying its tokenizer.

Stage: below the processor; a decoder's tokenizer -> template, and the token that ends a turn. In this order: ChatML
where the tokenizer has its tokens; the decoder's own template where it can hold pictures and labels; ChatML with turn
tokens that are added, whose rows train.
"""

import logging
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .configuration_vision_qwen import IMAGE_TOKEN

logger = logging.getLogger(__name__)

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
BEGIN = "{{- bos_token -}}"
"""In front of a template that does not write it, where the tokenizer puts it in front of every text."""

# Makes one text of each message's parts, for a template that expects texts.
_JOIN_PARTS = Path(__file__).with_name("picture_parts.jinja").read_text(encoding="utf-8")
_JOIN_SYSTEM = "{%- set joins_system = true -%}"
# A prompt must not change from one day to the next. Llama 3's templates fall back to this date themselves.
_DAY = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Turns:
    """How conversations are written.

    Args:
        chat_template (`str`): Jinja template that renders image parts as the placeholder.
        end_of_turn_token (`str`): What follows every answer, and ends generation.
        is_added (`bool`): Whether the tokenizer lacks turn tokens, which it then has to be given.
    """

    chat_template: str
    end_of_turn_token: str
    is_added: bool = False


def choose_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """ChatML, the tokenizer's own template, or ChatML with tokens to add.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the decoder, as it was loaded.
    """
    ids = tokenizer("a")["input_ids"]
    begin = BEGIN if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id] else ""
    vocabulary = tokenizer.get_vocab()
    is_added = any(token not in vocabulary for token in TURN_TOKENS)
    if is_added and tokenizer.chat_template is not None:
        own = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), tokenizer.get_chat_template())
        reason = ""
        for system in ("", _JOIN_SYSTEM):
            template = system + _JOIN_PARTS + own
            try:
                if begin and not _render(tokenizer, template, [_user("a")]).startswith(str(tokenizer.bos_token)):
                    template = begin + template
                return Turns(template, _end_of_turn(tokenizer, template))
            except Exception as error:
                # A template is somebody's program: it may fail in any way.
                reason = reason or str(error)
        logger.warning(
            "The decoder's own chat template is not used (%s): turns are ChatML, with tokens whose rows train.",
            reason,
        )
    return Turns(begin + CHATML, TURN_TOKENS[1], is_added)


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _render(tokenizer: Any, template: str, messages: list[dict], add_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_prompt, tokenize=False
    )


def _end_of_turn(tokenizer: Any, template: str) -> str:
    """The control token after every answer.

    Raises:
        ValueError: When a template loses a text or a picture, or prompt and answer are not the beginning of what they
            are in the whole conversation, so that no label could be found.
    """
    pictures = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "image"}]
    conversation: list[dict] = [
        {"role": "system", "content": "zero"},
        {"role": "user", "content": pictures},
        {"role": "assistant", "content": "two"},
        _user("three"),
        {"role": "assistant", "content": "four"},
    ]
    found = set()
    for messages in (conversation, conversation[1:]):
        rendered = _render(tokenizer, template, messages)
        texts = ["zero", f"{IMAGE_TOKEN}one{IMAGE_TOKEN}", "two", "three", "four"][-len(messages) :]
        if not re.search(".*".join(map(re.escape, texts)), rendered, re.DOTALL):
            raise ValueError("it does not keep every text and picture of a conversation")
        whole = _encode(tokenizer, rendered)
        for turn in (len(messages) - 3, len(messages) - 1):
            prompt = _encode(tokenizer, _render(tokenizer, template, messages[:turn], add_prompt=True))
            if whole[: len(prompt)] != prompt:
                raise ValueError("its prompt for an answer is not how the answered conversation begins")
            control = tokenizer.added_tokens_decoder
            answer = whole[len(prompt) :]
            length = next((index for index, token in enumerate(answer) if token in control), 0)
            if tokenizer.decode(answer[:length]).strip() != messages[turn]["content"]:
                raise ValueError("it does not end an answer with a control token")
            found.add(tokenizer.convert_ids_to_tokens(answer[length]))
    if len(found) != 1:
        raise ValueError(f"it ends answers in different ways: {', '.join(sorted(found))}")
    return found.pop()


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
