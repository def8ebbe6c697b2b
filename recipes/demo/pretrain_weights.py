"""Make the demo's weights: the small Qwen3 first (its tokenizer serves both) in three stages, then the small CLIP.

    python recipes/demo/pretrain_weights.py --art DIR --output recipes/demo

Takes the data set of ``build_scenes.py`` for its held-out pairs only; see ``pretrain_lm.py``,
``pretrain_reading.py`` and ``pretrain_clip.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from emoji_art import DEFAULT_ART

HERE = Path(__file__).parent


def main() -> None:
    """Run the scripts with the same output folder and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs and WordNet; filled"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="gets clip/ and qwen3/")
    parser.add_argument("--scenes", type=Path, default=HERE / "scenes")
    parser.add_argument("--clip_minutes", type=float, default=80.0)
    parser.add_argument("--lm_minutes", type=float, default=7.0)
    parser.add_argument("--reading_steps", type=int, default=2700)
    parser.add_argument("--second_reading_steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shared = ["--scenes", args.scenes, "--seed", args.seed]
    language = ["--art", args.art, "--output", args.output / "qwen3", "--minutes", args.lm_minutes]
    reading = ["--art", args.art, "--model", args.output / "qwen3", "--steps", args.reading_steps]
    vision = ["--art", args.art, "--output", args.output / "clip", "--tokenizer", args.output / "qwen3"]
    vision += ["--minutes", args.clip_minutes]
    # The later --steps and --seed count.
    again = [*reading, "--steps", args.second_reading_steps, "--rate", 1e-3, "--seed", args.seed + 1, "--two_looks"]
    stages = (
        ("pretrain_lm.py", language),
        ("pretrain_reading.py", reading),
        ("pretrain_reading.py", again),
        ("pretrain_clip.py", vision),
    )
    for script, own in stages:
        subprocess.run([sys.executable, str(HERE / script), *map(str, shared + own)], check=True)


if __name__ == "__main__":
    main()
