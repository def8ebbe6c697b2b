"""The command `vlm-peft`, also `python -m vlm_peft`: train, score, use and ship.

Stage: last; calls everything below. torch and transformers are imported when a command needs them, so that --help and
errors of use come at once.
"""

import argparse
import difflib
import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import __version__
from .console import quiet_imports, run_script

PROGRAM = "vlm-peft"
CLIP = "openai/clip-vit-base-patch32"
MODEL_HELP = "adapter folder, folder of a full save, or Hub id of either"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message if it is not one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        PROGRAM, description="Train, score, use and ship a vision-language model.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            run.__name__.rstrip("_"),
            help=summary,
            description=inspect.cleandoc(run.__doc__),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    # They read their options themselves: those of a training are some 250.
    by_themselves = {
        train: "fine-tune: train, score, report",
        eval_: "generate for a held-out split with a trained model, and score it",
        score: "score predictions that anybody made",
        sweep: "an adapter's scale from 0 to 1: the new task against the old ones",
        inspect_: "what the model will really see in training, token by token",
        doctor: "the checks before a training run, and what the run will take",
        synthesize: "a larger model writes the texts of pictures: ask, filter, write a data set",
    }
    for run, summary in by_themselves.items():
        command(run, summary)

    add = command(caption, "describe pictures, or ask about each; JSON lines").add_argument
    add("model", help=MODEL_HELP)
    add("images", nargs="+", metavar="image", help="picture, folder of pictures, or - for paths on standard input")
    add("--question", help="ask this about each picture instead of describing it")
    add("--instruction", help="what the user says (default: as in training)")
    add("--batch_size", type=_count, default=16, metavar="B", help="pictures at a time (default: 16)")
    add("--num_beams", type=_count, metavar="K", help="1 is greedy (default: as after training)")
    _add_model_options(add)

    add = command(detect, "boxes of named things in pictures; JSON lines").add_argument
    add("model", help=f"{MODEL_HELP}, of the grounding task")
    add("images", nargs="+", metavar="image", help="picture, folder of pictures, or - for paths on standard input")
    add("names", help="what to look for: 'dog; red ball'")
    add("--draw", type=Path, metavar="FOLDER", help="also write copies of the pictures there, with their boxes")
    add("--instruction", help="what the user says before the names (default: as in training)")
    add("--batch_size", type=_count, default=16, metavar="B", help="pictures at a time (default: 16)")
    add("--num_beams", type=_count, metavar="K", help="1 is greedy (default: as after training)")
    _add_model_options(add)

    add = command(chat, "a conversation about pictures").add_argument
    add("model", help=MODEL_HELP)
    add("images", nargs="*", metavar="image", help="pictures to begin with")
    add("--instruction", help="what an empty line asks (default: as in training)")
    _add_model_options(add)

    add = command(demo, "a web page to try the model").add_argument
    add("model", help=f"{MODEL_HELP}; or a CLIP")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_port, help="(default: the first free one from 7860)")
    add("--share", type=_flag, default=False, metavar="true|false", help="public link through Gradio (default: false)")
    add("--search", metavar="FOLDER", help="of pictures, which a tab of the page finds by a text")
    add("--clip", default=CLIP, help="that searches, where the model is a VisionQwen (default: %(default)s)")
    add("--index", metavar="FOLDER", help="where indexes are kept (default: in the data sets' cache)")
    _add_model_options(add)

    add = command(search, "pictures of a folder by a text").add_argument
    add("folder", help="folder of pictures")
    add("text", help="what to look for: 'a red bicycle'")
    add("--model", default=CLIP, help="CLIP or SigLIP: folder, adapter, or Hub id of either (default: %(default)s)")
    add("--vision", help="where an adapter's CLIP lies when it moved: folder or Hub id")
    _add_machine(add)
    add("--count", type=_count, default=10, metavar="K", help="results (default: 10)")
    add("--json", action="store_true", help="a JSON object a line")
    add("--html", metavar="FILE", help="also write one page of thumbnails")
    add("--export", metavar="FILE", help="also write the whole index as parquet, for a vector engine")
    add("--index", metavar="FOLDER", help="where indexes are kept (default: in the data sets' cache)")

    made = command(classify, "a label for each picture, by the labels' names; JSON lines")
    made.set_defaults(dtype="float32", max_new_tokens=None)
    add = made.add_argument
    add("model", help="CLIP, SigLIP or VisionQwen: folder, adapter, or Hub id of either")
    add("images", nargs="+", metavar="image", help="picture, folder of pictures, or - for paths on standard input")
    add("--labels", nargs="+", required=True, metavar="LABEL", help="names to choose from")
    add("--templates", nargs="+", metavar="TEXT", help="a CLIP's texts with {} for the label ('a photo of a {}.')")
    add("--instruction", help="what a VisionQwen is asked (default: as in training)")
    _add_bases(add)
    _add_machine(add)

    add = command(export, "a folder for others: stock Llava, or LoRA merged").add_argument
    add("model", help=MODEL_HELP)
    add("output", type=Path, help="folder to be made")
    add("--to", choices=("llava", "merged"), required=True, help="see above")
    add("--scale", type=float, metavar="S", help="add so much of LoRA, 0 to 1: a point of vlm-peft sweep (default: 1)")
    _add_bases(add)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: as they are)")

    add = command(convert, "a base with pickled weights, as a folder with safetensors").add_argument
    add("model", metavar="base", help="folder, or Hub id")
    add("--to", type=Path, required=True, metavar="FOLDER", help="folder to be made")
    add("--revision", help="of a Hub id: branch, tag or commit (default: main)")

    add = command(push, "an adapter folder to the Hub").add_argument
    add("model", metavar="folder", type=Path, help="adapter folder, or a CLIP's merged one")
    add("repository", help="owner/name, or a name under your own user")
    add("--private", action=argparse.BooleanOptionalAction, help="of a new repository (default: the owner's default)")
    add("--revision", help="branch that is there already (default: main)")
    _add_bases(add)

    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        near = difflib.get_close_matches(arguments[0], commands.choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(commands.choices)}"
        parser.error(f"no command {arguments[0]!r}: {hint}")
    for run in by_themselves:
        name = run.__name__.rstrip("_")
        if arguments[:1] == [name]:
            return argparse.Namespace(command=name, run=run, arguments=arguments[1:])
    return parser.parse_args(arguments)


