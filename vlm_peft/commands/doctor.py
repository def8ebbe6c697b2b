"""Doctor: `vlm-peft doctor --config X.yaml`, the checks before a training run, and what the run will take.

Stage: beside the recipe, with its options. Everything is found out by doing it: rows are laid out, pictures opened and
encoded, a few steps trained on real batches, a batch of texts generated; figures are then extrapolated. Nothing of it
is kept: no output folder, no feature cache, no encoded rows.
"""

import copy
import logging
import math
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from packaging.requirements import Requirement
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import ModelConfig, SFTConfig

from ..adapters.lora import PROJECTOR, check_trainable, format_trainable_table, trainable_table, unadapted_experts
from ..adapters.pissa import is_pissa
from ..data.feature_cache import count_missing, features_folder, picture_bytes
from ..data.leakage import check_overlap
from ..data.mixture import fetch_from, first_images
from ..data.pictures import UnreadablePictureError
from ..data.probe import probe
from ..data.rows import encode_rows
from ..data.splits import Split, leave_out, row_name
from ..data.streaming import stack_pixels
from ..evaluation.blind import asked_rows, prior_scores
from ..evaluation.evaluate import generate_rows
from ..model.modeling_vision_qwen import VisionQwen
from ..training.arguments import VisionArguments, chosen_strategy, keeps_features, parse_arguments
from ..training.callbacks import PrintedLines
from ..training.data import Part, encode_split, hold_back, join, parts, row_lengths, watched
from ..training.setup import (
    bases,
    build_trainer,
    check_steps,
    describe_layout,
    find_start,
    load_model,
    load_processor,
    training_stream,
)
from ..training.stages import check_bases, parse_stages

PROGRAM = "vlm-peft doctor"

_DESCRIPTION = "Checks a training configuration and this machine, and predicts time, memory and size of the run."

SAMPLED_PICTURES = 256
"""Pictures of each split that are opened."""

TRIAL_STEPS = 40
"""Optimizer steps that are tried at most."""

TRIAL_SECONDS = 20.0
"""Trial steps end after so long, once there are enough of them."""

HIGH_PRIOR = 0.6
"""Score of the questions' wording alone from which on the blind control is asked for."""

WARM_UP = 3  # steps, the heaviest batch among them
_ENOUGH = 4  # measured steps
_ENCODE_AT_ONCE = 64  # as the feature cache does
_ENCODE_SECONDS = 60.0
_STREAMED_ROWS = 64  # of which a stream's lengths are told
# What a wrong configuration, data set or machine raises; anything else is a fault of ours and keeps its traceback.
_ERRORS = (OSError, ValueError, DatasetsError, torch.OutOfMemoryError)
_SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


def main(arguments: list[str]) -> int:
    """Checks a configuration and predicts its run.

    Args:
        arguments (`list[str]`): Those of the recipe: `--config X.yaml` and any option.

    Returns:
        `int`: 0 when the run can start, 1 when something is in its way, 2 for options that cannot be understood.
    """
    if not arguments:
        print(f"{PROGRAM}: expected --config FILE.yaml, and any option of the recipe", file=sys.stderr)
        return 2
    try:
        parsed = parse_arguments(arguments, program=PROGRAM, description=_DESCRIPTION)
        if parsed[0].stages is not None:
            stages = parse_stages(arguments, parsed[0].stages, program=PROGRAM)
            check_bases(stages)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    # The recipe's loader warns of each kind of row that it leaves out; here they are told with the rest.
    data_logger = logging.getLogger(encode_rows.__module__)
    level, was_caching = data_logger.level, datasets.is_caching_enabled()
    data_logger.setLevel(logging.ERROR)
    datasets.disable_caching()
    try:
        if parsed[0].stages is None:
            return Doctor(*parsed).examine()
        status = 0
        for stage in stages:
            # Each for itself: what one hands to the next changes no layout, and hardly time and memory.
            _title(f"Stage {stage.name}")
            status = max(status, Doctor(stage.vision, stage.training, stage.model_args).examine())
        return status
    finally:
        data_logger.setLevel(level)
        if was_caching:
            datasets.enable_caching()


