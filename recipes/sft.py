"""Fine-tune a vision-language model on pictures with texts; `vlm-peft train` is the same.

    accelerate launch -q recipes/sft.py                                          # the embedded demo, offline, on a CPU
    accelerate launch -q recipes/sft.py --config recipes/configs/flickr30k.yaml  # a real data set
    accelerate launch -q recipes/sft.py --config ... --learning_rate 1e-4        # the command line overrides the file

LoRA on the decoder and a full projector are trained; the adapter folder, held-out scores and report.html go to
`--output_dir`. Options are those of `vlm_peft.training.arguments`, TRL's `SFTConfig` and TRL's `ModelConfig`.
"""

import sys
import time

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Trains; returns the exit status."""
    started = time.monotonic()
    quiet_imports()
    from vlm_peft.training.sft import main as train

    return train(sys.argv[1:], program="sft.py", command="accelerate launch recipes/sft.py", started=started)


if __name__ == "__main__":
    sys.exit(run_script(main, "sft.py"))
