"""This project beside its peer in one run: speed, memory, and the same losses and texts; see `--help`."""

import logging
import os
import warnings

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("peft").setLevel(logging.ERROR)

from throughput.measure import main  # noqa: E402  (the folder beside this file)

if __name__ == "__main__":
    raise SystemExit(main())
