"""Train strategies side by side, with several amounts of data and seeds, and say what the figures carry.

    python recipes/compare.py                                                    # the demo's study, offline, on a CPU
    python recipes/compare.py --config recipes/configs/study_demo.yaml --jobs 2  # two runs at a time

Each run of the recipe has a process and a folder of its own; finished ones are kept, so the same command goes on with a
study that was stopped. study.csv, study.json and study.html go to the file's `output_dir`. Keys of the file:
`vlm_peft.studies.compare.StudyOptions`.
"""

import sys
from pathlib import Path

from vlm_peft.console import quiet_imports, run_script

DEMO = Path(__file__).parent / "configs" / "study_demo.yaml"


def main() -> int:
    """Runs the study; returns the exit status."""
    quiet_imports()
    from vlm_peft.studies.compare import main as compare

    return compare(sys.argv[1:] or ["--config", str(DEMO)])


if __name__ == "__main__":
    sys.exit(run_script(main, "compare.py"))
