"""How commands and scripts behave in a terminal: libraries kept quiet, and errors of use as one line."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def quiet_imports() -> None:
    """Hides notices that nobody who runs a command can act on; to be called before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Rows are encoded in processes of their own, and tokenizers warn of threads that a fork leaves behind.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft and TRL use names that transformers 5 renames.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)


def quiet_progress(is_main: bool) -> None:
    """Leaves the progress bars of long work only, and those on one process only."""
    import datasets
    import huggingface_hub.utils
    import transformers

    # "Loading weights" is drawn for each of the parts, on every load.
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        transformers.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def show_messages(is_main: bool) -> None:
    """Shows what this package says of a run, on one process; of libraries warnings only.

    accelerate, for example, says at the end of each epoch in which a batch is one sequence that nothing is amiss.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger(_PACKAGE.name).setLevel(logging.INFO if is_main else logging.WARNING)


def run_script(main: Callable[[], int], name: str) -> int:
    """Runs a command; an error of use is one message and exit status 2, anything else keeps its traceback.

    Errors of use are those of the file system and the Hub (`OSError`), and a `ValueError` that the package raises.

    Args:
        main (`Callable[[], int]`): Returns the exit status.
        name (`str`): Of the command or script, put before the message.

    Returns:
        `int`: The exit status: that of `main`, 2, 130 after Ctrl-C, or 141 when nobody reads what is printed.
    """
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`) has what it wanted. Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except SystemExit as error:
        # Python would print the message, too, but end with 1, which is for faults.
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 2
        raise
    except (OSError, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if isinstance(error, ValueError) and not raised_in.is_relative_to(_PACKAGE):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"{name}{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        return 2


def table(lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    rows = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
