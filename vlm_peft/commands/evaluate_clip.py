"""Scores of a CLIP without training it: retrieval, zero-shot, few-shot heads, and weights between two encoders.

python eval/clip.py --clip_model openai/clip-vit-base-patch32 --config recipes/configs/clip_cifar10.yaml
python eval/clip.py --clip_model outputs/clip_demo --config recipes/configs/clip_demo.yaml --few_shot true
python eval/clip.py ... --wise_ft 0 0.25 0.5 0.75 1
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..adapters.loading import default_device
from ..console import table
from ..contrastive.arguments import ClipArguments, parse_arguments
from ..contrastive.encoder import DualEncoder
from ..contrastive.evaluate import embed_split, evaluate_all, write_evaluated
from ..contrastive.features import vectors_folder
from ..contrastive.few_shot import few_shot_table, read_zhou_split
from ..contrastive.folder import interpolate, load_clip
from ..contrastive.pairs import Pairs, check_texts, class_names, load_pairs
from ..evaluation.records import write_text


@dataclass
class EvaluationArguments(ClipArguments):
    """Options of the evaluation beside those of the data."""

    few_shot: bool = field(
        default=False, metadata={"help": "Heads on 1, 2, 4, 8, 16 pictures a class of --train_split, three draws each."}
    )
    split_file: str | None = field(
        default=None,
        metadata={"help": "split_zhou_*.json: its train and test in the place of the splits; with --image_folder."},
    )
    wise_ft: list[float] = field(
        default_factory=list, metadata={"help": "Scores with weights between the base (0) and the fine-tuned (1)."}
    )
    wise_ft_base: str | None = field(default=None, metadata={"help": "The base; an adapter names its own."})


def main(arguments: Sequence[str]) -> int:
    """Scores, prints a line each, and writes `OUTPUT_DIR/eval/`, few_shot.json and wise_ft.json.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with the model or the data; names it.
    """
    options, training = parse_arguments(
        list(arguments), description="Score a CLIP or SigLIP.", kind=EvaluationArguments
    )
    device = "cpu" if training.use_cpu else default_device()
    encoder = load_clip(str(options.clip_model), revision=options.clip_revision, device=device)
    output = Path(str(training.output_dir))
    train: Pairs | None
    if options.split_file is not None:
        train, held_out = _of_split_file(options)
    else:
        held_out = [_load(options, name, options.eval_limit, encoder) for name in options.eval_splits]
        train = _load(options, options.train_split, options.train_limit, encoder) if options.few_shot else None
    parts = [*held_out, train] if train is not None else held_out
    names = class_names(parts, options.class_names) if options.label_column else []
    directory = str(vectors_folder(options.vectors_dir))
    embedded = [embed_split(encoder, part, directory, options.eval_batch_size) for part in held_out]
    for part, images in zip(held_out, embedded, strict=True):
        for found in evaluate_all(encoder, part, images, names, options.prompts):
            print(write_evaluated(output, part, found))
    between = _wise_ft(options, held_out, names, output, device) if options.wise_ft else {}
    if options.few_shot:
        if train is None or not names:
            raise ValueError("--few_shot needs --label_column, the column with the class.")
        of_train = embed_split(encoder, train, directory, options.eval_batch_size)
        _few_shot(encoder, options, train, of_train, held_out, embedded, names, between, output)
    return 0


def _load(options: EvaluationArguments, name: str, limit: int | None, encoder: DualEncoder) -> Pairs:
    pairs = load_pairs(
        options,
        name,
        limit=limit,
        label_column=options.label_column,
        with_texts=options.train_on == "texts",
        on_bad_row=options.on_bad_row,
    )
    if options.train_on == "texts":
        check_texts(encoder, pairs, options.long_texts)
    return pairs


def _of_split_file(options: EvaluationArguments) -> tuple[Pairs, list[Pairs]]:
    """The training and test rows of a published split file, as tables of paths and names."""
    from tempfile import TemporaryDirectory

    if options.image_folder is None:
        raise ValueError("--split_file needs --image_folder, the folder in which its paths begin.")
    found = read_zhou_split(str(options.split_file))
    options.train_on, options.label_column = "labels", "label"
    parts = {}
    with TemporaryDirectory() as folder:
        for part in ("train", "test"):
            rows = [{"image": place, "label": name.replace("_", " ")} for place, _, name in found[part]]
            file = Path(folder) / f"{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            options.dataset_name = str(file)
            parts[part] = load_pairs(options, part, label_column="label", with_texts=False)
    return parts["train"], [parts["test"]]


def _few_shot(
    encoder: DualEncoder,
    options: EvaluationArguments,
    train: Pairs,
    of_train: np.ndarray,
    held_out: list[Pairs],
    embedded: list[np.ndarray],
    names: list[str],
    between: dict[str, dict[str, dict[str, float]]],
    output: Path,
) -> None:
    """Heads on the model's features, beside the names alone by weights between it and its base."""
    places = {name: place for place, name in enumerate(names)}

    def labelled(part: Pairs, images: np.ndarray) -> tuple[np.ndarray, list[int]]:
        kept = [row for row, label in enumerate(part.labels) if label is not None]
        return images[kept], [places[str(part.labels[row])] for row in kept]

    classes = encoder.embed_classes(names, options.prompts).numpy()
    tests = {part.split.name: labelled(part, images) for part, images in zip(held_out, embedded, strict=True)}
    tests = {name: test for name, test in tests.items() if test[1]}
    tables = few_shot_table(labelled(train, of_train), tests, classes)
    for name, rows in tables.items():
        rows += [
            {"head": f"wise_ft {share}", "shots": 0, "acc1": found["acc1"], "deviation": 0.0, "pictures": 0}
            for share, found in between.get(f"zero_shot {name}", {}).items()
        ]
        shots = sorted({row["shots"] for row in rows} - {0})
        lines = [
            (f"{name}: acc1, n={len(tests[name][1])}", *(f"{count} shot{'' if count == 1 else 's'}" for count in shots))
        ]
        for head in dict.fromkeys(row["head"] for row in rows):
            cells = {row["shots"]: f"{row['acc1']:.3f} ±{row['deviation']:.3f}" for row in rows if row["head"] == head}
            lines.append((head, *(cells.get(count, cells.get(0, "")) for count in shots)))
        print(f"\n{table(lines)}")
    write_text(output / "few_shot.json", json.dumps(tables, indent=2) + "\n")


