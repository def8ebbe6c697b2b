"""Build report.html of a training run: `python eval/report.py OUTPUT_DIR`; see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_peft.report import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(description=report.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the folder of a training run")
    try:
        print(report.build_report(parser.parse_args(arguments).output_dir))
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
