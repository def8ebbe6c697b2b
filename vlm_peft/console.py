"""How recipes and evaluation behave in a terminal: libraries kept quiet, and errors of use as one line."""

import logging
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
"""Where what Python and pip installed lies."""


def quiet_imports() -> None:
    """Hides notices that nobody who runs a script can act on; to be called before the libraries are imported."""
    # bitsandbytes offers a faster 4-bit kernel from the Hub that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "kernels-community" not in record.getMessage()
    )
    # transformers 5 renames options that TRL 1.16 still sets under their old names.
    warnings.filterwarnings(
        "ignore", message="`(is_)?gradient_checkpointing` is deprecated and will be removed", category=FutureWarning
    )


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


def run_script(main: Callable[[], int], name: str) -> int:
    """Runs a script's `main`; an error of use is one message and exit status 2, anything else keeps its traceback.

    Errors of use are those of the file system and the Hub (`OSError`), and a `ValueError` that our own checks raise.

    Args:
        main: Returns the exit status.
        name: Of the script, put before the message.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        # Python would print the message, too, but end with 1, which is for faults.
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 2
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"{name}{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        return 2


def _is_ours(error: Exception) -> bool:
    """Whether the package or a script raised an error, and no library: those may lie in `.venv` beside the scripts."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    is_library = any(raised_in.is_relative_to(folder) for folder in LIBRARIES)
    return raised_in.is_relative_to(_PACKAGE) or (raised_in.is_file() and not is_library)


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