class Doctor:
    """The checks of one configuration; each prints what it finds, and problems are collected.

    Args:
        vision, training, model_args: Of [`~vlm_peft.training.arguments.parse_arguments`].
    """

    def __init__(self, vision: VisionArguments, training: SFTConfig, model_args: ModelConfig):
        self.vision, self.training, self.model_args = vision, training, model_args
        self.problems: list[str] = []
        self.model: Any = None
        self.processor: Any = None
        self.train: list[Split] = []
        self.held_out: list[Split] = []
        self.held_back: list[Split] = []
        self.peaks: dict[str, int] = {}
        self.strategy = chosen_strategy(vision, model_args)
        self.start: Path | None = None
        self.saved_as = "model" if self.strategy.trains_decoder else "adapter"

    def examine(self) -> int:
        """Runs all checks that can be run, and returns the exit status."""
        set_seed(self.training.seed)
        self.check_versions()
        self.show_devices()
        _title("Bases")
        with self.catching():
            self.processor, self.config = load_processor(self.vision, self.model_args)
            self.show_bases()
            self.start = find_start(self.vision, self.training, self.model_args)
        self.keeps_features = keeps_features(self.vision)
        _title("Data")
        self.check_data()
        rows = self.encode_training_rows() if self.processor is not None else None
        self.check_overlaps()
        self.tell_priors()
        if self.processor is not None:
            _title("Model")
            with self.catching():
                loaded = load_model(self.vision, self.model_args, self.training.device, self.start)
                self.model, self.processor = loaded
                self.note_peak("loading")
                self.check_placeholders(rows)
        if self.model is not None and rows is not None:
            with self.catching():
                self.try_run(rows)
        return self.conclude()

    @contextmanager
    def catching(self) -> Iterator[None]:
        """An error becomes a problem, and the checks after it go on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.problem(
                f"The device's memory is too small: {str(error).partition('.')[0]}. Lower "
                "--per_device_train_batch_size and raise --gradient_accumulation_steps as much, or use "
                "--gradient_checkpointing true."
            )
        except _ERRORS as error:
            self.problem(str(error))

    def problem(self, text: str) -> None:
        """Prints what is in the way of the run as one line, and remembers it."""
        text = " ".join(text.split())
        if text not in self.problems:
            self.problems.append(text)
            _say(f"  PROBLEM: {text}")

    def check_versions(self) -> None:
        """Versions of the stack, and those below the package's own minimum."""
        _title("Versions")
        found = {"python": platform.python_version()} | {name: _version(name) for name in _SHOWN}
        _say("  " + ", ".join(f"{name} {number or 'missing'}" for name, number in found.items()))
        for text in requires("vlm-peft") or []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            number = _version(wanted.name)
            if number is None:
                self.problem(f"{wanted.name} is not installed, {wanted.specifier} is needed: pip install '{wanted}'")
            elif not wanted.specifier.contains(number, prereleases=True):
                _say(f"  WARNING: {wanted.name} {number} is installed, {wanted.specifier} is needed.")

    def show_devices(self) -> None:
        """Cores and memory of this machine, and its accelerators."""
        _title("Devices")
        # One figure a core; of those that this process may use, what others use while it waits.
        percents = psutil.cpu_percent(interval=0.3, percpu=True)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(percents))
        cores, threads, memory = len(allowed), torch.get_num_threads(), psutil.virtual_memory()
        _say(
            f"  CPU: {cores} cores, {threads} threads used; memory {_size(memory.available)} free of "
            f"{_size(memory.total)}"
        )
        busy = sum(percent for core, percent in enumerate(percents) if core in allowed) / 100
        if self.training.device.type == "cpu" and busy + threads > cores + 0.5:
            _say(
                f"  WARNING: other programs keep {busy:.1f} of {cores} cores busy, and threads wait for the slowest of "
                "them: a step can take ten times as long. Let them end first, or leave them their cores with "
                f"OMP_NUM_THREADS={max(1, round(cores - busy))}."
            )
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                bf16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
            _say(
                f"  GPU {index}: {torch.cuda.get_device_name(index)}, {bf16} bfloat16, memory {_size(free)} free of "
                f"{_size(total)}"
            )
        precision = "bfloat16" if self.training.bf16 else "float16" if self.training.fp16 else "float32"
        _say(f"  The run uses {self.training.device}, arithmetic in {precision}.")

    def show_bases(self) -> None:
        """Where encoder and decoder were found; only their configurations were read."""
        named = bases(self.vision, self.model_args)
        vision: Any = self.config.vision_config
        text: Any = self.config.text_config
        height, width = self.config.picture_size
        _say(f"  encoder {named['vision']} ({vision.model_type}, pictures of {height} x {width} px)")
        _say(f"  decoder {named['text']} ({text.model_type}, {text.num_hidden_layers} layers)")
        rows, columns = self.config.grid
        limit, each = self.training.max_length, self.config.num_image_tokens
        _say(
            f"  {each:,} image tokens a picture, of {rows} x {columns} from the encoder ({self.config.projector_type})"
        )
        if limit is not None and each >= limit:
            self.problem(
                f"A picture takes {each:,} image tokens, and --max_length is {limit:,}: raise it above {each:,} times "
                "the pictures of a row, plus the texts, or make them fewer with --image_size, --pixel_shuffle_factor "
                "or another --projector_type."
            )

    def check_data(self) -> None:
        """Columns, rows and a sample of the pictures of every split that will be trained on or scored."""
        found: list[Part] = []
        with self.catching():
            found = parts(self.vision)
        for part in found:
            if self.vision.streaming and not part.is_held_out:
                continue
            _say(f"  {part.source.dataset_name}")
            with self.catching():
                split = part.load(self.processor)
                self.check_pictures(split)
                if part.is_held_out:
                    leave_out(split, self.vision.on_bad_row)
                (self.held_out if part.is_held_out else self.train).append(split)

    def check_pictures(self, split: Split) -> None:
        """Opens a sample of a split's pictures."""
        columns = sorted({*split.texts.column_names, *split.task.image_columns})
        _say(f"    columns {', '.join(columns)}; pictures in {', '.join(split.task.image_columns) or 'none'}")
        sample = _spread(len(split.pictures), SAMPLED_PICTURES)
        for index in sample:
            try:
                split.pictures.open(index)
            except UnreadablePictureError as error:
                split.unreadable[index] = str(error)
        _say(f"    {len(split.unreadable)} of {len(sample)} pictures tried cannot be read")
        hashes, total = split.pictures.hashes, len(split.texts)
        shown = Counter(tuple(hashes[image] for image in split.pictures.of_row(row)) for row in range(total))
        again = sum(count - 1 for pictures, count in shown.items() if pictures and None not in pictures)
        if again:
            _say(
                f"    {again:,} of {total:,} rows show what another row shows, and do not share its tokens: their "
                "names (image_id), or what stands before their pictures, differ"
            )

    def encode_training_rows(self) -> Dataset | IterableDataset | None:
        """Lays all training rows out, and tells their lengths; None when there is none to train on.

        The first held-out split of each data set, too, when its loss will be watched.
        """
        for split in watched(self.held_out, self.training):
            with self.catching():
                self.encode_split(split, 0)
        if self.vision.streaming:
            with self.catching():
                stream = training_stream(self.vision, self.training, self.processor, frozenset())
                rows = list(islice(stream, _STREAMED_ROWS))
                _say(f"  The first {len(rows)} rows of the stream:")
                self.tell_lengths([len(row["input_ids"]) for row in rows], [str(row["row"]) for row in rows])
                return stream
            return None
        encoded = []
        for split, first_image in zip(self.train, first_images(self.train), strict=True):
            with self.catching():
                rows = self.encode_split(split, first_image)
                if split.task.held_back:
                    rows, back = hold_back(split, rows)
                    self.held_back.append(back)
                    _say(
                        f"    {split.task.held_back:,} of them are held back, to calibrate the answers: "
                        f"{len(rows):,} are trained on"
                    )
                encoded.append(rows)
        if not encoded or len(encoded) < len(self.train):
            return None
        with self.catching():
            return join(encoded, self.train, self.training)
        return None

    def encode_split(self, split: Split, first_image: int) -> Dataset:
        """Rows as the run will lay them out; rows that cannot be used are a problem unless they are to be skipped."""
        arguments: Any = (split, self.processor, self.training)
        found = encode_split(*arguments, first_image=first_image, whole=True)
        lengths = row_lengths(found.dataset)
        longest = sorted(zip(lengths, found.dataset["row"][:], strict=True), key=lambda pair: -pair[0])[:3]
        _say(f"  Rows of {split.name} ({split.task.name}):")
        self.tell_lengths(lengths, [row_name(split.texts[row]) for _, row in longest])
        if self.training.max_length is not None and max(lengths) > self.training.max_length:
            found = encode_split(*arguments, first_image=first_image)
        for reason, names in found.dropped.items():
            said = f"{len(names)} of {len(split.texts)} rows of {split.name} ({', '.join(names[:5])}): {reason}"
            if self.vision.on_bad_row == "skip":
                _say(f"    left out: {said}")
            else:
                self.problem(f"{said} Repair them, or leave them out with --on_bad_row skip.")
        return found.dataset

    def tell_lengths(self, lengths: list[int], names: list[str]) -> None:
        """One line on tokens a row, and one on those that do not fit into a sequence."""
        limit = self.training.max_length
        ordered = sorted(lengths)
        middle, most = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        _say(
            f"    tokens a row: median {middle:,}, 95 % up to {most:,}, longest {ordered[-1]:,}"
            f"{f' of max_length {limit:,}' if limit else ''} (row {', '.join(names[:3])})"
        )
        over = sum(length > limit for length in lengths) if limit else 0
        if over:
            _say(
                f"    {over:,} of {len(lengths):,} rows ({100 * over / len(lengths):.1f} %) exceed max_length; "
                "texts that do not fit go into further sequences, each with the pictures again; --max_length "
                f"{ordered[-1]:,} holds every row"
            )

    def check_overlaps(self) -> None:
        """No training picture may be among those that are scored."""
        before, allowed = len(self.problems), []
        for split in self.train:
            for other in self.held_out:
                with self.catching():
                    said = check_overlap(split, other, allow=self.vision.allow_overlap)
                    allowed += [said] if said else []
        for said in allowed:
            _say(f"  Overlap allowed: {said}")
        if self.train and self.held_out and not allowed and len(self.problems) == before:
            _say("  No training picture is among those that are scored.")

    def tell_priors(self) -> None:
        """What held-out questions score without a picture, by the training's answers to the same words."""
        for split in self.held_out:
            train = [row for each in self.train if each.task.name == split.task.name for row in asked_rows(each)]
            questions = asked_rows(split)
            if not train or not questions:
                continue
            with self.catching():
                scores = prior_scores(split.task.name, train, questions)
                own = {name: value for name, value in scores.metrics.items() if name.startswith(scores.primary)}
                high = {name: value for name, value in own.items() if value >= HIGH_PRIOR}
                _say(
                    "  Without any picture, the commonest training answer to questions that begin alike scores "
                    f"{scores.primary} {own[scores.primary]:.3f} on {split.name} ({len(questions):,} questions)."
                )
                if high and not split.is_blind:
                    said = ", ".join(f"{name} {value:.3f}" for name, value in high.items())
                    _say(
                        f"  WARNING: a model may learn its words and never look ({said}). Score the blind control, "
                        f"too: --blind_splits {split.stored_name}."
                    )

    def check_placeholders(self, rows: Dataset | IterableDataset | None) -> None:
        """Runs the encoder and the projector on the pictures of a real row of each data set."""
        for split in self.train if rows is not None else []:
            for number in range(len(split.texts)):
                images = list(split.pictures.of_row(number))
                if images and not set(images) & set(split.unreadable):
                    break
            else:
                continue
            example = split.task.example(split.texts[number])
            ids = self.processor.encode_row(example.prompt, example.completions).input_ids
            placeholders = ids.count(self.processor.image_token_id)
            pixels = split.fetch_images(images)["pixel_values"].to(self.training.device)
            with torch.inference_mode():
                tokens: Any = self.model.get_image_features(pixels).pooler_output
            features = tokens.shape[0] * tokens.shape[1]
            _say(
                f"  row {row_name(split.texts[number])} of {split.name}: {len(images)} pictures, {placeholders} image "
                f"tokens in the text, {features} features of {tokens.shape[2]} from encoder and projector"
            )
            if placeholders != features:
                self.problem(
                    f"Row {row_name(split.texts[number])} has {placeholders} image tokens in its text, encoder and "
                    f"projector give {features} features."
                )

    def try_run(self, rows: Dataset | IterableDataset) -> None:
        """Builds the trainer, tells what trains, tries steps and texts, and predicts the run."""
        to_encode = self.check_disk()
        with tempfile.TemporaryDirectory() as folder:
            batches = [] if isinstance(rows, IterableDataset) else self.draw_batches(row_lengths(rows))
            chosen = rows if isinstance(rows, IterableDataset) else rows.select([row for b in batches for row in b])
            fetch, encode_rate = self.fetcher(chosen)
            watch = StepWatch(self.training.device)
            trainer = build_trainer(
                self.vision,
                self.trial_arguments(folder, len(batches)),
                self.model_args,
                self.model,
                self.processor,
                chosen,
                fetch,
                callbacks=[watch],
                start=self.start,
            )
            for callback in (PrintedLines, PrinterCallback):
                trainer.pop_callback(callback)
            adapted: Any = trainer.model
            table = trainable_table(adapted)
            _say(format_trainable_table(table))
            saved = saved_bytes(adapted)
            experts = unadapted_experts(adapted)
            if experts and self.strategy.lora:
                _say(f"  LoRA has no part in the experts, which are no linear layers: {', '.join(experts)}")
            _say(f"  {describe_layout(probe(self.model), rows)}")
            _say(f"  {self.saved_as} file: {saved / 1e6:.2f} MB")
            check_trainable(table, vision_tower_trains=self.strategy.encoder_trains)
            step = self.try_steps(trainer, watch)
        seconds = self.try_texts(adapted)
        self.predict(rows, step, saved, to_encode, encode_rate, seconds)

    def check_disk(self) -> int:
        """Room for the features that are not stored yet; returns their number."""
        splits = [*self.train, *self.held_out]
        if not self.keeps_features:
            _say("  no feature cache: pictures are encoded in every step")
            return 0
        folder = features_folder(self.vision.feature_cache_dir)
        arguments: dict[str, Any] = {"directory": folder, "dtype": self.vision.feature_dtype}
        missing = sum(
            count_missing(self.model, self.processor.image_processor, split.pictures, **arguments) for split in splits
        )
        each = picture_bytes(self.model.config, self.vision.feature_dtype)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        total = sum(len(split.pictures) for split in splits)
        _say(
            f"  features of {total:,} pictures: {_size(total * each)} in {folder}, of which {_size(missing * each)} "
            f"are yet to be made; {_size(free)} free"
        )
        if missing * each > free:
            self.problem(
                f"The feature cache needs {_size(missing * each)} more in {folder}, which has {_size(free)} free: "
                "point --feature_cache_dir to a larger disk, or use --feature_cache false."
            )
        return missing

    def draw_batches(self, lengths: list[int]) -> list[list[int]]:
        """Row numbers of the trial's batches: the heaviest of an epoch first, then evenly from light to heavy.

        An epoch is drawn as the trainer's random sampler would; what a batch weighs are its tokens with padding.
        """
        size = self.training.train_batch_size
        order = list(range(len(lengths)))
        random.Random(self.training.seed).shuffle(order)
        drawn = [order[start : start + size] for start in range(0, len(order), size)]
        if len(drawn) > 1 and len(drawn[-1]) < size:
            drawn.pop()

        def weight(batch: list[int]) -> int:
            tokens = [lengths[row] for row in batch]
            return sum(tokens) if self.vision.pack_rows else len(tokens) * max(tokens)

        drawn.sort(key=weight)
        count = TRIAL_STEPS * self.training.gradient_accumulation_steps
        places = [int((place + 0.5) * len(drawn) / count) for place in range(count)]
        random.Random(self.training.seed).shuffle(places)
        warm_up = (WARM_UP - 1) * self.training.gradient_accumulation_steps
        heaviest = [drawn[-1]] * self.training.gradient_accumulation_steps
        return [*heaviest, *(drawn[place] for place in [*places[:warm_up], *places])]

    def fetcher(self, rows: Dataset | IterableDataset) -> tuple[Callable[[list], dict[str, torch.Tensor]], float]:
        """Pictures of the trial's rows as model inputs, and how many pictures a second were encoded for it.

        Encoding stops after a minute; further rows then get the features of other pictures, which changes no figure.
        """
        if isinstance(rows, IterableDataset):
            return stack_pixels, math.nan
        fetch_pixels = fetch_from(self.train)
        if not self.keeps_features:
            return fetch_pixels, math.nan
        wanted = list(dict.fromkeys(image for images in rows["image_ids"][:] for image in images))
        features: list[torch.Tensor] = []
        start = time.perf_counter()
        tower = self.model.model.vision_tower.eval()
        for first in range(0, len(wanted), _ENCODE_AT_ONCE):
            if time.perf_counter() - start > _ENCODE_SECONDS:
                break
            pixels = fetch_pixels(wanted[first : first + _ENCODE_AT_ONCE])["pixel_values"].to(tower.device)
            with torch.inference_mode():
                # An independent copy: what inference mode made cannot take part in training.
                encoded = self.model.model.get_vision_features(pixels).float().cpu()
            features += encoded.to(getattr(torch, self.vision.feature_dtype)).clone()
        rate = len(features) / (time.perf_counter() - start) if features else math.nan
        self.note_peak("encoding pictures")
        if any(not each.isfinite().all() for each in features):
            self.problem(
                f"The encoder's features are not finite in {self.vision.feature_dtype}: use --feature_dtype float32."
            )
        place = {image: number % max(1, len(features)) for number, image in enumerate(wanted)}

        def fetch(images: list[int]) -> dict[str, torch.Tensor]:
            return {"image_features": torch.stack([features[place[image]] for image in images])}

        return fetch, rate

    def trial_arguments(self, folder: str, batches: int) -> SFTConfig:
        """The run's arguments for a few steps that leave nothing behind."""
        arguments = copy.copy(self.training)
        steps = WARM_UP + TRIAL_STEPS
        if batches:
            steps = min(steps, batches // self.training.gradient_accumulation_steps)
        changes: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "train_sampling_strategy": "sequential",
            "eval_strategy": IntervalStrategy.NO,
            "save_strategy": SaveStrategy.NO,
            "load_best_model_at_end": False,
            "report_to": [],
            "push_to_hub": False,
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,
        }
        for name, value in changes.items():
            setattr(arguments, name, value)
        return arguments

    def try_steps(self, trainer, watch: "StepWatch") -> float:
        """Trains a few steps; returns the seconds of one."""
        projector = {
            name: parameter.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if PROJECTOR in name and parameter.requires_grad
        }
        result = trainer.train()
        self.note_peak("training")
        now = dict(trainer.model.named_parameters())
        moved = any(not torch.equal(value, now[name].detach()) for name, value in projector.items())
        measured, loss = watch.seconds[WARM_UP:] or watch.seconds, result.training_loss
        mean = statistics.fmean(measured)
        _say(
            f"  {len(watch.seconds)} steps tried, the heaviest batch first: {mean:.3g} s a step (deviation "
            f"{statistics.pstdev(measured):.2g}), loss {loss:.3f}"
        )
        if not math.isfinite(loss):
            self.problem(f"The loss of the trial steps is {loss}: lower --learning_rate, or use float32.")
        elif not moved:
            self.problem("The projector did not change in the trial steps: check --learning_rate and its own rate.")
        return mean

    def try_texts(self, trained: VisionQwen | PeftModel) -> float:
        """Loads the model again, as the run does after saving, and generates the batch with the longest prompts.

        Returns:
            `float`: Seconds a text at most, since an untrained model seldom ends early; 0 when nothing is scored.
        """
        again, _ = load_model(self.vision, self.model_args, self.training.device, self.start)
        self.note_peak("checking the saved adapter")
        if not self.held_out:
            return 0.0
        split = self.held_out[0]
        size = self.vision.generation_batch_size
        questions = sorted(split.questions(), key=lambda question: len(str(question.prompt)))[-size:]
        model: Any = again.eval()
        if isinstance(trained, PeftModel):
            model = get_peft_model(again, copy.deepcopy(trained.peft_config["default"])).eval()
        start = time.perf_counter()
        generate_rows(
            model,
            self.processor,
            questions,
            split.fetch_images,
            task=split.task,
            batch_size=size,
            max_new_tokens=self.vision.max_new_tokens,
            num_beams=self.vision.num_beams,
        )
        self.note_peak("generating texts")
        return (time.perf_counter() - start) / len(questions)

    def predict(
        self, rows: Dataset | IterableDataset, step: float, saved: int, to_encode: int, rate: float, text: float
    ) -> None:
        """Extrapolates to the whole run."""
        _title("Prediction for one process")
        steps, said = self.count_steps(rows)
        texts = self.count_texts()
        encode = to_encode / rate if to_encode else 0.0
        _say(f"  steps    {steps:,} {said}, {step:.3g} s each")
        _say(
            f"  time     training {_duration(steps * step)}, encoding {_duration(encode)} ({to_encode:,} pictures), "
            f"scoring at most {_duration(texts * text)} ({texts:,} texts); without evaluations during training"
        )
        peak, phase = max((value, name) for name, value in self.peaks.items())
        mapped = 0
        if self.training.device.type == "cpu" and self.keeps_features:
            each = picture_bytes(self.model.config, self.vision.feature_dtype)
            pictures = sum(len(split.pictures) for split in self.train)
            share = min(1.0, steps * self.rows_a_step() / len(rows)) if isinstance(rows, Dataset) else 0.0
            mapped = int(each * (pictures * share + sum(len(split.pictures) for split in self.held_out)))
        _say(
            f"  memory   {_size(peak + mapped)} at most ({phase})"
            + (
                f", {_size(mapped)} of it features on disk that the system takes back when it is short"
                if mapped
                else ""
            )
        )
        if self.training.device.type == "cpu" and peak > psutil.virtual_memory().total:
            self.problem(f"The run needs {_size(peak)} of memory, more than this machine has.")
        _say(f"  {self.saved_as:<8} {saved / 1e6:.2f} MB")

    def rows_a_step(self) -> int:
        """Rows of one optimizer step."""
        return self.training.train_batch_size * self.training.gradient_accumulation_steps

    def count_steps(self, rows: Dataset | IterableDataset) -> tuple[int, str]:
        """Optimizer steps of the run, and where the number comes from."""
        if self.training.max_steps > 0 or not isinstance(rows, Dataset):
            return self.training.max_steps, "(--max_steps)"
        epochs = self.training.num_train_epochs
        return check_steps(
            len(rows), self.training
        ), f"({epochs:g} epochs of {len(rows):,} rows, {self.rows_a_step()} a step)"

    def count_texts(self) -> int:
        """Texts that are generated: every held-out question after training, and what else is asked for.

        Questions of rows that are held back are asked once.
        """
        total = 0
        for split in self.held_out:
            count = sum(1 for _ in split.questions())
            total += count * (1 + self.vision.score_before + split.is_blind)
        return total + sum(1 for split in self.held_back for _ in split.questions())

    def note_peak(self, phase: str) -> None:
        """Remembers the most memory so far under the phase that needed it, in bytes."""
        device = self.training.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if peak > max(self.peaks.values(), default=0):
            self.peaks[phase] = peak

    def conclude(self) -> int:
        """The last lines, and the exit status."""
        _say("")
        if not self.problems:
            _say("No problems: the run can start.")
            return 0
        count = len(self.problems)
        _say(f"{count} problem{'s' if count > 1 else ''}:")
        for number, text in enumerate(self.problems, 1):
            _say(f"  {number}. {text}")
        return 1


