"""Choices between equal ways of computing something on a CPU: measured once on each machine, not told by its name.

Stage: below everything that computes. Which way is faster depends on instructions, caches and threads that differ from
machine to machine. The ways round differently, so a choice is kept in a file: a run that is resumed computes as before.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from datasets.config import HF_DATASETS_CACHE

from ...json_files import read_json

_FILE = "vlm_peft_cpu_choices.json"
_SECONDS = 0.8
"""For all candidates together, if none takes longer than that for two runs."""

_GAIN = 0.95
"""Of the first candidate's time: another must take less, so that noise changes nothing."""

_chosen: dict[str, str] = {}


def fastest(task: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """Name of the candidate that takes the least time on this machine, with this number of threads.

    Args:
        task (`str`): What is computed, with its dtype and shape: the choice is known by it.
        candidates (`Mapping[str, Callable]`): Name -> one run of it. All give the same result, and the first is taken
            unless another is faster by a twentieth.

    Returns:
        `str`: Found in a file beside the feature cache, or measured in less than a second and written there.
    """
    key, names = f"{_machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads: {task}", list(candidates)
    if _chosen.get(key) not in names:
        chosen = _read().get(key)
        if chosen not in names:
            measured = _measure(candidates)
            # Another process may have measured meanwhile: one choice stands.
            known = _read()
            chosen = known[key] if known.get(key) in names else measured
            _write(known | {key: chosen})
        _chosen[key] = str(chosen)
    return _chosen[key]


def _measure(candidates: Mapping[str, Callable[[], object]]) -> str:
    """In turns, so that a machine that gets busy gets busy for all; of each candidate the best time counts."""
    times = dict.fromkeys(candidates, float("inf"))
    started = time.perf_counter()
    rounds = 0
    # The first round loads libraries and fills caches.
    while rounds < 2 or (rounds < 8 and time.perf_counter() - started < _SECONDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
        rounds += 1
    first, best = next(iter(times)), min(times, key=lambda name: times[name])
    return best if times[best] < _GAIN * times[first] else first


@functools.cache
def _machine() -> str:
    """Model of the processor and a hash of its instruction sets, which a virtual machine may hide."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    described = " ".join(fields.get(name, "") for name in ("cpu family", "model", "stepping", "flags", "Features"))
    return f"{fields.get('model name', platform.machine())} {xxhash.xxh3_64_hexdigest(described.encode())}"


def _path() -> Path:
    return Path(HF_DATASETS_CACHE) / _FILE


def _read() -> dict[str, str]:
    """Choices on disk; none where the file is missing or damaged."""
    try:
        return read_json(_path())
    except (OSError, ValueError):
        return {}


def _write(known: dict[str, str]) -> None:
    """Replaces the file as a whole; where it cannot be written, the choice lasts as long as the process."""
    temporary = _path().with_suffix(f".{os.getpid()}")
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")
        temporary.replace(_path())
    except OSError:
        with suppress(OSError):
            temporary.unlink()
