"""Web page: a picture, what the model says about it and said before fine-tuning; labels; the search of a folder.

Stage: trained model -> a Gradio page on this machine, with a tab for each thing that the model can do. Needs the extra
`demo`.
"""

# transformers declares sub-configurations as `dict | PreTrainedConfig | None`.
# mypy: disable-error-code="union-attr"

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio
import torch
from gradio.data_classes import ImageData
from peft import PeftModel
from PIL.Image import Image

from ..contrastive.encoder import DualEncoder, check_labels
from ..contrastive.search import PictureIndex
from ..data.pictures import ALONE, UnreadablePictureError, give_memory_back, open_picture
from ..evaluation.choices import choice_log_probs
from ..evaluation.generation import generate_texts
from ..json_files import parse_json
from ..metrics.boxes import LabelledBox
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..report.charts import box_overlay
from ..report.gallery import Thumbnail, thumbnail
from ..report.pages import render
from ..tasks import TaskSettings, find_kind
from ..tasks.example import picture_turn
from ..tasks.grounding import names_questions
from .caption import ask
from .classify import TEMPLATE, by_captioner, by_clip
from .detect import Found, detect
from .search import result_cards, search_text

MAX_EXAMPLES = 12
MOST_CLASSES = 5
MOST_FOUND = 24
SHOWN_PIXELS = 768
"""Longest side of a picture under boxes."""

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
    def has_boxes(self) -> bool:
        """Whether the model was trained to answer boxes."""
        return find_kind(self.settings.task).spans is not None

    @property
    def parts(self) -> str:
        """What the model was made of, without the folders of this machine."""
        config = self._model.config
        vision = _public_name(config.vision_name_or_path) or config.vision_config.model_type
        text = _public_name(config.text_name_or_path) or config.text_config.model_type
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
        with ALONE:
            features = self._see(open_picture(Path(picture)))
        after = self._generate(features, question)
        yield after, ""
        if isinstance(self._model, PeftModel):
            yield after, self._generate(features, question, is_before=True)

    def classify(self, picture: str | Path, labels: Sequence[str]) -> dict[str, float]:
        """The probability of each label as the answer to what the model was asked in training.

        Args:
            picture (`str` or `Path`): File.
            labels (`Sequence[str]`): To choose from.

        Raises:
            UnreadablePictureError: When the picture cannot be read.
            ValueError: For labels that cannot be used.
        """
        check_labels(labels)
        with ALONE, self._lock:
            shown = open_picture(Path(picture))
            found = by_captioner(self._model, self._processor, self.settings, labels)([shown])[0]
        return dict(zip(labels, found.tolist(), strict=True))

    def detect(self, picture: str | Path, names: str) -> Iterator[tuple[str, str]]:
        """Looks for named things.

        Args:
            picture (`str` or `Path`): File.
            names (`str`): With semicolons between them.

        Yields:
            `(after, before)`: The picture with its boxes, as HTML; first with an empty `before`, then with both.

        Raises:
            UnreadablePictureError: When the picture cannot be read.
            ValueError: For a text without names.
        """
        questions = names_questions(names, self.settings.instruction)
        with ALONE:
            opened = open_picture(Path(picture))
            features, shown = self._see(opened), thumbnail(opened, SHOWN_PIXELS)
            del opened
        after = _boxes_page(shown, self._detect(features, questions))
        yield after, ""
        if self.has_before:
            yield after, _boxes_page(shown, self._detect(features, questions, is_before=True))

    def _see(self, picture: Image) -> torch.Tensor:
        """Vision features `(1, N_v, D_v)`."""
        pixel_values = self._processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return base_model(self._model).model.get_vision_features(pixel_values.to(self._model.device))

    def _alone(self, is_before: bool) -> ExitStack:
        """The model for this thread alone, with its adapter or without."""
        with ExitStack() as held:
            held.enter_context(self._lock)
            if is_before and isinstance(self._model, PeftModel):
                held.enter_context(self._model.disable_adapter())
            return held.pop_all()

    def _detect(self, features: torch.Tensor, questions: dict[str, str], is_before: bool = False) -> Found:
        decoding = {"max_new_tokens": self.settings.max_new_tokens, "num_beams": self.settings.num_beams}
        with self._alone(is_before):
            fetch = {"image_features": features}
            return detect(self._model, self._processor, questions, lambda _: fetch, 1, **decoding)[0]

    def _generate(self, features: torch.Tensor, question: str, is_before: bool = False) -> str:
        model = self._model
        with self._alone(is_before):
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


