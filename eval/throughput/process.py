"""One side of eval/throughput.py in a process of its own: trains in turns, watches its clock and its memory.

The parent lets one process run at a time. A side's trainer is an ordinary one in an ordinary `train()`; a callback
holds it between steps until its next turn comes.
"""

import gc
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .data import Preset
from .sides import COMPILED_PEER, PEER, Prepared, prepare_ours, prepare_peer

_STATUS = Path("/proc/self/status")


class Clock:
    """Seconds by section while it is on; waits for the GPU at each border."""

    def __init__(self, is_cuda: bool):
        self.is_on = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_cuda = is_cuda

    def now(self) -> float:
        """Seconds, after all work that was started."""
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self):
        """A moment that is not waited for: a GPU that has done all its work stands still until the host comes again."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, mark) -> float:
        """Seconds from a mark until all work is done that was started."""
        if not self._is_cuda:
            return time.perf_counter() - mark
        end = self.mark()
        end.synchronize()
        return mark.elapsed_time(end) / 1e3

    @contextmanager
    def section(self, name: str, *, of: str | None = None) -> Iterator[None]:
        """Adds the block's time to `name` and takes it out of the section `of` that contains it."""
        if not self.is_on:
            yield
            return
        start = self.now()
        yield
        spent = self.now() - start
        self.seconds[name] += spent
        if of is not None:
            self.seconds[of] -= spent

    def timed(self, name: str, function: Callable, *, of: str | None = None) -> Callable:
        """The function with its time counted."""

        def wrapper(*args, **kwargs):
            with self.section(name, of=of):
                return function(*args, **kwargs)

        return wrapper


def watch(clock: Clock, prepared: Prepared) -> None:
    """Puts the clock at the borders of decoding, encoder, decoder, head and optimizer.

    The head is what a model's forward does after its trunk, and what its backward does before the gradient arrives at
    the trunk's output; that holds for any kernel.
    """
    trainer = prepared.trainer
    model = trainer.model.get_base_model()
    trunk = model.model
    trainer.train_dataset.__getitems__ = clock.timed("decode", trainer.train_dataset.__getitems__)
    collate = trainer.data_collator
    trainer.data_collator = clock.timed("collate", collate)
    kind = type(prepared.image_processor)
    kind.preprocess = clock.timed("decode", kind.preprocess, of="collate")
    trunk.vision_tower.forward = clock.timed("encode", trunk.vision_tower.forward, of="language model")
    model.forward = clock.timed("head", model.forward)

    run_trunk, marks = trunk.forward, {}

    def forward(*args, **kwargs):
        with clock.section("language model", of="head"):
            outputs = run_trunk(*args, **kwargs)
        if clock.is_on and outputs.last_hidden_state.requires_grad:
            outputs.last_hidden_state.register_hook(lambda gradient: marks.update(border=clock.now()))
        return outputs

    trunk.forward = forward
    run_backward = trainer.accelerator.backward

    def backward(*args, **kwargs):
        if not clock.is_on:
            return run_backward(*args, **kwargs)
        start = clock.now()
        run_backward(*args, **kwargs)
        stop = clock.now()
        clock.seconds["head"] += marks["border"] - start
        clock.seconds["language model"] += stop - marks["border"]
        return None

    trainer.accelerator.backward = backward


class Turns(TrainerCallback):
    """Holds the trainer between steps: `("turn", warm_up, steps, profile)` lets it go on, `("stop",)` ends it."""

    def __init__(self, connection: Connection, clock: Clock, is_cuda: bool):
        self._connection = connection
        self._clock = clock
        self._is_cuda = is_cuda
        self._warm_up = self._left = self._steps = 0
        self._is_profiled = False
        self._start: Any = None
        self.losses: list[float] = []
        self.tokens: list[tuple[int, int]] = []

    def _wait(self, control) -> None:
        if self._is_cuda:
            # What this side does not use must not shrink what the others can take.
            torch.cuda.empty_cache()
        command, *arguments = self._connection.recv()
        if command == "stop":
            control.should_training_stop = True
            return
        self._warm_up, self._steps, self._is_profiled = arguments
        self._clock.is_on = self._is_profiled and not self._warm_up
        self._left = self._warm_up + self._steps
        self._start = self._clock.mark()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Waits for the first turn."""
        forget_peak(self._is_cuda)
        self._wait(control)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Counts the step; at the end of the turn reports and waits."""
        self._left -= 1
        if self._left == self._steps and self._warm_up:
            self._start = self._clock.mark()
            self._clock.is_on = self._is_profiled
        if self._left == 0:
            seconds = self._clock.since(self._start) / self._steps
            shares, self._clock.seconds = dict(self._clock.seconds), defaultdict(float)
            self._clock.is_on = False
            self._connection.send({"seconds": seconds, "shares": shares, "steps": self._steps})
            self._wait(control)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Keeps the loss that is logged, and the step with the tokens so far."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.tokens.append((state.global_step, int(logs["num_tokens"])))


def forget_peak(is_cuda: bool) -> None:
    """Starts the measurement of peak memory anew, so that building the model does not count."""
    gc.collect()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(is_cuda: bool) -> dict[str, int]:
    """Bytes: `now`, and at the `peak` since [`forget_peak`]; resident ones on a CPU, allocated ones on a GPU."""
    if is_cuda:
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return {name: int(fields[field].split()[0]) * 1024 for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))}


def run_side(
    connection: Connection, side: str, preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer
) -> None:
    """Body of a side's process; errors reach the parent as text."""
    try:
        logging.disable(logging.WARNING)
        # A spawned process would spawn its loaders, too, which takes longer and cannot hand over the clock.
        multiprocessing.set_start_method("fork", force=True)
        # The trainers' own lines would stand between the tables.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        is_cuda = preset.device == "cuda"
        connection.recv()
        if dtype == "fp32":
            # Losses are compared, so convolutions must not round their inputs to TF32.
            torch.backends.cudnn.allow_tf32 = False
        if side in (PEER, COMPILED_PEER):
            prepared = prepare_peer(preset, dtype, folder, paths, tokenizer, compiles=side == COMPILED_PEER)
        else:
            prepared = prepare_ours(preset, dtype, folder, paths, tokenizer, None if side == "ours" else side)
        clock = Clock(is_cuda)
        watch(clock, prepared)
        turns = Turns(connection, clock, is_cuda)
        prepared.trainer.add_callback(turns)
        sizes = _sizes(prepared.trainer.model)
        connection.send({"seconds": prepared.seconds, "trainable": _trainable(prepared.trainer.model), "sizes": sizes})
        before = memory(is_cuda)["now"]
        prepared.trainer.train()
        connection.send(
            {
                "losses": turns.losses,
                "tokens": turns.tokens,
                "memory": {**memory(is_cuda), "before": before},
                "gpu": torch.cuda.get_device_name() if is_cuda else None,
                "threads": torch.get_num_threads(),
            }
        )
    except Exception:
        connection.send(RuntimeError(f"{side}:\n{traceback.format_exc()}"))


def _trainable(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of the decoder's layers (frozen, LoRA) and of the trained projector."""
    sizes = {"frozen": 0, "lora": 0, "projector": 0}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            sizes["lora"] += parameter.numel()
        elif ".language_model." in name and "embed_tokens" not in name:
            sizes["frozen"] += parameter.numel()
        elif "multi_modal_projector" in name and parameter.requires_grad:
            sizes["projector"] += parameter.numel()
    return sizes
