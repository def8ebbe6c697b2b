"""Fine-tune a CLIP or SigLIP on pictures with texts, by the contrastive loss.

    accelerate launch recipes/clip.py                                             # the embedded demo, offline, on a CPU
    accelerate launch recipes/clip.py --config recipes/configs/clip_folder.yaml --dataset_name my_pictures
    accelerate launch recipes/clip.py --config ... --vision_tuning locked         # the command line overrides the file

Retrieval and zero-shot scores before and after, the adapter folder and report.html go to `--output_dir`; with `--merge
true` also a plain checkpoint. Options are those of `vlm_peft.contrastive.arguments` and transformers'
`TrainingArguments`.
"""

import os
import sys
import time

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STARTED = time.monotonic()

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Runs the recipe; returns the exit status."""
    quiet_imports()
    from vlm_peft.contrastive.fine_tune import main as fine_tune
    from vlm_peft.training.setup import CLONE

    arguments = sys.argv[1:] or ["--config", str(CLONE / "recipes" / "configs" / "clip_demo.yaml")]
    return fine_tune(arguments, command="accelerate launch recipes/clip.py", started=STARTED)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "clip.py"))
