"""Generate for a held-out split with a trained model, and score it.

    accelerate launch -q eval/run.py --model outputs/demo --dataset recipes/demo/scenes --split test --output_dir scores

Writes predictions.jsonl (`{"id", "prediction", "references"}` and the scores of the row, one a line) and scores.json to
--output_dir. The model is asked as it was in training (task.json beside the adapter) unless the options say otherwise.
Several processes share the rows.
"""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path

from ..console import quiet_imports, quiet_progress, show_messages, table
from ..tasks import TASK_FILE, TASKS, TaskOptions, TaskSettings, task_options


def parse_arguments(arguments: Sequence[str] | None = None, program: str = "run.py") -> argparse.Namespace:
    """Read the command line; ends the program with a message if it is not one."""
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--model", required=True, help="adapter folder, folder of a full save, or Hub id of either")
    add("--dataset", required=True, help="Hub id, table (parquet, CSV, JSON) or folder of tables, or image folder")
    add("--split", required=True, help="rows to generate for; train[10%%] is what a training of that name held out")
    add("--output_dir", required=True, type=Path, help="gets predictions.jsonl and scores.json")
    add("--limit", type=_count, metavar="N", help="first N rows only")
    add("--num_beams", type=_count, metavar="K", help="1 is greedy (default: as after training)")
    add("--max_new_tokens", type=_count, metavar="M", help="tokens of a text at most (default: as after training)")
    add("--batch_size", type=_count, default=64, metavar="B", help="prompts at a time on each process (default: 64)")
    add("--blind", action="store_true", help="swap the pictures: what the model says without seeing the right one")
    add("--meteor", action=flag, default=True, help="METEOR, where Java is there; takes 6 s (default: yes)")
    add("--spice", action=flag, default=False, help="SPICE, where Java and its models are there (default: no)")
    add("--clip_model", metavar="CLIP", help="folder or id of a CLIP: also CLIPScore of captions")
    add("--tokenizer", choices=("auto", "ptb-java", "treebank-python"), default="auto", help="for the scores")

    parts = parser.add_argument_group("the model")
    parts.add_argument("--model_revision", help="commit or branch, for a Hub id")
    parts.add_argument("--vision", help="where an adapter's encoder lies when it moved")
    parts.add_argument("--text", help="where an adapter's decoder lies when it moved")
    parts.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")

    parts.add_argument("--load_in_4bit", action="store_true", help="an adapter's decoder in 4 bits (NF4), as in QLoRA")

    data = parser.add_argument_group("the data")
    data.add_argument("--dataset_revision", help="commit or branch of the data set")
    data.add_argument("--stored_split", help="the split as stored, with --split_column")
    data.add_argument("--split_column", help="column that names each row's true split")
    data.add_argument("--split_seed", type=int, default=0, help="as in training, for train[10%%] (default: 0)")
    data.add_argument("--task", choices=tuple(TASKS), help="what rows mean (default: as in training)")
    data.add_argument("--image_column", default="image", help="column with the picture (default: image)")
    data.add_argument("--image_folder", help="where relative paths begin (default: the table's own folder)")
    data.add_argument("--text_column", help="column with the texts (default: found by usual names)")
    data.add_argument("--instruction", help="what the user says beside the picture (default: as in training)")
    for own in _asked_options():
        said = f"{own.metadata['help'].rstrip('.')} (default: as in training)"
        several = None if "choices" in own.metadata else "+"
        data.add_argument(f"--{own.name}", choices=own.metadata.get("choices"), nargs=several, help=said)
    data.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="(default: stop)")
    data.add_argument("--feature_cache", action=flag, default=True, help="keep encoded pictures (default: yes)")
    data.add_argument("--feature_cache_dir", help="where (default: in the data sets' cache)")

    shots = parser.add_argument_group("solved examples before each question")
    shots.add_argument("--shots", type=int, default=0, metavar="K", help="so many; nothing is trained (default: 0)")
    shots.add_argument("--shot_split", default="train", help="split that they are drawn from (default: train)")
    shots.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    options = parser.parse_args(arguments)
    if options.shots < 0:
        parser.error(f"--shots: expected 0 or more examples, got {options.shots}")
    if options.shots and options.shot_split == options.split:
        parser.error(f"--shot_split {options.split} is what is scored: draw examples from another split")
    return options


