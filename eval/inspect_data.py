"""Show what the model will really see: rows laid out for training, token by token; see `--help`."""

import sys

from vlm_peft.commands.inspect import main
from vlm_peft.console import run_script

if __name__ == "__main__":
    sys.exit(run_script(main, "inspect_data.py"))
