"""Sweep the adapter's scale from 0 to 1: the new task against the old ones, as a curve. Nothing is trained.

    vlm-peft sweep outputs/mine --config mine.yaml --output_dir sweep

FILE is the run's own configuration: its held-out splits are the new task, `watch` names the old data sets. Writes
sweep.json and sweep.svg; `vlm-peft export MODEL FOLDER --to merged --scale 0.6` takes a point of the curve. The
projector stays as trained at every scale: at 0 the decoder is the base, which answers through the trained projector.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import quiet_imports, quiet_progress, table


def parse_arguments(arguments: Sequence[str] | None = None, program: str = "vlm-peft sweep"):
    """Read the command line; ends the program with a message if it is not one. What it does not know are options of the
    run, which override the file's."""
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="adapter folder, or Hub id of one")
    add("--config", required=True, metavar="FILE", help="configuration of the run")
    add("--output_dir", required=True, type=Path, help="gets sweep.json, sweep.svg and the scores of each scale")
    add("--scales", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1], help="(default: 0 0.2 0.4 0.6 0.8 1)")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None, program: str = "vlm-peft sweep") -> int:
    """Run the command; returns its exit status.

    Raises:
        ValueError, OSError: For a model that has no scale, and for what is wrong with the options and the data.
    """
    options, others = parse_arguments(arguments, program)
    quiet_imports()
    quiet_progress(True)

    from ..adapters.loading import find_model, load_model
    from ..adapters.scale import at_scale
    from ..evaluation.evaluate import evaluate_split
    from ..evaluation.perplexity import perplexity, text_nats
    from ..evaluation.records import write_text
    from ..report.charts import scale_chart
    from ..tasks import TaskSettings
    from ..training.arguments import parse_arguments as parse_run
    from ..training.data import load_held_out, load_watched, watched_text

    given = ["--config", options.config, *others, "--output_dir", str(options.output_dir)]
    vision, training, _ = parse_run(given, program=program)
    model, processor = load_model(find_model(options.model), device=training.device)
    for scale in options.scales:
        with at_scale(model, scale):
            pass
    new, old = load_held_out(vision, model, processor), load_watched(vision, model, processor)
    paragraphs = watched_text(vision)
    # Old captions are longer than new digits.
    least = {"new": 0, "old": TaskSettings.max_new_tokens}
    points: list[dict[str, Any]] = []
    for scale in sorted(set(options.scales)):
        point: dict[str, Any] = {"scale": scale, "new": {}, "old": {}}
        with at_scale(model, scale):
            for kind, splits in (("new", new), ("old", old)):
                for name, split in splits.items():
                    summary = evaluate_split(
                        model,
                        processor,
                        split,
                        options.output_dir / f"{scale:g}" / name,
                        model_name=options.model,
                        batch_size=vision.generation_batch_size,
                        max_new_tokens=max(vision.max_new_tokens, least[kind]),
                        num_beams=vision.num_beams,
                        meteor=False,
                        recorded={"scale": scale},
                    )
                    metric = summary["primary"]
                    interval = summary["intervals"].get(metric)
                    point[kind][name] = {"metric": metric, "score": summary["metrics"][metric], "interval": interval}
            if paragraphs:
                point["perplexity"] = perplexity(text_nats(model, processor, paragraphs))
        points.append(point)
    write_text(options.output_dir / "sweep.json", json.dumps(points, indent=2) + "\n")
    curves = {
        name: [(point["scale"], point[kind][name]["score"]) for point in points]
        for kind, splits in (("new", new), ("old", old))
        for name in splits
    }
    write_text(options.output_dir / "sweep.svg", str(scale_chart("Score by the adapter's scale", curves)) + "\n")
    names = [*(name for name in new), *(name for name in old)]
    lines = [["scale", *names, *(["perplexity"] if paragraphs else [])]]
    for point in points:
        cells = [f"{(point['new'] | point['old'])[name]['score']:.4f}" for name in names]
        lines.append([f"{point['scale']:g}", *cells, *([f"{point['perplexity']:.2f}"] if paragraphs else [])])
    print(f"\n{table(lines)}")
    print(f"\nwritten: {options.output_dir / 'sweep.json'}, {options.output_dir / 'sweep.svg'}")
    return 0