def _asked_options() -> list[Field]:
    """The tasks' own options that change what is asked, and not only what was learnt."""
    asked = {name for kind in TASKS.values() for name in kind.asked}
    return [each for each in fields(TaskOptions) if each.name in asked]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None, program: str = "run.py") -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments, program)
    quiet_imports()

    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    quiet_progress(state.is_main_process)
    show_messages(state.is_main_process)

    import torch
    from transformers import BitsAndBytesConfig

    from ..adapters.loading import find_model, load_model
    from ..data.arguments import DataArguments
    from ..data.splits import encode_pictures, leave_out, load_split, settle
    from ..evaluation.evaluate import evaluate_split
    from ..evaluation.few_shot import check_room, load_examples, with_examples

    with state.main_process_first():
        folder = find_model(options.model, options.model_revision)
    dtype = getattr(torch, options.dtype)
    quantization = None
    if options.load_in_4bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model, processor = load_model(
        folder,
        vision=options.vision,
        text=options.text,
        dtype=dtype,
        device=state.device,
        quantization_config=quantization,
    )
    settings = TaskSettings.read(folder)
    if settings is None:
        settings = TaskSettings()
        state.print(f"{options.model} has no {TASK_FILE}: see --task and --instruction for how it is asked.")
    given = {own.name: getattr(options, own.name) for own in _asked_options() if getattr(options, own.name)}
    data = DataArguments(
        dataset_name=options.dataset,
        dataset_revision=options.dataset_revision,
        stored_split=options.stored_split,
        split_column=options.split_column,
        split_seed=options.split_seed,
        task=options.task or settings.task,
        image_column=options.image_column,
        image_folder=options.image_folder,
        text_column=options.text_column,
        instruction=settings.instruction if options.instruction is None else options.instruction,
        **task_options(settings) | given,
    )
    data = replace(data, **settle(data, options.split))
    max_new_tokens = options.max_new_tokens or settings.max_new_tokens
    split = load_split(data, options.split, processor, limit=options.limit)
    examples = None
    if options.shots:
        count = options.shots * sum(1 for _ in split.questions())
        examples = load_examples(data, options.shot_split, processor, count=count, seed=options.seed)
        check_room(model, processor, with_examples(split, examples, options.shots, options.seed), max_new_tokens)
    for each, on_bad_row in ((split, options.on_bad_row), (examples, "skip")):
        if each is not None:
            cache = {"feature_cache": options.feature_cache, "directory": options.feature_cache_dir}
            leave_out(encode_pictures(each, model, processor, **cache), on_bad_row)
    recorded = {}
    if examples is not None:
        split = with_examples(split, examples, options.shots, options.seed)
        recorded = {"shots": options.shots, "shot_split": options.shot_split, "seed": options.seed}
    summary = evaluate_split(
        model,
        processor,
        split,
        options.output_dir,
        model_name=options.model,
        condition="blind" if options.blind else "after",
        batch_size=options.batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=options.num_beams or settings.num_beams,
        meteor=options.meteor,
        spice=options.spice,
        tokenizer=options.tokenizer,
        clip_model=options.clip_model,
        recorded=recorded,
    )
    if state.is_main_process:
        metrics = summary["metrics"]
        name = options.split + (" (blind)" if options.blind else "")
        rows = [
            ["split", "n", *metrics],
            [name, str(summary["n"]), *(f"{value:.4f}" for value in metrics.values())],
        ]
        print(f"\n{table(rows)}")
        for metric, reason in summary["skipped"].items():
            print(f"{metric} skipped: {reason}")
        for note in summary["notes"]:
            print(note)
        print(f"\nwritten: {options.output_dir / 'predictions.jsonl'}, {options.output_dir / 'scores.json'}")
    return 0
