"""Figures of eval/throughput.py as tables, on the screen and in eval/THROUGHPUT.md."""

import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlm_peft import __version__

from .data import CAPTIONS_PER_PICTURE, PRESETS
from .sides import OURS, PEER

FLICKR30K_PICTURES = 29_000
REPORT = Path(__file__).resolve().parents[1] / "THROUGHPUT.md"
PARTS = ("decode", "collate", "encode", "language model", "head", "rest")

# Dense bf16 FLOP/s of the data sheets.
_PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def compare_losses(losses: dict[str, list[float]], tolerance: float) -> float:
    """Largest relative difference of any side's loss from the peer's, over the steps that all have.

    AdamW divides each gradient by its size, so that rounding of the smallest ones moves weights as much as anything
    else: the tolerance is that of the first step, and grows with every update.

    Raises:
        ValueError: when it is above the tolerance; names side and step.
    """
    reference = losses[PEER]
    largest = 0.0
    for side, values in losses.items():
        for step, (value, expected) in enumerate(zip(values, reference, strict=False), start=1):
            difference = abs(value - expected) / abs(expected)
            if not difference <= tolerance * step:
                raise ValueError(
                    f"The losses disagree: at step {step} {side} has {value:.6f} and the peer {expected:.6f}, a "
                    f"relative difference of {difference:.1e}, where at most {tolerance * step:.0e} is rounding."
                )
            largest = max(largest, difference)
    return largest


def device_text(gpu: str | None, threads: int) -> str:
    """The device in words, without the machine's name."""
    if gpu is not None:
        return gpu
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        model = found.group(1) if found else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {threads} torch threads"


def utilisation(result: dict, gpu: str | None) -> str:
    """Model FLOP utilisation of our side: 4 N for frozen weights, 6 N for trained ones, attention not counted."""
    peak = next((flops for name, flops in _PEAK_FLOPS.items() if gpu and name in gpu), None)
    if peak is None:
        return "-"
    return f"{100 * result['flops_per_step'] / result['sides']['ours']['seconds'] / peak:.1f} %"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table whose columns line up as plain text, too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    head = "| " + " | ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)) + " |"
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def training_table(result: dict) -> list[str]:
    """Speed and memory of all sides, and how ours compares with each peer."""
    sides, peers = result["sides"], result["peers"]
    captions, steps = result["captions_per_step"], result["steps_per_epoch"]
    large = FLICKR30K_PICTURES * CAPTIONS_PER_PICTURE

    def first_epoch(name: str) -> float:
        return sum(sides[name]["prepare"].values()) + steps * sides[name]["seconds"]

    def memory(name: str, above: bool = False) -> float:
        side = sides[name]["memory"]
        return (side["peak"] - above * side["before"]) / 1e6

    def seconds(name: str) -> float:
        return sides[name]["seconds"]

    # Title, the figure of a side, and its ratio, ours against a peer.
    lines: list[tuple[str, Callable, Callable | None]] = [
        (
            "captions/s from the second epoch",
            lambda name: captions / seconds(name),
            lambda name: result["ratios"][name],
        ),
        (
            "captions/s in the first epoch, cache and layout included",
            lambda name: captions * steps / first_epoch(name),
            lambda name: first_epoch(name) / first_epoch(OURS),
        ),
        ("decoder positions/s", lambda name: sides[name]["positions"] / seconds(name), None),
        (
            "decoder positions a caption",
            lambda name: sides[name]["positions"] / captions,
            lambda name: sides[OURS]["positions"] / sides[name]["positions"],
        ),
        (
            f"seconds for an epoch of {result['pictures']:,} pictures, the first",
            first_epoch,
            lambda name: first_epoch(OURS) / first_epoch(name),
        ),
        (
            "seconds for each later epoch",
            lambda name: steps * seconds(name),
            lambda name: seconds(OURS) / seconds(name),
        ),
        (
            f"seconds for {FLICKR30K_PICTURES:,} pictures x {CAPTIONS_PER_PICTURE}, reckoned from captions/s",
            lambda name: large / captions * seconds(name),
            lambda name: seconds(OURS) / seconds(name),
        ),
        ("peak memory, MB", memory, lambda name: memory(OURS) / memory(name)),
        (
            "of which above the loaded model, MB",
            lambda name: memory(name, True),
            lambda name: memory(OURS, True) / memory(name, True),
        ),
    ]
    cells = [
        [
            title,
            *(_number(figure(name)) for name in (*peers, OURS)),
            *(_ratio(ratio(name)) if ratio else "" for name in peers),
        ]
        for title, figure, ratio in lines
    ]
    if result["gpu"] is not None:
        cells.append(
            ["model FLOP utilisation", *("" for _ in peers), utilisation(result, result["gpu"]), *("" for _ in peers)]
        )
    return table(["training", *peers, OURS, *(f"{OURS} / {name}" for name in peers)], cells)


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def shares_table(result: dict) -> list[str]:
    """Where a step's time goes, in ms and per cent."""
    rows = []
    names = [name for name in (PEER, OURS) if result["sides"].get(name, {}).get("shares")]
    for part in PARTS:
        row = [part]
        for side in names:
            shares = result["sides"][side]["shares"]
            total = sum(shares.values())
            row.append(f"{1e3 * shares[part]:,.1f} ms  {100 * shares[part] / total:.1f} %")
        rows.append(row)
    return table(["time of a step", *names], rows)


