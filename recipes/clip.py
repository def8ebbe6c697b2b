"""Fine-tune a CLIP or SigLIP on pictures with texts, by the contrastive loss.

    accelerate launch recipes/clip.py                                             # the embedded demo, offline, on a CPU
    accelerate launch recipes/clip.py --config recipes/configs/clip_folder.yaml --dataset_name my_pictures
    accelerate launch recipes/clip.py --config ... --vision_tuning locked         # the command line overrides the file

Retrieval and zero-shot scores before and after, the adapter folder and report.html go to `--output_dir`; with `--merge
true` also a plain checkpoint. Options are those of `vlm_peft.contrastive.arguments` and transformers'
`TrainingArguments`.
"""

import sys
import time

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Trains; returns the exit status."""
    started = time.monotonic()
    quiet_imports()
    from vlm_peft.contrastive.fine_tune import main as fine_tune
    from vlm_peft.training.setup import CLONE

    arguments = sys.argv[1:] or ["--config", str(CLONE / "recipes" / "configs" / "clip_demo.yaml")]
    return fine_tune(arguments, command="accelerate launch recipes/clip.py", started=started)


if __name__ == "__main__":
    sys.exit(run_script(main, "clip.py"))