class ClipAnswers:
    """What a CLIP can say about a picture: which of some labels is nearest.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): Merged.
    """

    def __init__(self, encoder: DualEncoder):
        self._encoder = encoder

    @property
    def parts(self) -> str:
        """What the model was made of, without the folders of this machine."""
        return f"Compares pictures with texts; made from {_public_name(self._encoder.config.base_name_or_path)}."

    def classify(self, picture: str | Path, labels: Sequence[str], template: str = TEMPLATE) -> dict[str, float]:
        """The probability of each label, see [`~vlm_peft.commands.classify.by_clip`].

        Args:
            picture (`str` or `Path`): File.
            labels (`Sequence[str]`): To choose from.
            template (`str`, *optional*): With `{}` where the label goes.

        Raises:
            UnreadablePictureError: When the picture cannot be read.
            ValueError: For labels or a template that cannot be used.
        """
        with ALONE:
            found = by_clip(self._encoder, labels, [template])([open_picture(Path(picture))])[0]
        return dict(zip(labels, found.tolist(), strict=True))


class FolderSearch:
    """The pictures of a folder by a text, as HTML.

    Args:
        encoder ([`~vlm_peft.contrastive.encoder.DualEncoder`]): Of the index.
        index ([`~vlm_peft.contrastive.search.PictureIndex`]): Of the folder.
        folder (`str` or `Path`): Its name and what lies in it are shown, and not where it lies.
    """

    def __init__(self, encoder: DualEncoder, index: PictureIndex, folder: str | Path):
        self._encoder, self._index, self._folder = encoder, index, folder

    @property
    def about(self) -> str:
        """What is searched."""
        return f"{len(self._index):,} pictures of the folder {Path(self._folder).resolve().name}"

    def __call__(self, text: str) -> str:
        """The nearest pictures, [`MOST_FOUND`] at most.

        Args:
            text (`str`): What is looked for.

        Raises:
            ValueError: For a text that is empty or too long.
        """
        found = search_text(self._encoder, self._index, text, MOST_FOUND)
        with ALONE:
            return result_cards(found, self._folder)


def _boxes_page(shown: Thumbnail, found: Found) -> str:
    """A picture with what was found in it, as HTML."""
    named = [LabelledBox(f"{box.label} {confidence:.2f}", box.box) for box, confidence in found.boxes]
    said = "; ".join(f"{box.label} {confidence:.2f}" for box, confidence in found.boxes) or "Nothing was found."
    if found.unread:
        said += f" Also written: {'; '.join(found.unread)}"
    # Of boxes that lie on each other, the surest is drawn last.
    drawn = box_overlay(named[::-1], [], shown.width, shown.height)
    return render("boxes.html.jinja", picture=shown, said=said, drawn=drawn)


def typed_labels(text: str) -> list[str]:
    """Labels as they are typed in: one a line, or on one line with commas between.

    Args:
        text (`str`): Of the field.
    """
    parts = text.split("\n") if "\n" in text.strip() else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def _public_name(name: str | None) -> str | None:
    """A base's name without the folders of this machine."""
    return Path(name).name if name and Path(name).is_absolute() else name


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
                row = parse_json(line)
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


def make_page(
    answers: PictureAnswers | ClipAnswers,
    title: str,
    examples: list[tuple[str, str, str]],
    search: FolderSearch | None = None,
) -> gradio.Blocks:
    """The page, not served yet.

    Args:
        answers ([`PictureAnswers`] or [`ClipAnswers`]): What the model can do.
        title (`str`): Of the page.
        examples (`list[tuple[str, str, str]]`): Of [`find_examples`].
        search ([`FolderSearch`], *optional*): A tab more.
    """
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}\n{answers.parts}")
        with gradio.Tabs():
            if isinstance(answers, PictureAnswers) and answers.has_boxes:
                with gradio.Tab("Detect"):
                    _detect_tab(answers, examples)
            if isinstance(answers, PictureAnswers):
                with gradio.Tab("Describe"):
                    _describe_tab(answers, examples)
            with gradio.Tab("Classify"):
                _classify_tab(answers, [picture for picture, _, _ in examples])
            if search is not None:
                with gradio.Tab("Search"):
                    _search_tab(search)
    return page