def ideas_table(result: dict) -> list[str]:
    """What each idea is worth: one switched at a time."""
    rows = []
    for side, ratio in result["switches"].items():
        own = result["sides"][side]
        rows.append(
            [
                side,
                _number(result["captions_per_step"] / own["seconds"]),
                f"{_ratio(ratio)}",
                _number(own["memory"]["peak"] / 1e6),
            ]
        )
    return table(["one idea switched", "captions/s", "time against ours", "peak memory, MB"], rows)


def generation_table(result: dict) -> list[str]:
    """Generation on both sides."""
    rows = []
    for name, seconds, count, ratios in result["generation"]:
        cells = [f"{_ratio(value)}" for value in ratios] or ["", ""]
        rows.append([name, _number(count / seconds), *cells])
    return table(["generation", "captions/s", "against one by one", "against the peer batched"], rows)


def section(result: dict, command: str) -> str:
    """The preset's section of the report."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("vlm-peft", "torch", "transformers", "trl", "peft"))
    agreement = (
        f"The losses of all sides agree over {result['loss_steps']} steps in fp32: largest relative difference "
        f"{result['loss_difference']:.1e}, features stored in float16 included."
        if result["loss_difference"] is not None
        else "Losses were not compared in this run."
    )
    prepare = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["sides"]["ours"]["prepare"].items())
    lines = [
        f"{result['summary']}; vocabulary 151,936; {result['dtype']}, LoRA rank {result['rank']} on all linear layers "
        f"of the decoder and the projector in full, AdamW; {result['pictures_per_step']} pictures = "
        f"{result['captions_per_step']} captions a step on both sides; JPEG files of 500 x 375.",
        "",
        f"- Command: `{command}`",
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; it took {result['total_seconds']:.0f} s",
        f"- Device: {result['device']}",
        f"- Versions: Python {platform.python_version()}, {versions}",
        f"- Times are medians of {result['turns']} turns that the sides take one after the other; ratios are medians "
        "of each turn's ratio.",
        f"- {agreement}",
        f"- Before the first step ours spends once, for {result['pictures']:,} pictures: {prepare}.",
        "",
        *training_table(result),
        "",
        *shares_table(result),
    ]
    if result["switches"]:
        lines += ["", *ideas_table(result)]
    if result["generation"]:
        lines += ["", *generation_table(result), "", result["generation_note"]]
    return "\n".join(lines)


def _version(name: str) -> str:
    """Of an installed package; ours also runs from a clone."""
    try:
        return version(name)
    except PackageNotFoundError:
        return __version__


def write_report(preset: str, text: str, path: Path = REPORT) -> None:
    """Replaces one preset's section and keeps the others."""
    sections = {name: f"Not measured. `python eval/throughput.py --preset {name} --write`" for name in PRESETS}
    if path.exists():
        parts = re.split(r"^## Preset `([^`]+)`\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        sections |= {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True) if name in PRESETS}
    sections[preset] = text
    lines = [
        "# Throughput beside the peer",
        "",
        "Written by `eval/throughput.py --write`, one section a preset. The peer is",
        "`transformers.LlavaForConditionalGeneration` with TRL's `SFTTrainer` and its vision collator on one row a",
        "caption, with the same weights, captions, LoRA and optimizer.",
        "",
    ]
    for name, body in sections.items():
        lines += [f"## Preset `{name}`", "", body, ""]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines), encoding="utf-8")
    temporary.rename(path)


def command_line() -> str:
    """The command as it was given, without the interpreter's path."""
    return " ".join(["python eval/throughput.py", *sys.argv[1:]])
