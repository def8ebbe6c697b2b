"""Figures of eval/throughput.py as tables, on the screen and in eval/THROUGHPUT.md."""

import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from throughput_data import CAPTIONS_PER_PICTURE, PRESETS

FLICKR30K_PICTURES = 29_000
REPORT = Path(__file__).with_name("THROUGHPUT.md")
PARTS = ("decode", "collate", "encode", "language model", "head", "rest")

# Dense bf16 FLOP/s of the data sheets.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def compare_losses(losses: dict[str, list[float]], tolerance: float) -> float:
    """Largest relative difference of any side's loss from the peer's, over the steps that all have.

    Raises:
        ValueError: when it is above the tolerance; names side and step.
    """
    reference = losses["peer"]
    largest = 0.0
    for side, values in losses.items():
        for step, (value, expected) in enumerate(zip(values, reference, strict=False), start=1):
            difference = abs(value - expected) / abs(expected)
            if not difference <= tolerance:
                raise ValueError(
                    f"The losses disagree: at step {step} {side} has {value:.6f} and the peer {expected:.6f}, a "
                    f"relative difference of {difference:.1e}, where at most {tolerance:.0e} is rounding."
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
    """Speed, memory and agreement of both sides."""
    peer, ours = result["sides"]["peer"], result["sides"]["ours"]
    captions = result["captions_per_step"]
    steps = result["steps_per_epoch"]
    first = sum(ours["prepare"].values()) + steps * ours["seconds"]
    later = result["ratios"]["ours"]
    epoch = {"peer": steps * peer["seconds"], "ours": steps * ours["seconds"]}
    large = FLICKR30K_PICTURES * CAPTIONS_PER_PICTURE

    def rate(count: float, seconds: float) -> str:
        return _number(count / seconds)

    def memory(side: dict, above: bool = False) -> float:
        return (side["memory"]["peak"] - above * side["memory"]["before"]) / 1e6

    rows = [
        ["captions/s from the second epoch", rate(captions, peer["seconds"]), rate(captions, ours["seconds"]), later],
        [
            "captions/s in the first epoch, cache and layout included",
            rate(captions, peer["seconds"]),
            rate(captions * steps, first),
            epoch["peer"] / first,
        ],
        [
            "decoder positions/s",
            rate(peer["positions"], peer["seconds"]),
            rate(ours["positions"], ours["seconds"]),
            None,
        ],
        [
            "decoder positions a caption",
            _number(peer["positions"] / captions),
            _number(ours["positions"] / captions),
            ours["positions"] / peer["positions"],
        ],
        [
            f"seconds for an epoch of {result['pictures']:,} pictures, the first",
            _number(epoch["peer"]),
            _number(first),
            first / epoch["peer"],
        ],
        ["seconds for each later epoch", _number(epoch["peer"]), _number(epoch["ours"]), epoch["ours"] / epoch["peer"]],
        [
            f"minutes for {FLICKR30K_PICTURES:,} pictures x {CAPTIONS_PER_PICTURE}, reckoned from captions/s",
            _number(large / captions * peer["seconds"] / 60),
            _number(large / captions * ours["seconds"] / 60),
            ours["seconds"] / peer["seconds"],
        ],
        ["peak memory, MB", _number(memory(peer)), _number(memory(ours)), memory(ours) / memory(peer)],
        [
            "of which above the loaded model, MB",
            _number(memory(peer, True)),
            _number(memory(ours, True)),
            memory(ours, True) / memory(peer, True),
        ],
    ]
    if result["gpu"] is not None:
        rows.append(["model FLOP utilisation", "", utilisation(result, result["gpu"]), None])
    cells = [[name, theirs, own, "" if ratio is None else f"{_ratio(ratio)}"] for name, theirs, own, ratio in rows]
    return table(["training", "peer", "ours", "ours / peer"], cells)


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def shares_table(result: dict) -> list[str]:
    """Where a step's time goes, in ms and per cent."""
    rows = []
    for part in PARTS:
        row = [part]
        for side in ("peer", "ours"):
            shares = result["sides"][side]["shares"]
            total = sum(shares.values())
            row.append(f"{1e3 * shares[part]:,.1f} ms  {100 * shares[part] / total:.1f} %")
        rows.append(row)
    return table(["time of a step", "peer", "ours"], rows)


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
    versions = ", ".join(f"{name} {version(name)}" for name in ("vlm-peft", "torch", "transformers", "trl", "peft"))
    agreement = (
        f"The losses of all sides agree over {result['loss_steps']} steps in fp32: largest relative difference "
        f"{result['loss_difference']:.1e}, features stored in float16 included."
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
