"""Score a CLIP: retrieval, zero-shot, few-shot heads; see `--help`."""

import sys

from vlm_peft.console import quiet_imports, run_script


def main() -> int:
    """Scores; returns the exit status."""
    quiet_imports()
    from vlm_peft.commands.evaluate_clip import main as evaluate

    return evaluate(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_script(main, "clip.py"))
