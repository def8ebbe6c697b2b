"""Chat: a conversation about pictures, of several turns; the answer comes word by word.

Stage: trained model -> text on the terminal.
"""

# transformers declares sub-configurations as `dict | PreTrainedConfig | None`.
# mypy: disable-error-code="union-attr"

import sys
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TextStreamer

from ..data.pictures import open_picture
from ..evaluation.generation import check_length
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks.example import check_text, picture_turn

COMMANDS = "/image PATH adds a picture; /reset forgets pictures and turns; /quit ends."


class Conversation:
    """Turns and pictures so far.

    Args:
        model ([`VisionQwen`] or `PeftModel`): In evaluation mode.
        processor ([`VisionQwenProcessor`]): Saved with the model.
        max_new_tokens (`int`): Tokens of an answer at most.
    """

    def __init__(self, model: VisionQwen | PeftModel, processor: VisionQwenProcessor, max_new_tokens: int):
        self._model = model
        self._processor = processor
        self._max_new_tokens = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forgets turns and pictures."""
        self._messages: list[dict] = []
        self._features: list[torch.Tensor] = []
        self._new_pictures = 0

    def add_picture(self, path: str | Path) -> None:
        """Shows a picture with the next question; it is encoded once, here.

        Raises:
            UnreadablePictureError: When it cannot be read.
        """
        pixel_values = self._processor.image_processor(open_picture(Path(path)), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            trunk = base_model(self._model).model
            self._features.append(trunk.get_vision_features(pixel_values.to(self._model.device)))
        self._new_pictures += 1

    def ask(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Asks, and keeps question and answer for the turns to come.

        Args:
            text (`str`): What the user says.
            streamer (`TextStreamer`, *optional*): Gets the answer's tokens as they are made.

        Raises:
            ValueError: When the conversation has become too long for the model; it is left as it was.
        """
        messages = [*self._messages, *picture_turn(text, pictures=self._new_pictures)]
        input_ids = torch.tensor([self._processor.encode_prompt(messages)], device=self._model.device)
        check_length(self._model, input_ids.shape[1], self._max_new_tokens)
        images = {"image_features": torch.cat(self._features)} if self._features else {}
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **images,
                max_new_tokens=self._max_new_tokens,
                # A full save's own settings may say otherwise; what is streamed has one beam.
                do_sample=False,
                num_beams=1,
                eos_token_id=self._processor.end_of_turn_token_id,
                pad_token_id=self._processor.tokenizer.pad_token_id,
                streamer=streamer,
            )
        answer = self._processor.tokenizer.decode(generated[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._new_pictures = 0
        return answer


def chat(conversation: Conversation, processor: VisionQwenProcessor, opening: str) -> None:
    """Reads questions from standard input until it ends; answers go to standard output, the rest to standard error.

    Args:
        conversation ([`Conversation`]): With the pictures to begin with.
        processor ([`VisionQwenProcessor`]): For the streamed text.
        opening (`str`): What an empty line asks.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _load_line_editing()
        print(f'An empty line asks "{opening}"\n{COMMANDS}', file=sys.stderr)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            line = _read_line(is_terminal).strip()
        except EOFError:
            return
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        command, _, path = line.partition(" ")
        path = path.strip().strip("'\"")
        try:
            if line == "/quit":
                return
            if line == "/reset":
                conversation.reset()
            elif command == "/image" and path:
                conversation.add_picture(Path(path).expanduser())
            elif command.startswith("/"):
                print(f"There is no {line}. {COMMANDS}", file=sys.stderr)
            else:
                conversation.ask(line or opening, streamer)
        except ValueError as error:
            print(error, file=sys.stderr)


def _read_line(is_terminal: bool) -> str:
    """The next line of standard input.

    Raises:
        EOFError: At its end.
        ValueError: For a line that is no text; the next one can be read.
    """
    if is_terminal:
        try:
            return check_text(input("> "), "The line")
        except UnicodeDecodeError as error:
            raise ValueError(f"The line is no UTF-8 text: byte {error.object[error.start]:#04x}.") from error
    # As text, one wrong byte would take the lines around it with it.
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return check_text(line.decode("utf-8", "surrogateescape"), "The line")


def _load_line_editing() -> None:
    """Arrow keys and history for `input`, where Python has them."""
    with suppress(ImportError):
        import readline  # noqa: F401
