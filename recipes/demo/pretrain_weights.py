"""Make the demo's weights: the small Qwen3 (its tokenizer serves both), then the small CLIP, then their projector.

    python recipes/demo/pretrain_weights.py --art DIR --output recipes/demo

Takes the data set of ``build_scenes.py`` for its held-out pairs only; see ``pretrain_lm.py``,
``pretrain_reading.py`` (in two passes), ``pretrain_clip.py`` and ``pretrain_projector.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from emoji_art import DEFAULT_ART

HERE = Path(__file__).parent


def main() -> None:
    """Run the scripts one after the other with the same output folder and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs and WordNet; filled"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="gets qwen3/, clip/ and projector/")
    parser.add_argument("--scenes", type=Path, default=HERE / "scenes")
    parser.add_argument("--lm_steps", type=int, default=600)
    parser.add_argument("--reading_steps", type=int, default=2300)
    parser.add_argument("--second_steps", type=int, default=800, help="of the reading's second pass")
    parser.add_argument("--clip_steps", type=int, default=5200)
    parser.add_argument("--workers", type=int, default=2, help="processes that make texts and canvases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clip, decoder, seed = args.output / "clip", args.output / "qwen3", ["--seed", args.seed]
    made = ["--workers", args.workers]
    second = ["--steps", args.second_steps, "--rows", 8, "--rate", 1e-3, "--seed", args.seed + 1, "--two_looks"]
    stages = (
        ("pretrain_lm.py", ["--output", decoder, "--steps", args.lm_steps, *seed]),
        ("pretrain_reading.py", ["--model", decoder, "--steps", args.reading_steps, *seed, *made]),
        ("pretrain_reading.py", ["--model", decoder, *second, *made]),
        ("pretrain_clip.py", ["--output", clip, "--tokenizer", decoder, "--steps", args.clip_steps, *seed, *made]),
        ("pretrain_projector.py", ["--clip", clip, "--model", decoder, "--output", args.output / "projector", *seed]),
    )
    for script, own in stages:
        shared = ["--art", args.art, "--scenes", args.scenes]
        subprocess.run([sys.executable, str(HERE / script), *map(str, shared + own)], check=True)


if __name__ == "__main__":
    main()
