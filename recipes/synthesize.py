"""Let a larger model write texts about pictures, keep those that can be believed, and write a data set to train on.

    python recipes/synthesize.py --config recipes/configs/synthesize_captions.yaml --dataset_name my_pictures
    python recipes/synthesize.py --config recipes/configs/synthesize_vqa.yaml --base_url http://gpu1:8000 http://gpu2:8000

The teacher runs in this process, in servers with OpenAI's interface (vLLM, SGLang, TGI), or in `transformers serve`,
which `--serve true` starts and stops. Answers are kept as they come: a run that was stopped or killed goes on with the
same command and asks nothing twice. Options: `vlm_peft.teacher.options.SynthesisOptions`.
"""

import sys

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Runs the synthesis; returns the exit status."""
    quiet_imports()
    from vlm_peft.teacher.synthesize import main as synthesize

    return synthesize(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_script(main, "synthesize.py"))
