"""Options of a synthesis: pictures, teacher, what is asked, filters, and where the rows go."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser

from ..training.arguments import with_hints
from ..training.options import check_ranges, take_config

_NAME_AND_SPLIT = re.compile(r"(.+):([^:\[\]]+(?:\[[^\]]*\])?)")

SCOPES = ("none", "picture", "all")
"""Where near-duplicates are looked for: nowhere, among the answers about one picture, among all."""


@dataclass
class SynthesisOptions:
    """All that `recipes/synthesize.py` takes."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Pictures: a folder, a table, or a data set's folder or Hub id."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit or branch of a Hub id."})
    split: str = field(default="train", metadata={"help": "Which part; train[400:1600] is a part of a part."})
    stored_split: str | None = field(default=None, metadata={"help": "The one stored split, with --split_column."})
    split_column: str | None = field(default=None, metadata={"help": "Column that names each row's true split."})
    image_column: str = field(default="image", metadata={"help": "Column with the picture; of several the first."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative paths in that column begin."})
    limit: int | None = field(default=None, metadata={"help": "First so many rows only."})
    streaming: bool = field(
        default=False, metadata={"help": "Reads rows as they come: once to ask, once for CLIP, once to write."}
    )
    output_dir: str = field(default="outputs/synthetic", metadata={"help": "Gets the data set, and keeps the answers."})

    teacher: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct",
        metadata={"help": "Hub id or folder, or what a server calls it; runs in this process without a server."},
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Commit or branch of a Hub id."})
    base_url: list[str] = field(
        default_factory=list,
        metadata={"help": "Servers with OpenAI's interface that have the teacher; they share the work."},
    )
    serve: bool = field(
        default=False, metadata={"help": "Start `transformers serve` with the teacher here, and stop it at the end."}
    )
    api_key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable that holds the servers' key, if they want one."},
    )
    device: str | None = field(default=None, metadata={"help": "Of a teacher here and of CLIP: cpu, cuda:1, ..."})
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Of a teacher here: bfloat16, float32; as stored."}
    )

    prompts: list[str] = field(
        default_factory=lambda: ["caption_short"],
        metadata={"help": "Names or files of what is asked: caption_detailed, vqa, chat, boxes, mine.yaml, mine.txt."},
    )
    samples: int = field(default=1, metadata={"help": "Answers to each prompt about each picture."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Share of the probability that is drawn from."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of an answer; each prompt has its own."})
    seed: int = field(default=0, metadata={"help": "Each question gets its own from it."})
    image_side: int = field(default=1024, metadata={"help": "Pixels of the longer side of a picture as it is sent."})
    structured_output: bool = field(
        default=True,
        metadata={"help": "Send the JSON schema of an answer to servers; who refuses it is asked without."},
    )

    concurrency: int = field(default=8, metadata={"help": "Requests in flight at each server."})
    request_timeout: float = field(default=120.0, metadata={"help": "Seconds that a request may take."})
    request_tries: int = field(default=8, metadata={"help": "Of each question."})
    first_wait: float = field(
        default=1.0,
        metadata={"help": "Seconds before the second try; each further one waits twice as long, 60 s at most."},
    )
    batch_size: int = field(default=8, metadata={"help": "Questions at a time of a teacher in this process."})
    price: list[float] = field(
        default_factory=list, metadata={"help": "Of a million tokens read, and of a million written."}
    )

    min_words: int | None = field(default=None, metadata={"help": "Of an answer; prompts have their own."})
    max_words: int | None = field(default=None, metadata={"help": "Of an answer; prompts have their own."})
    english: bool = field(default=True, metadata={"help": "Reject answers that are not English."})
    duplicates: str = field(
        default="picture",
        metadata={"help": "Where near-duplicates of an answer are rejected.", "choices": list(SCOPES)},
    )
    duplicate_similarity: float = field(
        default=0.9, metadata={"help": "Share of word triples in common from which on two answers are the same."}
    )
    clip_model: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP that compares captions with pictures: Hub id, folder, adapter."}
    )
    clip_revision: str | None = field(default=None, metadata={"help": "Commit or branch of it."})
    clip_prefix: str = field(
        default="A photo depicts ",
        metadata={"help": "Before each text, as CLIPScore has it; empty after recipes/clip.py."},
    )
    clip_threshold: float | None = field(default=None, metadata={"help": "Least CLIPScore, 0 to 2.5."})
    clip_lowest_share: float | None = field(
        default=None, metadata={"help": "Share of the answers with the lowest CLIPScore that is rejected."}
    )
    clip_trusted: str | None = field(
        default=None,
        metadata={
            "help": "NAME:SPLIT of pictures with captions that are right: they set the threshold, see --clip_keep."
        },
    )
    clip_keep: float = field(default=0.95, metadata={"help": "Share of the trusted captions that the threshold keeps."})
    vectors_dir: str | None = field(
        default=None, metadata={"help": "Where CLIP's vectors of pictures are kept; the data sets' cache by default."}
    )
    evaluation_sets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME:SPLIT of sets that will be scored: their pictures are neither asked about nor accepted."
        },
    )

    push_to_hub: bool = field(default=False, metadata={"help": "Push the finished data set, in one commit."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "owner/name, with --push_to_hub."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Visibility of a new repository."})


_AT_LEAST_ONE = (
    "limit",
    "samples",
    "concurrency",
    "request_tries",
    "batch_size",
    "max_new_tokens",
    "image_side",
    "min_words",
    "max_words",
)


def parse_arguments(arguments: list[str], *, program: str = "synthesize.py") -> SynthesisOptions:
    """Command line and YAML file -> options.

    Args:
        arguments (`list[str]`): `--config FILE.yaml` and options, which override the file's.
        program (`str`, *optional*): Put before messages.

    Raises:
        SystemExit: For an unknown or missing option, and for a value of another kind or out of its range.
        OSError: When the file cannot be read.
    """
    kinds: Any = (SynthesisOptions,)
    parser = HfArgumentParser(
        kinds,
        prog=program,
        allow_abbrev=False,
        description="Let a larger model write the texts of pictures, and keep those that can be believed.",
        usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]  (--help lists the options)",
    )
    known = {each.name for each in fields(SynthesisOptions)}
    given = list(arguments)
    try:
        config = take_config(given, kinds)
        unknown = [name for name in config if name not in known]
        parser.set_defaults(**{name: value for name, value in config.items() if name in known})
        options, others = parser.parse_args_into_dataclasses(args=given, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{program}: {' '.join(str(error).split())}") from error
    unknown += [text.split("=")[0].lstrip("-") for text in others if text.startswith("--")] or others[:1]
    if unknown:
        raise SystemExit(f"{program}: unknown option: {with_hints(unknown, sorted(known))}.")
    for each in fields(options):
        # On the command line there is no other way to take back what the file says.
        if getattr(options, each.name) in ("none", "null") and each.default is None:
            setattr(options, each.name, None)
        elif getattr(options, each.name) in (["none"], ["null"]):
            setattr(options, each.name, [])
    try:
        check_ranges(options)
        _check(options)
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return options


def _check(options: SynthesisOptions) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    for name in ("request_timeout", "first_wait"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name)}, expected more than 0.")
    for name in ("duplicate_similarity", "clip_keep", "clip_lowest_share", "top_p"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, expected more than 0 and at most 1.")
    if options.temperature < 0:
        raise ValueError(f"temperature is {options.temperature}, expected at least 0.")
    if options.dataset_name is None:
        raise ValueError(
            "--dataset_name is missing: the pictures; give it on the command line or in the --config file."
        )
    if not options.prompts:
        raise ValueError("--prompts is empty: expected one or more names or files.")
    if options.samples > 1 and options.temperature == 0:
        raise ValueError("--samples above 1 needs a --temperature above 0: greedy answers are all the same.")
    if options.serve and options.base_url:
        raise ValueError("--serve starts a server here, and --base_url names others: expected one of them.")
    if len(options.price) not in (0, 2):
        raise ValueError(f"--price expects two numbers, of a million tokens read and written, got {options.price}.")
    limits = [
        name for name in ("clip_threshold", "clip_lowest_share", "clip_trusted") if getattr(options, name) is not None
    ]
    if len(limits) > 1:
        raise ValueError(
            f"--{limits[0]} and --{limits[1]} both say which CLIPScores are too low: expected one of them."
        )
    if limits and options.clip_model is None:
        raise ValueError(f"--{limits[0]} needs a --clip_model.")
    if options.push_to_hub and options.hub_dataset_id is None:
        raise ValueError("--push_to_hub needs --hub_dataset_id owner/name.")
    for name in (*options.evaluation_sets, *([options.clip_trusted] if options.clip_trusted else [])):
        name_and_split(name)


def name_and_split(text: str) -> tuple[str, str]:
    """Takes NAME:SPLIT apart; a split may be a part of one, as in `scenes:train[:100]`.

    Raises:
        ValueError: For anything else.
    """
    found = _NAME_AND_SPLIT.fullmatch(text)
    if found is None:
        raise ValueError(f"Expected NAME:SPLIT, got {text!r}.")
    return found[1], found[2]
