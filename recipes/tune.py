"""Search for the options of a run: trials on rows held back from training, then one run with the best.

    python recipes/tune.py                                                   # the demo's search, offline, on a CPU
    python recipes/tune.py --config recipes/configs/tune_demo.yaml --jobs 2  # two trials at a time

The same command, on one terminal or on several, goes on with a search that was stopped. best.yaml, the adapter of the
last run, tune.json and tune.html go to the file's `output_dir`. Keys of the file: `vlm_peft.studies.tune.TuneOptions`.
Needs Optuna: pip install "vlm-peft[tune]"
"""

import importlib.util
import sys
from pathlib import Path

from vlm_peft.console import quiet_imports, run_script

DEMO = Path(__file__).parent / "configs" / "tune_demo.yaml"


def main() -> int:
    """Runs the search; returns the exit status."""
    if importlib.util.find_spec("optuna") is None:
        raise SystemExit('tune.py: the search needs Optuna: pip install "vlm-peft[tune]"')
    quiet_imports()
    from vlm_peft.studies.tune import main as tune

    return tune(sys.argv[1:] or ["--config", str(DEMO)])


if __name__ == "__main__":
    sys.exit(run_script(main, "tune.py"))