def _add_model_options(add) -> None:
    """Options of all commands that generate."""
    add("--max_new_tokens", type=_count, metavar="M", help="tokens of a text at most (default: as after training)")
    _add_bases(add)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator if there is one)")


def _add_machine(add) -> None:
    """Of commands that compare pictures with texts."""
    add("--batch_size", type=_count, default=64, metavar="B", help="pictures at a time (default: 64)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator if there is one)")


def _add_bases(add) -> None:
    add("--vision", help="where an adapter's encoder lies when it moved: folder or Hub id")
    add("--text", help="where an adapter's decoder lies when it moved: folder or Hub id")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text!r}")
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _quiet_loading() -> None:
    """Without it, a progress bar is drawn for each part of a model on every load."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _device(options: argparse.Namespace):
    """The device that a command's options name.

    Raises:
        ValueError: When it is not there.
    """
    import torch

    from .adapters.loading import default_device

    try:
        device = torch.device(options.device) if options.device else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {options.device} cannot be used here: {reason}") from error
    return device


def _load(options: argparse.Namespace):
    """Model, processor and settings that a command's options name; settings follow the options where these are given.

    Raises:
        FileNotFoundError, ValueError: See `loading`; or when the device is not there.
    """
    import torch

    from .adapters.loading import find_model, load_model
    from .tasks import TASK_FILE, TaskSettings

    _quiet_loading()
    device = _device(options)
    folder = find_model(options.model)
    dtype = getattr(torch, options.dtype)
    model, processor = load_model(folder, vision=options.vision, text=options.text, dtype=dtype, device=device)
    settings = TaskSettings.read(folder)
    if settings is None:
        settings = TaskSettings()
        print(f"{options.model} has no {TASK_FILE}: it is asked in this package's own words.", file=sys.stderr)
    if options.max_new_tokens:
        settings = replace(settings, max_new_tokens=options.max_new_tokens)
    return folder, model, processor, settings


def train(options: argparse.Namespace) -> int:
    """Fine-tunes a vision-language model on pictures with texts: the same run as recipes/sft.py in a clone."""
    started = time.monotonic()
    from .training.sft import main as fine_tune

    return fine_tune(options.arguments, started=started)


def eval_(options: argparse.Namespace) -> int:
    """Generates for a held-out split with a trained model, and scores it: as eval/run.py in a clone."""
    from .commands.evaluate import main as evaluate

    return evaluate(options.arguments, f"{PROGRAM} eval")


def score(options: argparse.Namespace) -> int:
    """Scores predictions that anybody made: as eval/score.py in a clone."""
    from .commands.score import main as score_files

    return score_files(options.arguments, f"{PROGRAM} score")


def sweep(options: argparse.Namespace) -> int:
    """Scores the new task and the old ones at several scales of an adapter; nothing is trained."""
    from .commands.sweep import main as sweep_scales

    return sweep_scales(options.arguments, f"{PROGRAM} sweep")


def synthesize(options: argparse.Namespace) -> int:
    """Lets a larger model write texts about pictures, and keeps those to train on: recipes/synthesize.py of a clone."""
    from .teacher.synthesize import main as make_data

    return make_data(options.arguments, f"{PROGRAM} synthesize")


def inspect_(options: argparse.Namespace) -> int:
    """Shows what the model will really see: rows laid out for training. As eval/inspect_data.py in a clone."""
    from .commands.inspect import main as show

    return show(options.arguments, f"{PROGRAM} inspect")


def caption(options: argparse.Namespace) -> int:
    """Describes pictures, or answers a question about each: one JSON object a line, in the order of the pictures.

    {"image": "a.jpg", "caption": "..."}
    {"image": "a.jpg", "probabilities": {"cat": 0.9, "dog": 0.1}, "caption": "cat"}    of a model that names classes
    {"image": "b.jpg", "error": "..."}      for a picture that cannot be read; the exit status is then 1

    find pictures -name '*.jpg' | vlm-peft caption outputs/demo - > captions.jsonl
    """
    from .commands.caption import ask, caption_pictures, find_pictures

    paths = find_pictures(options.images, sys.stdin.buffer)
    _, model, processor, settings = _load(options)

    from tqdm.auto import tqdm

    from .tasks import find_kind

    kind = find_kind(settings.task)
    if kind.hint and (options.question is None) == (kind.question is None):
        print(kind.hint, file=sys.stderr)
    status = 0
    records = caption_pictures(
        model,
        processor,
        paths,
        ask(settings, options.question, options.instruction),
        batch_size=options.batch_size,
        max_new_tokens=settings.max_new_tokens,
        num_beams=options.num_beams or settings.num_beams,
        choices=() if options.question else settings.choices,
        temperature=settings.temperature,
    )
    total = len(paths) if isinstance(paths, list) else None
    # Without a terminal, disable=None draws no bar.
    for record in tqdm(records, total=total, unit="picture", disable=None):
        # ASCII only: a file name may be no text, and some readers take U+2028 for the end of a line.
        print(json.dumps(record), flush=True)
        status |= "error" in record
    return status


def detect(options: argparse.Namespace) -> int:
    """Finds named things in pictures, by a model of the grounding task: one JSON object a line, in order.

    {"image": "a.jpg", "boxes": [{"label": "dog", "box": [12, 40, 300, 512], "confidence": 0.93}]}
    {"image": "b.jpg", "boxes": []}         nothing that was asked for is there
    {"image": "c.jpg", "error": "..."}      for a picture that cannot be read; the exit status is then 1

    A box is [x1, y1, x2, y2] in pixels of the picture as it is seen, turned as its EXIF data say: x1, y1 is its first
    pixel, x2, y2 the one after its last. Its confidence, 0 to 1, is the model's probability of the label times the
    mean (geometric) of those of the tokens of its box.

    vlm-peft detect outputs/demo_grounding pictures "dog; red ball" --draw found
    """
    from .adapters.loading import find_model
    from .commands.caption import find_pictures
    from .commands.detect import detect_pictures
    from .tasks import TASK_FILE, TaskSettings, find_kind
    from .tasks.grounding import names_questions

    # A folder's name may well be that of a thing.
    if os.path.isfile(options.names):
        raise ValueError(f'Expected names after the pictures, as "dog; red ball", got the file {options.names}.')
    paths = find_pictures(options.images, sys.stdin.buffer)
    stored = TaskSettings.read(find_model(options.model))
    # Who removed the file asks for what it was trained to do.
    if stored is not None and find_kind(stored.task).spans is None:
        raise ValueError(
            f"{options.model} answers no boxes: its {TASK_FILE} says that it was trained for the task {stored.task}."
        )
    questions = names_questions(options.names, options.instruction or (stored.instruction if stored else None))
    _, model, processor, settings = _load(options)

    from tqdm.auto import tqdm

    status = 0
    records = detect_pictures(
        model,
        processor,
        paths,
        questions,
        batch_size=options.batch_size,
        max_new_tokens=settings.max_new_tokens,
        num_beams=options.num_beams or settings.num_beams,
        draw=options.draw,
    )
    total = len(paths) if isinstance(paths, list) else None
    # Without a terminal, disable=None draws no bar.
    for record in tqdm(records, total=total, unit="picture", disable=None):
        # ASCII only: a file name may be no text.
        print(json.dumps(record), flush=True)
        status |= "error" in record
    return status


def chat(options: argparse.Namespace) -> int:
    """A conversation about pictures on the terminal; answers come word by word.

    /image PATH adds a picture, /reset forgets pictures and turns, /quit or end of file ends. An empty line asks what
    the model was asked in training. Questions can also be piped in, one a line.
    """
    from .commands.caption import ask, find_pictures

    pictures = find_pictures(options.images, sys.stdin.buffer)
    _, model, processor, settings = _load(options)

    from .commands.chat import Conversation
    from .commands.chat import chat as run_chat

    conversation = Conversation(model, processor, settings.max_new_tokens)
    for path in pictures:
        conversation.add_picture(path)
    run_chat(conversation, processor, ask(settings, instruction=options.instruction))
    return 0


def search(options: argparse.Namespace) -> int:
    """Finds the pictures of a folder that are nearest to a text, the nearest first: similarity and path.

    The folder's index is built once; after that, only new and changed pictures are encoded.

    vlm-peft search pictures "a red bicycle" --html found.html

    --export writes id and vector of every picture as parquet, which DuckDB and LanceDB read, and Milvus imports.
    """
    from .commands.search import open_index, printable, search_text, write_page
    from .contrastive.folder import load_clip
    from .contrastive.search import export_vectors

    paths = _searched(options.folder)
    _quiet_loading()
    encoder = load_clip(options.model, base=options.vision, device=_device(options))
    index = open_index(encoder, options.folder, paths, options.index, options.batch_size)
    found = search_text(encoder, index, options.text, options.count)
    for each in found:
        # ASCII only: a file name may be no text.
        shown = json.dumps({"image": each.path, "score": round(each.score, 6)})
        print(shown if options.json else f"{each.score:.3f}  {printable(each.path)}")
    if options.html:
        write_page(options.html, options.text, found)
    if options.export:
        export_vectors(index, options.export)
    return 0


def _searched(folder: str) -> list[str]:
    """Paths of the pictures in a folder.

    Raises:
        FileNotFoundError: When it is none, or holds none.
    """
    from .commands.caption import find_pictures

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"Expected a folder of pictures, and {folder} is none.")
    return list(find_pictures([folder], sys.stdin.buffer))


def classify(options: argparse.Namespace) -> int:
    """Gives each picture one of some labels, by their names alone: one JSON object a line, in order.

    {"image": "a.jpg", "label": "cat", "probability": 0.98, "probabilities": {"cat": 0.98, "dog": 0.02}}
    {"image": "b.jpg", "error": "..."}      for a picture that cannot be read; the exit status is then 1

    A CLIP takes the label that is nearest to the picture; a VisionQwen the one that it would answer.

    vlm-peft classify openai/clip-vit-base-patch32 pictures --labels cat dog
    vlm-peft classify outputs/captions pictures --labels cat dog --instruction "Which animal is it?"
    """
    from .commands.caption import find_pictures
    from .commands.classify import TEMPLATE, by_captioner, by_clip, classify_pictures, is_captioner
    from .contrastive.encoder import check_labels

    paths = find_pictures(options.images, sys.stdin.buffer)
    check_labels(options.labels)
    _quiet_loading()
    if is_captioner(options.model):
        if options.templates:
            raise ValueError("--templates are for a CLIP: a VisionQwen is asked in one way, see --instruction.")
        _, model, processor, settings = _load(options)
        classifier = by_captioner(model, processor, settings, options.labels, options.instruction)
    else:
        from .contrastive.folder import load_clip

        if options.instruction:
            raise ValueError("--instruction is for a VisionQwen: a CLIP compares pictures with texts, see --templates.")
        encoder = load_clip(options.model, base=options.vision, device=_device(options))
        classifier = by_clip(encoder, options.labels, options.templates or [TEMPLATE])
    status = 0
    for record in classify_pictures(classifier, paths, options.labels, options.batch_size):
        # ASCII only: a file name may be no text.
        print(json.dumps(record), flush=True)
        status |= "error" in record
    return status


def demo(options: argparse.Namespace) -> int:
    """Serves a page to try a model: pictures are described and asked about, beside the answers from before fine-tuning.

    Labels that are typed in get their probabilities, by a VisionQwen or a CLIP; with --search FOLDER a CLIP finds its
    pictures by a text. The page listens on this machine only (--host changes that), loads nothing from elsewhere and
    reports nothing. Needs Gradio: pip install "vlm-peft[demo]"
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs Gradio: pip install "vlm-peft[demo]"')
    import torch

    from .commands.classify import is_clip
    from .commands.search import open_index
    from .commands.web_demo import ClipAnswers, FolderSearch, PictureAnswers, find_examples, make_page, serve_page
    from .contrastive.folder import load_clip

    _quiet_loading()
    paths = _searched(options.search) if options.search else []
    answers: ClipAnswers | PictureAnswers
    if is_clip(options.model):
        folder = Path(options.model).expanduser()
        encoder = load_clip(options.model, base=options.vision, device=_device(options))
        answers = ClipAnswers(encoder)
    else:
        # The projector that the adapter replaces is drawn anew on every load; the page shows the same one every time.
        torch.manual_seed(0)
        folder, model, processor, settings = _load(options)
        answers = PictureAnswers(model, processor, settings)
        if paths:
            encoder = load_clip(options.clip, device=_device(options))
    search = None
    if paths:
        search = FolderSearch(encoder, open_index(encoder, options.search, paths, options.index, 64), options.search)
    page = make_page(answers, folder.resolve().name, find_examples(folder), search)
    serve_page(page, options.host, options.port, options.share)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Checks a training configuration and this machine, and predicts time, memory and size of the run.

    vlm-peft doctor --config recipes/configs/demo.yaml --learning_rate 1e-4     any option of the recipe

    The exit status is 0 when the run can start, 1 when something is in its way, 2 for options that are none.
    """
    from .commands.doctor import main as examine

    _quiet_loading()
    return examine(options.arguments)


def export(options: argparse.Namespace) -> int:
    """Writes a trained model as a folder for others. What was written is loaded again and compared with its source.

    --to llava     a stock LlavaForConditionalGeneration with its processor: loads without this package
    --to merged    a full save with LoRA added to the weights: loads after `import vlm_peft`; of a CLIP's adapter a
                   plain checkpoint, which stock transformers loads
    """
    import torch

    from .adapters import export as exporting
    from .adapters.loading import find_model
    from .commands.classify import is_clip

    _quiet_loading()
    if is_clip(options.model):
        from .contrastive.card import describe_merged
        from .contrastive.folder import save_merged

        if options.to != "merged" or options.text or options.dtype or options.scale is not None:
            raise ValueError(f"{options.model} is a CLIP: expected --to merged, without --text, --scale and --dtype.")
        exporting.check_output(options.output)
        written = save_merged(options.model, options.output, base=options.vision)
        describe_merged(options.model, written)
        print(f"Written: {written}")
        return 0
    write = exporting.export_llava if options.to == "llava" else exporting.export_merged
    dtype = getattr(torch, options.dtype) if options.dtype else None
    bases = {"vision": options.vision, "text": options.text}
    written = write(find_model(options.model), options.output, **bases, dtype=dtype, scale=options.scale)
    print(f"Written and loaded again: {written}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Writes the weights of an encoder or decoder that has only pytorch_model.bin as safetensors, with its other files.

    The pickle is read in a process of its own by torch.load(weights_only=True), which takes tensors and nothing else;
    what was written is read again and compared.

    vlm-peft convert openai/clip-vit-base-patch32 --to clip
    """
    from .hub.convert import convert_base

    print(f"Written and compared: {convert_base(options.model, options.to, revision=options.revision)}")
    return 0


def push(options: argparse.Namespace) -> int:
    """Pushes an adapter folder to the Hub in one commit, with its card and scores, without local paths.

    Needs a token with write permission: `hf auth login`, or HF_TOKEN. Bases that lie in local folders need their Hub
    ids: --vision and --text; a CLIP's adapter has the first one only, and its merged checkpoint none.
    """
    from .contrastive.card import clip_card_for_others
    from .hub.models import is_clip_folder, push_adapter
    from .report.model_card import card_for_others

    address = push_adapter(
        options.model,
        options.repository,
        card=clip_card_for_others if is_clip_folder(options.model) else card_for_others,
        private=options.private,
        revision=options.revision,
        vision=options.vision,
        text=options.text,
    )
    print(address)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 (some pictures failed), 2 (an error of use) or 130 (Ctrl-C)."""
    options = parse_arguments(arguments)
    quiet_imports()
    return run_script(lambda: options.run(options), f"{PROGRAM} {options.command}")


if __name__ == "__main__":
    sys.exit(main())
