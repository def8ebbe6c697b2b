"""Generate for a held-out split with a trained model, and score it; see `--help`."""

import sys

from vlm_peft.commands.evaluate import main
from vlm_peft.console import run_script

if __name__ == "__main__":
    sys.exit(run_script(main, "run.py"))