def _wise_ft(
    options: EvaluationArguments, held_out: list[Pairs], names: list[str], output: Path, device
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores between a base and what was fine-tuned from it (WiSE-FT): task and split -> share -> metrics."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for share in options.wise_ft:
        encoder = _between(options, share)
        encoder.to(device)
        for part in held_out:
            images = embed_split(encoder, part, None, options.eval_batch_size)
            for found in evaluate_all(encoder, part, images, names, options.prompts):
                tables.setdefault(f"{found.task} {part.split.name}", {})[f"{share:g}"] = found.scores.metrics
    for title, by_share in tables.items():
        metrics = list(next(iter(by_share.values())))
        lines = [(f"WiSE-FT, {title}", *by_share)]
        lines += [(metric, *(f"{found[metric]:.3f}" for found in by_share.values())) for metric in metrics]
        print(f"\n{table(lines)}")
    write_text(output / "wise_ft.json", json.dumps(tables, indent=2) + "\n")
    return tables


def _between(options: EvaluationArguments, share: float) -> DualEncoder:
    """The base at 0, what was fine-tuned from it at 1.

    Raises:
        ValueError: When it is not said what the base is.
    """
    name, revision = str(options.clip_model), None
    new = load_clip(name, revision=options.clip_revision, base=options.wise_ft_base)
    base = options.wise_ft_base
    if base is None:
        base, revision = new.config.base_name_or_path, new.config.base_revision
        if base in (name, str(Path(name).resolve())):
            raise ValueError("--wise_ft: the model is no adapter, which names its base: say it with --wise_ft_base.")
    return interpolate(load_clip(base, revision=revision), new, share)