class StepWatch(TrainerCallback):
    """Times optimizer steps, with the fetching of their batches, and ends the trial when there are enough.

    Args:
        device (`torch.device`): Waited for after each step.
    """

    def __init__(self, device: torch.device):
        self.seconds: list[float] = []
        self._device = device
        self._last = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Takes the time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        measured = self.seconds[WARM_UP:]
        if len(measured) >= _ENOUGH and sum(measured) > TRIAL_SECONDS:
            control.should_training_stop = True


def saved_bytes(model: VisionQwen | PeftModel) -> int:
    """Size that the file of the weights will have, without its header of some hundred bytes a tensor."""
    if not isinstance(model, PeftModel):
        return sum(value.numel() * value.element_size() for value in model.parameters())
    doubled = is_pissa(model.active_peft_config.init_lora_weights)
    return sum(
        value.numel() * value.element_size() * (2 if doubled and ".lora_" in name else 1)
        for name, value in get_peft_model_state_dict(model).items()
    )


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `count`, evenly spread."""
    return sorted({place * count // wanted for place in range(wanted)}) if count > wanted else list(range(count))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.{2 if name == 'GB' else 1}f} {name}"
    return f"{count / 1e3:.1f} KB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _title(text: str) -> None:
    _say(f"\n{text}")


def _say(text: str) -> None:
    print(text, flush=True)
