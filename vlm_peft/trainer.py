"""Trainer: TRL's `SFTTrainer` with what a shared-prefix run needs around it.

Stage: last; called by the recipe. The loss is TRL's own. Only three things are added: the composite `config.json` in every
checkpoint, tokens per second in the log, and a checkpoint when the run is told to stop.
"""

import signal
import time
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from .adapters import save_composite_config


class VisionSFTTrainer(SFTTrainer):
    """`SFTTrainer` for encoded shared-prefix rows.

    Pass `args` of [`training_arguments`], `data_collator=SharedPrefixCollator(...)`, and a `PeftModel` or `peft_config`.
    Every checkpoint is a complete adapter folder.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tokens_at_last_log = 0
        self._time_of_last_log = time.monotonic()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        save_composite_config(self.accelerator.unwrap_model(self.model), folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `tokens_per_second`: tokens of all processes since the last entry, padding not counted."""
        if "loss" in logs:
            now, tokens = time.monotonic(), self._total_train_tokens
            logs["tokens_per_second"] = round((tokens - self._tokens_at_last_log) / (now - self._time_of_last_log))
            self._tokens_at_last_log, self._time_of_last_log = tokens, now
        super().log(logs, start_time)


def prepare_training_arguments(args: SFTConfig) -> SFTConfig:
    """Sets what shared-prefix rows demand of TRL, in place: rows come encoded, and our collator does the packing.

    Raises:
        ValueError: When TRL's own packing is asked for, which would ignore the branches.
    """
    if args.packing or args.padding_free:
        raise ValueError("packing and padding_free are TRL's and do not know branches: use --pack_rows instead.")
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    return args


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training in order when SIGINT or SIGTERM arrives; a second signal ends at once.

    `received` is the signal's number, or `None`.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes over the two signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Asks the trainer for a checkpoint and the end."""
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Gives the signals back."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
