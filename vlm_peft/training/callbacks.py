"""Callbacks: what a run says while it trains, and how it ends when it is told to.

Stage: given to a trainer of transformers or TRL, whatever it trains.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

# What the trainer and TRL log at an evaluation beside the loss and our scores.
_NOT_SHOWN = ("_runtime", "_per_second", "_num_tokens", "_entropy", "_time", "_mean_token_accuracy")


def log_line(logs: dict[str, Any], state: TrainerState) -> str:
    """One log entry as a line to read; all its numbers are in the trainer's log history and in `--report_to`.

    Args:
        logs (`dict`): The entry.
        state (`TrainerState`): Where the run stands.
    """
    if "train_runtime" in logs:
        return (
            f"Trained to step {state.global_step} in {logs['train_runtime']:.0f} s, "
            f"{logs['train_samples_per_second']:.1f} rows/s; mean loss {logs['train_loss']:.4f}"
        )
    parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.2f}"]
    names = {"loss": "loss", "eval_loss": "eval loss", "mean_token_accuracy": "token accuracy", "reward": "reward"}
    if "reward" in logs:
        # Of rewards that are compared with each other, the loss is always about 0.
        names = {name: shown for name, shown in names.items() if name != "loss"} | {"entropy": "entropy", "kl": "KL"}
    parts += [f"{name} {logs[key]:.4f}" for key, name in names.items() if key in logs]
    parts += [
        f"{key.removeprefix('eval_')} {value:.4f}"
        for key, value in logs.items()
        if key.startswith("eval_") and key not in names and not key.endswith(_NOT_SHOWN) and not set("[/") & set(key)
    ]
    if "learning_rate" in logs:
        parts.append(f"rate {logs['learning_rate']:.1e}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,} tokens/s")
    return "  ".join(parts)


class ProgressLines(ProgressCallback):
    """The trainer's progress bar, with log entries as lines instead of dictionaries."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        """Writes the entry above the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs, state))


class PrintedLines(PrinterCallback):
    """The same lines without a bar, for `--disable_tqdm true`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        """Prints the entry."""
        if state.is_world_process_zero:
            print(log_line(logs, state), flush=True)  # noqa: T201


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training in order when SIGINT or SIGTERM arrives; a second signal ends at once.

    `received` is the signal's number, or `None`. All processes stop after the same step. When `accelerate launch` is
    ended, which does not tell the process that it started, training stops as for SIGTERM.
    """

    # Ctrl-C in a terminal reaches a process twice, from the terminal and from a launcher that passes it on.
    _SAME_SIGNAL_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        # Without a launcher, a parent that ends is a shell that was left: nohup and disown must work.
        self._launcher = os.getppid() if "ACCELERATE_USE_CPU" in os.environ else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes over the two signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # print() is not safe inside a signal handler.
                os.write(2, b"\nStopping: a checkpoint is saved after this step. A second signal ends at once.\n")
        elif time.monotonic() - self._since > self._SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Asks the trainer for a checkpoint and the end."""
        if self.received is None and self._launcher not in (None, os.getppid()):
            self.received = signal.SIGTERM
        if args.world_size > 1:
            # A process that stops alone would leave the others waiting for it in the next step.
            told = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.received = int(told) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
