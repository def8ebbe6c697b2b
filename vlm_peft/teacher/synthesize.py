"""Synthesis: the recipe behind `recipes/synthesize.py`: pictures -> a teacher's answers -> a data set to train on.

Stage: options -> answers in journals -> filters -> parquet files, card, gallery. Whatever ends a run, the same command
goes on where it ended.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash
from tqdm.auto import tqdm
from transformers import AutoConfig

from .. import __version__
from ..console import quiet_progress, show_messages, table
from ..data.pictures import UnreadablePictureError, picture_size
from ..evaluation.records import write_text
from ..hub.access import check_repo_id, find_token
from ..hub.datasets import push_dataset
from ..hub.licences import stated_licence
from ..tasks import TASK_FILE, TaskSettings
from ..training.setup import local
from .card import Made, train_command, write_card, write_gallery
from .endpoint import Endpoints
from .filters import is_refusal
from .journal import Journal
from .likeness import Likeness, Threshold, choose_threshold
from .local import LocalTeacher
from .options import SynthesisOptions, parse_arguments
from .prompts import Prompt, read_prompt
from .questions import Answer, Question, Sampling
from .rows import Row, read_row, reject_duplicates, reject_unlike, write_splits
from .serve import served
from .source import HeldOut, Seen, Shown, Source, load_held_out

ANSWERS, SUMMARY, SERVER_LOG = "answers", "synthesis.json", "server.log"


def main(arguments: Sequence[str], program: str = "synthesize.py") -> int:
    """Asks, filters, writes.

    Args:
        arguments (`Sequence[str]`): The command line.
        program (`str`, *optional*): Put before messages.

    Returns:
        `int`: The exit status: 1 when questions got no answer or no answer was accepted, 130 after Ctrl-C.

    Raises:
        SystemExit: For options that are none.
        ValueError, OSError: For what is wrong with pictures, prompts, teacher or CLIP; names it.
    """
    options = parse_arguments(list(arguments), program=program)
    show_messages(True)
    quiet_progress(True)
    # A run that is told to end keeps what it has, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prompts = [read_prompt(name) for name in options.prompts]
    _check_prompts(prompts)
    if options.push_to_hub:
        check_repo_id(str(options.hub_dataset_id))
        find_token(None, str(options.hub_dataset_id), options.hub_private_repo)
    source = Source(options)
    held_out = load_held_out(options.evaluation_sets, options.image_column)
    return _Run(options, prompts, source, held_out).run()


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    names, tasks = [prompt.name for prompt in prompts], {prompt.task for prompt in prompts}
    if len(set(names)) < len(names):
        raise ValueError(f"--prompts names {max(names, key=names.count)!r} twice.")
    if len(tasks) > 1:
        raise ValueError(f"--prompts are for several tasks ({', '.join(sorted(tasks))}): a data set is for one.")


class _Run:
    """One run, with what it counts."""

    def __init__(self, options: SynthesisOptions, prompts: list[Prompt], source: Source, held_out: HeldOut):
        self.options, self.prompts, self.source, self.held_out = options, prompts, source, held_out
        self.folder = Path(options.output_dir)
        self.sampling = Sampling(options.temperature, options.top_p, options.seed)
        # A server may call a model by a path of its own machine.
        self.where = options.teacher if options.base_url else local(options.teacher, "teacher")
        self.teacher = _teacher_name(self.where, options.teacher_revision, is_here=not options.base_url)
        if options.serve and options.teacher_revision:
            # As `transformers serve` is told of one.
            self.where += f"@{options.teacher_revision}"
        self.seen: list[Seen] = []
        self.journals: dict[str, Journal] = {}
        self.known = 0
        self.counts: Counter[str] = Counter()
        """Answers, refusals and tokens of this run."""
        self.troubles: Counter[str] = Counter()
        """What went wrong with requests, those that were answered later included."""
        self.failed: Counter[str] = Counter()
        """Why questions got no answer."""
        self.seconds = 0.0

    def run(self) -> int:
        with ExitStack() as stack:
            for prompt in self.prompts:
                journal = Journal(self.folder / ANSWERS, self._setting(prompt))
                self.journals[prompt.name] = stack.enter_context(journal)
            self.known = sum(len(journal.records) for journal in self.journals.values())
            try:
                self._ask()
            except (OSError, KeyboardInterrupt) as error:
                count = sum(len(journal.records) for journal in self.journals.values())
                print(
                    f"Stopped: {count:,} answers are kept in {self.folder / ANSWERS}; the same command goes on.",
                    flush=True,
                )
                if isinstance(error, KeyboardInterrupt):
                    return 130
                raise
            return self._finish()

    def _setting(self, prompt: Prompt) -> dict[str, Any]:
        """All that an answer depends on beside its picture."""
        options, is_drawn = self.options, self.options.temperature > 0
        is_asked_elsewhere = options.serve or bool(options.base_url)
        return {
            **self.teacher,
            "prompt": prompt.text,
            "schema": prompt.shape.schema if options.structured_output and is_asked_elsewhere else None,
            "temperature": options.temperature,
            "top_p": options.top_p if is_drawn else None,
            "seed": options.seed if is_drawn else None,
            "max_new_tokens": options.max_new_tokens or prompt.max_new_tokens,
            "image_side": options.image_side,
            "whole_cells": prompt.whole_cells,
        }

    def _questions(self) -> Iterator[Question]:
        """What has no answer yet, picture by picture."""
        self.seen.clear()
        for shown in self.source:
            self.seen.append(self._note(shown))
            if self.seen[-1].held_out is not None:
                continue
            for prompt in self.prompts:
                for sample in range(self.options.samples):
                    if (shown.hash, sample) in self.journals[prompt.name]:
                        self.bar.update()
                    else:
                        yield Question(shown.hash, sample, prompt, shown.stored, shown.row)

    def _note(self, shown: Shown) -> Seen:
        size: list[int] = []
        if any(prompt.task == "grounding" for prompt in self.prompts):
            try:
                size = picture_size(shown.stored)
            except UnreadablePictureError:
                size = []
        return Seen(shown.hash, shown.row, self.held_out.name_of(shown), size)

    def _ask(self) -> None:
        total = len(self.source) * len(self.prompts) * self.options.samples or None
        started = time.monotonic()
        # Without a terminal, disable=None draws no bar.
        self.bar = tqdm(total=total, unit="answer", desc="Asking", disable=None)
        try:
            questions = self._questions()
            first = next(questions, None)
            if first is None:
                return
            whole = _chain(first, questions)
            options = self.options
            if options.serve:
                with served(
                    self.where, self.folder / SERVER_LOG, device=options.device, dtype=options.teacher_dtype
                ) as address:
                    self._ask_servers([address], whole)
            elif options.base_url:
                self._ask_servers(options.base_url, whole)
            else:
                teacher = LocalTeacher(
                    self.where,
                    self.sampling,
                    revision=options.teacher_revision,
                    device=options.device,
                    dtype=options.teacher_dtype,
                    max_new_tokens=options.max_new_tokens,
                    image_side=options.image_side,
                    batch_size=options.batch_size,
                )
                teacher.ask(whole, self._keep, self._fail)
        finally:
            self.seconds = time.monotonic() - started
            self.bar.close()

    def _ask_servers(self, urls: list[str], questions: Iterator[Question]) -> None:
        options = self.options
        endpoints = Endpoints(
            urls,
            self.where,
            self.sampling,
            max_new_tokens=options.max_new_tokens,
            image_side=options.image_side,
            structured_output=options.structured_output,
            concurrency=options.concurrency,
            timeout=options.request_timeout,
            tries=options.request_tries,
            first_wait=options.first_wait,
            api_key=os.environ.get(options.api_key_variable),
            troubles=self.troubles,
        )
        endpoints.ask(questions, self._keep, self._fail)

    def _keep(self, question: Question, answer: Answer) -> None:
        self.journals[question.prompt.name].add(
            {
                "picture": question.picture,
                "sample": question.sample,
                "text": answer.text,
                "finish": answer.finish,
                "prompt_tokens": answer.prompt_tokens,
                "tokens": answer.tokens,
                "seconds": round(answer.seconds, 3),
                "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        self.counts.update(
            answers=1,
            refusals=int(is_refusal(answer.text)),
            prompt_tokens=answer.prompt_tokens,
            tokens=answer.tokens,
        )
        self.bar.update()
        self.bar.set_postfix_str(self._progress(), refresh=False)

    def _progress(self) -> str:
        elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
        said = f"{self.counts['tokens'] / elapsed:,.0f} tokens/s, {self.counts['refusals']:,} refusals"
        if self.troubles:
            said += f", {self.troubles.total():,} retries"
        return said + (f", {self.money:,.2f} spent" if self.options.price else "")

    @property
    def money(self) -> float:
        """Spent in this run, in the unit of `--price`."""
        read, written = self.options.price or (0.0, 0.0)
        return (self.counts["prompt_tokens"] * read + self.counts["tokens"] * written) / 1e6

    def _fail(self, question: Question, why: str) -> None:
        if not self.failed[why]:
            self.bar.write(f"No answer about {question.row}: {why}")
        self.failed[why] += 1
        self.bar.update()

    def _finish(self) -> int:
        rows, pictures = self._read()
        if self.failed:
            named = "; ".join(f"{why} ({count:,})" for why, count in self.failed.most_common(5))
            print(
                f"No answer to {self.failed.total():,} questions: {named}. The same command asks them again.",
                flush=True,
            )
        if not rows:
            raise ValueError(f"There are no answers about the pictures of {self.options.dataset_name}.")
        threshold = self._reject_unlike(rows)
        reject_duplicates(rows, self.options.duplicates, self.options.duplicate_similarity)
        reasons = dict(Counter(row.reason for row in rows if row.reason is not None).most_common())
        splits = write_splits(self.folder, self.source, rows, self.journals, self.sampling)
        made = self._made(rows, pictures, reasons, threshold)
        write_card(self.folder, made, splits)
        page = write_gallery(self.folder, made, splits)
        instructions = {prompt.instruction for prompt in self.prompts}
        instruction = instructions.pop() if len(instructions) == 1 else None
        task = self.prompts[0].task
        longest = max(self.options.max_new_tokens or prompt.max_new_tokens for prompt in self.prompts)
        write_text(
            self.folder / TASK_FILE,
            TaskSettings(task=task, instruction=instruction, max_new_tokens=longest).to_json(),
        )
        self._write_summary(made, threshold)
        print("\n" + table([("answers", f"{len(rows):,}"), ("accepted", f"{made.accepted:,}"), *_lines(reasons)]))
        for why, count in self.source.left_out.items():
            print(f"{count:,} rows: {why}.")
        if self._leaked:
            print(f"{self._leaked:,} pictures belong to evaluation sets: not asked about, and not accepted.")
        print(f"\nlook at it    {page}\ntrain on it   {train_command(self.folder, task, instruction)}", flush=True)
        if not made.accepted:
            print("No answer is accepted.", flush=True)
            return 1
        if self.options.push_to_hub:
            print(push_dataset(self.folder, str(self.options.hub_dataset_id), private=self.options.hub_private_repo))
        return 1 if self.failed else 0

    def _read(self) -> tuple[list[Row], int]:
        """Answers in the order of the pictures, each judged by itself; and how many pictures have some."""
        options, pictures = self.options, 0
        rows: list[Row] = []
        for seen in self.seen:
            before = len(rows)
            rows += [
                read_row(
                    seen,
                    prompt,
                    record,
                    image_side=options.image_side,
                    length=(options.min_words, options.max_words),
                    english=options.english,
                )
                for prompt in self.prompts
                for sample in range(options.samples)
                if (record := self.journals[prompt.name].records.get((seen.hash, sample))) is not None
            ]
            pictures += len(rows) > before
        return rows, pictures

    @property
    def _leaked(self) -> int:
        return sum(seen.held_out is not None for seen in self.seen)

    def _reject_unlike(self, rows: list[Row]) -> Threshold | float | None:
        """Scores the answers that could be read, if there is a CLIP; the threshold, if there is one."""
        options = self.options
        if options.clip_model is None:
            return None
        likeness = Likeness(
            options.clip_model,
            revision=options.clip_revision,
            prefix=options.clip_prefix,
            device=options.device,
            directory=options.vectors_dir,
        )
        chosen: Threshold | float | None = options.clip_threshold
        if options.clip_trusted is not None:
            chosen = choose_threshold(likeness, options.clip_trusted, options.clip_keep, options.image_column)
            print(chosen, flush=True)
        scored = [row for row in rows if row.reason is None]
        wanted = {row.picture for row in scored}
        likeness.encode((shown.hash, shown.stored) for shown in self.source if shown.hash in wanted)
        found = likeness.scores([row.picture for row in scored], [" ".join(row.texts) for row in scored])
        for row, score in zip(scored, found, strict=True):
            row.clip_score = score
        least = chosen.value if isinstance(chosen, Threshold) else chosen
        least = reject_unlike(rows, least, options.clip_lowest_share)
        return chosen if isinstance(chosen, Threshold) else least

    def _made(
        self, rows: list[Row], pictures: int, reasons: dict[str, int], threshold: Threshold | float | None
    ) -> Made:
        options, said = self.options, ""
        if threshold is not None:
            said = f"CLIPScore of at least {threshold:.3f}." if isinstance(threshold, float) else str(threshold)
        settings: dict[str, Any] = {
            "sampling": "greedy"
            if not options.temperature
            else f"temperature {options.temperature:g}, top_p {options.top_p or 1:g}, seed {options.seed}",
            "samples": options.samples,
            "longer side of a picture": f"{options.image_side} pixels",
            "CLIP": f"{options.clip_model}, texts after {options.clip_prefix!r}" if options.clip_model else "none",
            "near-duplicates": f"{options.duplicates}, from {options.duplicate_similarity:g} on",
            "pictures of evaluation sets": f"{self._leaked} left out",
            "evaluation sets": ", ".join(options.evaluation_sets) or "none named",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "vlm_peft": __version__,
        }
        return Made(
            self.folder.resolve().name,
            str(options.dataset_name),
            options.dataset_revision,
            self.teacher["teacher"],
            self.teacher["teacher_revision"],
            stated_licence(options.teacher, revision=options.teacher_revision),
            pictures,
            rows,
            reasons,
            {prompt.name: prompt.text for prompt in self.prompts},
            settings,
            said,
        )

    def _write_summary(self, made: Made, threshold: Threshold | float | None) -> None:
        answered = self.counts["answers"]
        summary = {
            "options": asdict(self.options),
            "teacher": self.teacher,
            "journals": {name: journal.name for name, journal in self.journals.items()},
            "pictures": made.pictures,
            "answers": len(made.rows),
            "accepted": made.accepted,
            "rejected": made.reasons,
            "left_out_rows": dict(self.source.left_out),
            "leaked_pictures": self._leaked,
            "threshold": asdict(threshold) if isinstance(threshold, Threshold) else threshold,
            "this_run": {
                "answers": answered,
                "known_before": self.known,
                "refusals": self.counts["refusals"],
                "tokens_read": self.counts["prompt_tokens"],
                "tokens_written": self.counts["tokens"],
                "seconds": round(self.seconds, 3),
                "money": round(self.money, 4) if self.options.price else None,
                "retried": dict(self.troubles),
                "without_answer": dict(self.failed),
            },
        }
        write_text(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _chain(first: Question, rest: Iterator[Question]) -> Iterator[Question]:
    yield first
    yield from rest


def _lines(reasons: dict[str, int]) -> list[tuple[str, str]]:
    return [(f"  {reason}", f"{count:,}") for reason, count in reasons.items()]


def _teacher_name(name: str, revision: str | None, *, is_here: bool) -> dict[str, Any]:
    """Who answers: its name, and which one of that name: the Hub's commit, or of a folder the hash of its weights."""
    folder = Path(name)
    if not folder.is_dir():
        # Which commit a server elsewhere has loaded is for whoever started it to say.
        found = AutoConfig.from_pretrained(name, revision=revision)._commit_hash if is_here else None
        return {"teacher": name, "teacher_revision": found or revision}
    digest = xxhash.xxh3_128()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]):
        with path.open("rb") as file:
            digest.update(path.name.encode())
            while block := file.read(2**24):
                digest.update(block)
    return {"teacher": folder.resolve().name, "teacher_revision": digest.hexdigest()}
