"""Score predictions that anybody made; see `--help`."""

import sys

from vlm_peft.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
