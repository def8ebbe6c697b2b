"""Web page: a picture, what the model says about it, and what it said before fine-tuning.

Stage: trained model -> a Gradio page on this machine. Needs the extra `demo`.
"""

# transformers declares sub-configurations as `dict | PreTrainedConfig | None`.
# mypy: disable-error-code="union-attr"

import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import unquote

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio
import torch
from gradio.data_classes import ImageData
from peft import PeftModel

from ..data.pictures import UnreadablePictureError, open_picture
from ..evaluation.choices import choice_log_probs
from ..evaluation.generation import generate_texts
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks import TaskSettings, find_kind
from ..tasks.example import picture_turn
from .caption import ask

MAX_EXAMPLES = 12
MOST_CLASSES = 5

MAX_UPLOAD = 50_000_000
"""Bytes of a picture's file; larger uploads are refused while they arrive."""


class PictureAnswers:
    """Answers about one picture, from after and from before fine-tuning.

    Args:
        model ([`VisionQwen`] or `PeftModel`): In evaluation mode; a full save has no "before".
        processor ([`VisionQwenProcessor`]): Saved with the model.
        settings ([`~vlm_peft.tasks.TaskSettings`]): How the model was asked in training, and decoding.
    """

    def __init__(self, model: VisionQwen | PeftModel, processor: VisionQwenProcessor, settings: TaskSettings):
        self._model = model
        self._processor = processor
        self.settings = settings
        # Switching the adapter off concerns the whole model, and pages are answered in several threads.
        self._lock = threading.Lock()

    @property
    def has_before(self) -> bool:
        """Whether the model has an adapter that can be switched off."""
        return isinstance(self._model, PeftModel)

    @property
    def parts(self) -> str:
        """What the model was made of, without the folders of this machine."""
        config = self._model.config
        names = [config.vision_name_or_path, config.text_name_or_path]
        vision, text = (Path(name).name if name and Path(name).is_absolute() else name for name in names)
        vision, text = vision or config.vision_config.model_type, text or config.text_config.model_type
        return f"Fine-tuned with vlm_peft from the encoder {vision} and the decoder {text}."

    def __call__(self, picture: str | Path, question: str) -> Iterator[tuple[str, str]]:
        """Describes a picture, or answers a question about it.

        Args:
            picture (`str` or `Path`): File.
            question (`str`): Empty for a description.

        Yields:
            `(after, before)`: First with an empty `before`, then with both.

        Raises:
            UnreadablePictureError: When the picture cannot be read.
        """
        image_processor = self._processor.image_processor
        pixel_values = image_processor(open_picture(Path(picture)), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = base_model(self._model).model.get_vision_features(pixel_values.to(self._model.device))
        after = self._generate(features, question)
        yield after, ""
        if isinstance(self._model, PeftModel):
            yield after, self._generate(features, question, is_before=True)

    def _generate(self, features: torch.Tensor, question: str, is_before: bool = False) -> str:
        model = self._model
        with self._lock, model.disable_adapter() if is_before and isinstance(model, PeftModel) else nullcontext():
            if self.settings.choices and not question.strip():
                return self._choose(features)
            return generate_texts(
                model,
                self._processor,
                [picture_turn(ask(self.settings, question.strip() or None))],
                [[0]],
                lambda _: {"image_features": features},
                max_new_tokens=self.settings.max_new_tokens,
                num_beams=self.settings.num_beams,
            )[0]

    def _choose(self, features: torch.Tensor) -> str:
        """The likeliest classes, one a line."""
        choices, prompt = self.settings.choices, picture_turn(ask(self.settings))
        found = choice_log_probs(
            self._model, self._processor, [prompt], [[0]], lambda _: {"image_features": features}, choices
        )
        shares = (found[0] / self.settings.temperature).softmax(-1).tolist()
        likeliest = sorted(zip(choices, shares, strict=True), key=lambda each: -each[1])[:MOST_CLASSES]
        return "\n".join(f"{name} ({share:.0%})" for name, share in likeliest)


def find_examples(folder: Path) -> list[tuple[str, str, str]]:
    """Held-out pictures that a training run left in its folder.

    Args:
        folder (`Path`): Of the run; `eval/<split>/pictures` and `eval/<split>/predictions.jsonl` are read.

    Returns:
        `list[tuple[str, str, str]]`: Picture file, question (empty for captions) and references, one a line; from all
            splits in turn, [`MAX_EXAMPLES`] at most.
    """
    splits = []
    for pictures in sorted(folder.glob("eval/*/pictures")):
        rows = {}
        predictions = pictures.with_name("predictions.jsonl")
        for line in predictions.read_text(encoding="utf-8").split("\n") if predictions.is_file() else ():
            if line.strip():
                row = json.loads(line)
                rows[str(row["id"])] = row
        found = []
        for file in sorted(pictures.glob("*.webp")):
            row = rows.get(unquote(file.stem), {})
            found.append((str(file), row.get("question") or "", "\n".join(row.get("references") or [])))
        splits.append(found)
    in_turn = [
        found[place] for place in range(max(map(len, splits), default=0)) for found in splits if place < len(found)
    ]
    return in_turn[:MAX_EXAMPLES]


def make_page(answers: PictureAnswers, title: str, examples: list[tuple[str, str, str]]) -> gradio.Blocks:
    """The page, not served yet.

    Args:
        answers ([`PictureAnswers`]): Called for every question; the API's `/answer`.
        title (`str`): Of the page.
        examples (`list[tuple[str, str, str]]`): Of [`find_examples`].
    """

    def answer(picture: str | None, question: str = ""):
        if picture is None:
            raise gradio.Error("Choose a picture first.", print_exception=False)
        try:
            yield from answers(picture, question)
        except (UnreadablePictureError, ValueError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def describe(picture: str | None):
        yield from answer(picture)

    hint = find_kind(answers.settings.task).hint
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}\n{answers.parts}")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    label=f"Picture (up to {MAX_UPLOAD // 10**6} MB)",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=360,
                )
                # Gradio's own would decode what comes: of any size, and EPS by Ghostscript.
                picture.preprocess = _uploaded  # type: ignore[method-assign, assignment]
                question = gradio.Textbox(label="Question", placeholder=ask(answers.settings), info=hint)
                with gradio.Row():
                    describing = gradio.Button("Describe", variant="primary")
                    asking = gradio.Button("Ask")
            with gradio.Column():
                after = gradio.Textbox(label="After fine-tuning", lines=3)
                before = gradio.Textbox(
                    label="Before fine-tuning",
                    info="The same encoder and decoder, without LoRA and with a projector that has learnt nothing.",
                    lines=3,
                    visible=answers.has_before,
                )
                references = gradio.Textbox(label="References", lines=5, interactive=False, visible=bool(examples))
        outputs = [after, before]
        asking.click(answer, [picture, question], outputs, api_name="answer")
        question.submit(answer, [picture, question], outputs, api_visibility="private")
        describing.click(describe, [picture], outputs, api_visibility="private")
        # What was said about another picture must not stand beside this one.
        picture.change(js="() => ['', '']", outputs=outputs, api_visibility="private")
        picture.input(js="() => ''", outputs=[references], api_visibility="private")
        if examples:
            gradio.Examples(
                [list(example) for example in examples],
                [picture, question, references],
                label="Held-out pictures of the training run",
                examples_per_page=MAX_EXAMPLES,
                visible_columns=[0],
            )
    return page


def _uploaded(picture: ImageData | None) -> str | None:
    """The file of a picture, which Gradio has checked to be an upload."""
    if picture is not None and picture.path is None:
        raise gradio.Error("Upload the picture as a file.", print_exception=False)
    return None if picture is None else picture.path


def serve_page(page: gradio.Blocks, host: str, port: int | None, share: bool) -> None:
    """Serves the page until Ctrl-C.

    Args:
        page (`gradio.Blocks`): Of [`make_page`].
        host (`str`): Address to listen on.
        port (`int`, *optional*): The first free one from 7860 without it.
        share (`bool`): Opens a public link through Gradio's servers, too.

    Raises:
        OSError: When the port is taken.
        KeyboardInterrupt: At the end.
    """
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=MAX_UPLOAD,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
    )
    print(f"The page is at {public or local} (Ctrl-C ends it).", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
