"""Train a vision-language model for the score of its own texts, from a trained adapter folder on.

    accelerate launch -q recipes/sft.py                                         # the demo's adapter
    accelerate launch -q recipes/grpo.py                                        # the demo, trained on for CIDEr
    accelerate launch -q recipes/grpo.py --config recipes/configs/grpo_flickr30k.yaml --start_from outputs/flickr30k
    accelerate launch -q recipes/grpo.py --config ... --baseline greedy         # the command line overrides the file

The adapter folder, scores before and after with a paired test, and report.html go to `--output_dir`. Options are those
of `vlm_peft.training.grpo`, TRL's `GRPOConfig` and TRL's `ModelConfig`.
"""

import sys
import time

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Trains; returns the exit status."""
    started = time.monotonic()
    quiet_imports()
    from vlm_peft.training.grpo import main as train
    from vlm_peft.training.setup import CLONE

    arguments = sys.argv[1:] or ["--config", str(CLONE / "recipes" / "configs" / "grpo_demo.yaml")]
    return train(arguments, command="accelerate launch recipes/grpo.py", started=started)


if __name__ == "__main__":
    sys.exit(run_script(main, "grpo.py"))