def _describe_tab(answers: PictureAnswers, examples: list[tuple[str, str, str]]) -> None:
    """A picture and a question; the API's `/answer`."""

    def answer(picture: str | None, question: str = ""):
        yield from _answered(lambda: answers(_chosen(picture), question))

    def describe(picture: str | None):
        yield from answer(picture)

    hint = find_kind(answers.settings.task).hint
    with gradio.Row():
        with gradio.Column():
            picture = _picture_field()
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


def _detect_tab(answers: PictureAnswers, examples: list[tuple[str, str, str]]) -> None:
    """A picture and names of things; the API's `/detect`."""

    def detect(picture: str | None, names: str):
        yield from _answered(lambda: answers.detect(_chosen(picture), names))

    with gradio.Row():
        with gradio.Column():
            picture = _picture_field()
            names = gradio.Textbox(label="Names", info="With semicolons between them.", placeholder="dog; red ball")
            detecting = gradio.Button("Detect", variant="primary")
        with gradio.Column():
            after = gradio.HTML(label="After fine-tuning", show_label=True, container=True)
            before = gradio.HTML(
                label="Before fine-tuning", show_label=True, container=True, visible=answers.has_before
            )
    outputs = [after, before]
    detecting.click(detect, [picture, names], outputs, api_name="detect")
    names.submit(detect, [picture, names], outputs, api_visibility="private")
    # Boxes of another picture must not stay.
    picture.change(js="() => ['', '']", outputs=outputs, api_visibility="private")
    if examples:
        gradio.Examples(
            [list(example[:2]) for example in examples],
            [picture, names],
            label="Held-out pictures of the training run",
            examples_per_page=MAX_EXAMPLES,
            visible_columns=[0],
        )


def _classify_tab(answers: PictureAnswers | ClipAnswers, examples: list[str]) -> None:
    """A picture and labels that are typed in; the API's `/classify`."""

    def classify(picture: str | None, labels: str, *template: str):
        yield from _answered(lambda: iter([answers.classify(_chosen(picture), typed_labels(labels), *template)]))

    with gradio.Row():
        with gradio.Column():
            picture = _picture_field()
            labels = gradio.Textbox(
                label="Labels",
                info="One a line, or with commas between.",
                placeholder="cat, dog, bicycle",
                # What the model was trained to choose from.
                value="\n".join(answers.settings.choices) if isinstance(answers, PictureAnswers) else "",
                lines=3,
            )
            inputs: list = [picture, labels]
            if isinstance(answers, ClipAnswers):
                inputs.append(gradio.Textbox(TEMPLATE, label="Template", info="A text with {} for the label."))
            choosing = gradio.Button("Classify", variant="primary")
        with gradio.Column():
            shares = gradio.Label(label="Probabilities", num_top_classes=2 * MOST_CLASSES)
    choosing.click(classify, inputs, [shares], api_name="classify")
    # Null would stop the page's program: Gradio's labels read a field of it.
    picture.change(js="() => ({})", outputs=[shares], api_visibility="private")
    if examples:
        gradio.Examples(
            [[example] for example in examples],
            [picture],
            label="Held-out pictures of the training run",
            examples_per_page=MAX_EXAMPLES,
        )


def _search_tab(search: FolderSearch) -> None:
    """A text, and a folder's pictures; the API's `/search`."""

    def find(text: str):
        yield from _answered(lambda: iter([search(text)]))

    text = gradio.Textbox(label="Text", info=f"Searches {search.about}.", placeholder="a red bicycle")
    finding = gradio.Button("Search", variant="primary")
    found = gradio.HTML()
    finding.click(find, [text], [found], api_name="search")
    text.submit(find, [text], [found], api_visibility="private")


def _picture_field() -> gradio.Image:
    picture = gradio.Image(
        label=f"Picture (up to {MAX_UPLOAD // 10**6} MB)",
        type="filepath",
        sources=["upload", "clipboard"],
        height=360,
    )
    # Gradio's own would decode what comes: of any size, and EPS by Ghostscript.
    picture.preprocess = _uploaded  # type: ignore[method-assign, assignment]
    return picture


def _chosen(picture: str | None) -> str:
    if picture is None:
        raise gradio.Error("Choose a picture first.", print_exception=False)
    return picture


def _answered(answer: Callable[[], Iterator]) -> Iterator:
    """What is answered; what cannot be is said on the page."""
    try:
        yield from answer()
    except (UnreadablePictureError, ValueError) as error:
        raise gradio.Error(str(error), print_exception=False) from error


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
    give_memory_back()
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
