"""This project beside its peer in one run: speed, memory, and the same losses and texts.

    python eval/throughput.py                              # preset cpu, a few minutes on two cores
    python eval/throughput.py --preset b32 --write         # one GPU; the figures go to eval/THROUGHPUT.md
    python eval/throughput.py --preset l14-336 --write
    python eval/throughput.py --switches "no feature cache" --no_generation
    python eval/throughput.py --preset grpo                # training for the score beside TRL's GRPOTrainer

The peer is `transformers.LlavaForConditionalGeneration` with TRL's `SFTTrainer` and its vision collator on one row a
caption. Each side lives in a process of its own, and the sides take turns, step by step, so that a machine that gets
slower gets slower for all of them. The run fails when losses or generated texts differ.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .data import CAPTIONS_PER_PICTURE, PRESETS, VOCABULARY, Preset, make_captions, make_pictures, make_tokenizer
from .generation import BATCH_SIZE, MAX_NEW_TOKENS, run_generation
from .process import run_side
from .report import command_line, compare_losses, device_text, section, write_report
from .sides import OURS, PEER

LOSS_TOLERANCE = 1e-4
"""Relative, a step; fp32 sums in another order, and features stored in float16, stay below it."""

BEAMS = 3

GRPO = "grpo"


class Side:
    """A process of one side, as the parent sees it.

    Args:
        name: `peer`, `ours`, or the idea that is switched in ours.
        body: `run_side` or `run_generation`.
        preset, dtype, folder, paths, tokenizer: See there.

    Raises:
        RuntimeError: from any method, with the process's traceback, when the process failed.
    """

    def __init__(
        self, name: str, body: Callable, preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer
    ):
        self.name = name
        # Forked, the libraries are imported once, and each process counts the same pages of theirs. CUDA, which peft's
        # import asks for, cannot be used in a forked process.
        context = multiprocessing.get_context("fork" if preset.device == "cpu" else "spawn")
        self._connection, theirs = context.Pipe()
        own = folder / f"{body.__name__}-{dtype}-{name.replace(' ', '-')}"
        own.mkdir()
        self._process = context.Process(
            target=body, args=(theirs, name, preset, dtype, own, paths, tokenizer), daemon=preset.workers == 0
        )
        self._process.start()
        theirs.close()

    def start(self, *command) -> None:
        """Sends a command."""
        self._connection.send(command)

    def ask(self, *command):
        """Sends a command and waits for the answer."""
        self.start(*command)
        return self.receive()

    def receive(self):
        """The next answer."""
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: the process ended with status {self._process.exitcode}.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Lets a generating process end."""
        self._connection.send(None)

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()


def train_in_turns(sides: list[Side], preset: Preset, turns: int, profile: bool) -> dict[str, dict]:
    """Prepares the sides one after the other, lets them train in turns, and collects what they measured."""
    results: dict[str, dict] = {}
    is_cuda = preset.device == "cuda"
    for side in sides if is_cuda else []:
        # Together: only a CPU's cores and memory would be fought over.
        side.start("prepare")
    for side in sides:
        answer = side.receive() if is_cuda else side.ask("prepare")
        results[side.name] = {"prepare": answer["seconds"], **answer, "turns": [], "shares": {}}
        say(f"  {side.name} is ready")
    expected = results[sides[0].name]["trainable"]
    for name, result in results.items():
        if result["trainable"] != expected:
            raise ValueError(
                f"{name} does not train what {sides[0].name} trains: {set(result['trainable']) ^ set(expected)}."
            )
    for turn in range(turns + 1):
        # The first turn warms up; the order changes from turn to turn, so that no side is always the one after another.
        order = sides if turn % 2 else sides[::-1]
        for side in order:
            answer = side.ask("turn", preset.warm_up_steps, preset.steps, profile and not is_cuda)
            if turn:
                results[side.name]["turns"].append(answer["seconds"])
                add_shares(results[side.name]["shares"], answer, turns)
        say(f"  turn {turn} of {turns}" + ("" if turn else ", a warm-up"))
    if is_cuda and profile:
        # Waiting for the GPU at each border costs time, so these steps are not the timed ones.
        for side in sides:
            if side.name not in (PEER, OURS):
                continue
            add_shares(results[side.name]["shares"], side.ask("turn", preset.warm_up_steps, 3, True), 1)
    for side in sides:
        results[side.name] |= side.ask("stop")
        (first, before), (last, after) = (results[side.name]["tokens"][place] for place in (0, -1))
        results[side.name]["positions"] = (after - before) / (last - first)
        results[side.name]["seconds"] = statistics.median(results[side.name]["turns"])
    return results


