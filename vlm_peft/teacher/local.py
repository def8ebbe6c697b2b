"""A teacher in this process: any image-text-to-text model of transformers, or a VisionQwen's adapter folder.

Stage: questions -> answers, in batches. Greedy answers depend on their question alone; drawn ones on their batch, too.
"""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..adapters.folder import is_adapter_folder
from ..adapters.loading import default_device, load_model
from ..data.pictures import UnreadablePictureError
from ..hub.access import looks_local
from .questions import Answer, Fail, Keep, Question, Sampling, sent_picture


class LocalTeacher:
    """A model that is loaded here.

    Args:
        name (`str`): Folder or Hub id.
        sampling ([`Sampling`]): Of the answers.
        revision (`str`, *optional*): Of a Hub id.
        device (`str`, *optional*): The accelerator if there is one.
        dtype (`str`, *optional*): Of the weights; as they are stored without it, float32 for an adapter.
        max_new_tokens (`int`, *optional*): In place of the prompts' own.
        image_side (`int`): Pixels of a picture's longer side at most.
        batch_size (`int`): Questions at a time.

    Raises:
        FileNotFoundError, ValueError, OSError: When there is no such model.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int | None = None,
        image_side: int = 1024,
        batch_size: int = 8,
    ):
        where = torch.device(device) if device else default_device()
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.image_side, self.batch_size = image_side, batch_size
        self.model: Any
        self.processor: Any
        if looks_local(name) and not Path(name).exists():
            raise FileNotFoundError(f"The teacher {name} is not there: expected a folder, or an id on the Hub.")
        if is_adapter_folder(name):
            self.model, self.processor = load_model(
                Path(name), dtype=getattr(torch, dtype) if dtype else torch.float32, device=where
            )
        else:
            model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype or "auto")
            self.model = model.eval().requires_grad_(False).to(where)
            self.processor = AutoProcessor.from_pretrained(name, revision=revision)
        self._tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        # A VisionQwen's processor knows which token ends a turn.
        own = getattr(self.processor, "end_of_turn_token_id", None)
        self._ends = list(dict.fromkeys([*ends, *([own] if isinstance(own, int) else [])])) or [
            self._tokenizer.eos_token_id
        ]

    def ask(self, questions: Iterator[Question], keep: Keep, fail: Fail) -> None:
        """Asks all questions, those of one prompt together."""
        while batch := list(islice(questions, self.batch_size)):
            by_prompt: dict[str, list[tuple[Question, Any]]] = {}
            for question in batch:
                try:
                    picture = sent_picture(question.stored, self.image_side, question.prompt.whole_cells)
                except UnreadablePictureError as error:
                    fail(question, str(error))
                    continue
                by_prompt.setdefault(question.prompt.name, []).append((question, picture))
            for together in by_prompt.values():
                for (question, _), answer in zip(together, self._answer(together), strict=True):
                    keep(question, answer)

    @torch.inference_mode()
    def _answer(self, asked: list[tuple[Question, Any]]) -> list[Answer]:
        started = time.monotonic()
        prompt = asked[0][0].prompt
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt.text}]}]
            for _, picture in asked
        ]
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device)
        drawn: dict[str, Any] = {"do_sample": False}
        if self.sampling.temperature > 0:
            torch.manual_seed(self.sampling.seed_of(asked[0][0].picture, asked[0][0].sample))
            drawn = {"do_sample": True, "temperature": self.sampling.temperature, "top_k": 0}
            drawn["top_p"] = 1.0 if self.sampling.top_p is None else self.sampling.top_p
        generated = self.model.generate(
            **inputs,
            **drawn,
            # A model may ask for beams of its own.
            num_beams=1,
            max_new_tokens=self.max_new_tokens or prompt.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0],
        )
        length = inputs["input_ids"].shape[1]
        seconds = (time.monotonic() - started) / len(asked)
        answers = []
        for row, read in zip(generated[:, length:].tolist(), inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in self._ends), None)
            written = row if end is None else row[:end]
            text = self._tokenizer.decode(written, skip_special_tokens=True).strip()
            answers.append(Answer(text, "length" if end is None else "stop", read, len(written), seconds))
        return answers