def add_shares(total: dict[str, float], answer: dict, turns: int) -> None:
    """Adds one turn's seconds by part, a step; what no part has is `rest`."""
    if not answer["shares"]:
        return
    step = {part: seconds / answer["steps"] for part, seconds in answer["shares"].items()}
    step["rest"] = answer["seconds"] - sum(step.values())
    for part in ("decode", "collate", "encode", "language model", "head", "rest"):
        total[part] = total.get(part, 0.0) + step.get(part, 0.0) / turns


def generate_in_turns(preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer) -> tuple[list, str]:
    """Greedy and beam search of both sides; rows of the table, and what was compared.

    Raises:
        ValueError: when texts differ in fp32.
    """
    sides = [Side(name, run_generation, preset, dtype, folder, paths, tokenizer) for name in (OURS, PEER)]
    ours, peer = sides
    many = preset.generated_pictures
    # One by one takes longest and needs no more than these for a rate.
    few = min(many, 16)
    rows: list[tuple] = []
    try:
        for side in sides:
            side.ask("prepare")
        for num_beams, title in ((1, "greedy"), (BEAMS, f"{BEAMS} beams")):
            jobs = [
                (peer, "one by one", few if num_beams == 1 else few // 2),
                (peer, "batched", many),
                (ours, "first time", many),
                (ours, "cached", many),
            ]
            seconds: dict[str, list[float]] = {way: [] for _, way, _ in jobs}
            texts: dict[str, list[str]] = {}
            # A GPU's first turn sets up its libraries.
            warm_up = int(preset.device == "cuda")
            for turn in range(-warm_up, preset.turns):
                for side, way, count in jobs if turn % 2 else jobs[::-1]:
                    spent, texts[way] = side.ask(way, count, num_beams)
                    if turn >= 0:
                        seconds[way].append(spent / count)
            if dtype == "fp32":
                compare_texts(texts)
            for _, way, _ in jobs:
                ratios = [
                    statistics.median(a / b for a, b in zip(seconds[base], seconds[way], strict=True))
                    for base in ("one by one", "batched")
                ]
                name = {"cached": "ours, features cached", "first time": "ours, pictures decoded and encoded"}.get(way)
                rows.append((f"{title}: {name or f'peer {way}'}", statistics.median(seconds[way]), 1, ratios))
            say(f"  generation, {title}")
    finally:
        for side in sides:
            side.kill()
    note = f"{many} pictures ({few} one by one), batches of {BATCH_SIZE}, {MAX_NEW_TOKENS} tokens a text. " + (
        "All texts are equal, word for word." if dtype == "fp32" else "Texts are compared in fp32 only."
    )
    return rows, note


def compare_texts(texts: dict[str, list[str]]) -> None:
    """All ways must have generated the same texts for the pictures that they share.

    Raises:
        ValueError: naming way and picture.
    """
    for way, generated in texts.items():
        for index, (text, expected) in enumerate(zip(generated, texts["batched"], strict=False)):
            if text != expected or not text:
                raise ValueError(f"The texts differ: for picture {index} {way!r} gave {text!r}, the peer {expected!r}.")


def measure(preset: Preset, switches: list[str], with_generation: bool, keep: Callable[[dict], None]) -> dict:
    """Runs all sides; everything that the report shows.

    Args:
        keep: Called with what is known so far after each part, since a lent device may be taken back.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_generation = with_generation and bool(preset.peers)
        paths = make_pictures(folder, max(preset.pictures, preset.generated_pictures if with_generation else 0))
        tokenizer = make_tokenizer()
        used = paths[: preset.pictures]
        names = [*preset.peers, OURS, *switches]
        sides = [Side(each, run_side, preset, preset.dtype, folder, used, tokenizer) for each in names]
        try:
            say(f"Training: {', '.join(names)}")
            results = train_in_turns(sides, preset, preset.turns, profile=True)
        finally:
            for side in sides:
                side.kill()
        result = _training_result(preset, results, switches, tokenizer)
        if preset.peers:
            losses = {each: side["losses"] for each, side in results.items()}
            if preset.dtype != "fp32":
                result["total_seconds"] = time.perf_counter() - started
                keep(result)
                say("Losses in fp32")
                check = dataclasses.replace(preset, pictures_per_step=2, steps=1, warm_up_steps=0, workers=0)
                sides = [Side(each, run_side, check, "fp32", folder, used[:8], tokenizer) for each in (PEER, OURS)]
                try:
                    losses = {each: side["losses"] for each, side in train_in_turns(sides, check, 2, False).items()}
                finally:
                    for side in sides:
                        side.kill()
            result["fp32_losses"] = losses
            result["loss_steps"] = min(len(values) for values in losses.values())
            result["loss_difference"] = compare_losses(losses, LOSS_TOLERANCE)
        if with_generation:
            result["total_seconds"] = time.perf_counter() - started
            keep(result)
            say("Generation")
            result["generation"], result["generation_note"] = generate_in_turns(
                preset, preset.dtype, folder, paths, tokenizer
            )
            if preset.dtype != "fp32":
                keep(result)
                check = dataclasses.replace(preset, generated_pictures=16, turns=1)
                generate_in_turns(check, "fp32", folder, paths, tokenizer)
    result["total_seconds"] = time.perf_counter() - started
    keep(result)
    return result


def _training_result(preset: Preset, results: dict[str, dict], switches: list[str], tokenizer) -> dict:
    """What the training part tells, before losses are compared."""
    captions = [caption for index in range(preset.pictures) for caption in make_captions(index)]
    # Each caption ends with the end of the turn.
    labels = (
        sum(len(tokenizer.encode(caption)) + 1 for caption in captions) / preset.pictures * preset.pictures_per_step
    )
    ours, sizes = results[OURS], results[OURS]["sizes"]
    image_tokens = preset.pictures_per_step * (preset.vision["image_size"] // preset.vision["patch_size"]) ** 2
    return {
        "summary": preset.summary,
        "dtype": preset.dtype,
        "rank": preset.lora["r"],
        "pictures": preset.pictures,
        "pictures_per_step": preset.pictures_per_step,
        "captions_per_step": preset.pictures_per_step * CAPTIONS_PER_PICTURE,
        "steps_per_epoch": preset.pictures / preset.pictures_per_step,
        "turns": preset.turns,
        "peers": list(preset.peers),
        "sides": results,
        "ratios": {each: paired_ratio(results, each, OURS) for each in preset.peers},
        "switches": {each: paired_ratio(results, each, OURS) for each in switches},
        "flops_per_step": ours["positions"] * (4 * sizes["frozen"] + 6 * sizes["lora"])
        + labels * 4 * VOCABULARY * preset.text["hidden_size"]
        + image_tokens * 6 * sizes["projector"],
        "loss_steps": 0,
        "loss_difference": None,
        "generation": [],
        "generation_note": "",
        "gpu": ours["gpu"],
        "device": device_text(ours["gpu"], ours["threads"]),
    }


def paired_ratio(results: dict[str, dict], slow: str, fast: str) -> float:
    """Median over turns of one side's seconds divided by the other's."""
    return statistics.median(a / b for a, b in zip(results[slow]["turns"], results[fast]["turns"], strict=True))


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Preset, argparse.Namespace]:
    """The preset with what the command line changes in it.

    Raises:
        SystemExit: for an option that makes no sense, in one line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--preset",
        choices=[*PRESETS, GRPO],
        default="cpu",
        help=f"{GRPO} measures training for the score, and only --pictures_per_step goes with it",
    )
    parser.add_argument("--pictures", type=int, help="of an epoch")
    parser.add_argument("--pictures_per_step", type=int, help="of an optimizer step, on both sides")
    parser.add_argument("--steps", type=int, help="timed steps of each side in a turn")
    parser.add_argument("--turns", type=int, help="how often the sides take turns")
    parser.add_argument("--max_length", type=int, help="tokens of a packed sequence")
    parser.add_argument("--workers", type=int, help="processes that load data, on both sides")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the timed steps; losses are compared in fp32")
    parser.add_argument("--generated_pictures", type=int)
    parser.add_argument(
        "--switches", nargs="*", metavar="IDEA", help="ideas to switch, one at a time; the preset's by default"
    )
    parser.add_argument(
        "--contrastive", choices=["demo", "b32"], help="only: training a CLIP beside a plain Trainer, of this shape"
    )
    parser.add_argument("--no_generation", action="store_true")
    parser.add_argument(
        "--alone", action="store_true", help="without the peer: a whole epoch, or more switches than fit beside it"
    )
    parser.add_argument("--json", metavar="FILE", help="also keep every figure there, after each part of the run")
    parser.add_argument("--write", action="store_true", help="write the section of the preset into eval/THROUGHPUT.md")
    options = parser.parse_args(arguments)
    preset = PRESETS["cpu" if options.preset == GRPO else options.preset]
    names = {field.name for field in dataclasses.fields(Preset)} - {"switches"}
    changes = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.alone:
        changes["peers"] = ()
    changes.setdefault("pictures_per_step", min(preset.pictures_per_step, changes.get("pictures", preset.pictures)))
    preset = dataclasses.replace(preset, **changes)
    unknown = set(options.switches or ()) - set(preset.switches)
    if unknown:
        parser.error(
            f"unknown idea {', '.join(sorted(unknown))}; preset {options.preset} has: {', '.join(preset.switches)}"
        )
    if preset.pictures % preset.pictures_per_step:
        parser.error(
            "--pictures must be a multiple of --pictures_per_step, got "
            f"{preset.pictures} and {preset.pictures_per_step}"
        )
    if min(preset.pictures, preset.pictures_per_step, preset.steps, preset.turns) < 1:
        parser.error("--pictures, --pictures_per_step, --steps and --turns must be at least 1")
    return preset, options


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and writes when asked to; returns the exit status."""
    preset, options = parse_arguments(arguments)
    if options.contrastive:
        from .contrastive import measure_contrastive

        say(measure_contrastive(options.contrastive, options.pictures_per_step or 32, options.pictures or 128))
        return 0
    if options.preset == GRPO:
        from .rollouts import measure_rollouts

        print(measure_rollouts(options.pictures_per_step))
        return 0
    switches = list(preset.switches) if options.switches is None else options.switches

    def keep(result: dict) -> None:
        text = section(result, command_line())
        if options.write:
            write_report(options.preset, text)
        if options.json is not None:
            Path(options.json).write_text(json.dumps({"command": command_line(), **result}), encoding="utf-8")
            Path(options.json).with_suffix(".md").write_text(text + "\n", encoding="utf-8")

    try:
        result = measure(preset, switches, not options.no_generation, keep)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"throughput.py: {error}") from None
    print(f"\n{section(result, command_line())}")
    return 0
