"""Build report.html, one page about a training run that needs nothing beside it: `python eval/report.py OUTPUT_DIR`.

It reads what the run wrote, all of it optional; what is missing is named in the page and never invented:

- `run_summary.json`, an object with any of `title`, `date`, `command`, `vision_model`, `text_model`, `dataset`,
  `device` (text), `seed`, `parameters`, `trainable_parameters` (whole numbers), `trained` (a list of `{"module",
  "parameters", "trainable", "dtype"}`), `seconds` (from the name of a phase to seconds), `versions` (from package to
  version), `adapter` (what to pass to `from_adapter`, by default the folder's name) and `notes` (a list of sentences);
- `log_history.json`, the trainer's list of log entries; used are `step`, `loss`, `eval_loss` and what was scored in
  training (`eval_CIDEr`, or `eval_test_CIDEr` for one of several sets);
- `eval/<split>/scores.json`, with `eval/<split>-before` and `eval/<split>-blind` beside it, see
  records.score_summary; splits of several tasks are shown task by task;
- `eval/<split>/predictions.jsonl` with each line's scores, for the gallery of the 12 best and 12 worst rows;
- `eval/<split>/pictures/*.webp`, the gallery's thumbnails, see gallery.save_gallery_pictures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.records import read_predictions, write_text
from . import pages as html
from .gallery import Picture, best_and_worst, choose_gallery, picture_path, ranking, save_gallery_pictures, thumbnail

__all__ = ["build_report", "choose_gallery", "save_gallery_pictures"]

_PACKAGE_LINES = """from vlm_peft import VisionQwen, VisionQwenProcessor
model = VisionQwen.from_adapter({adapter!r})
processor = VisionQwenProcessor.from_pretrained({adapter!r})"""


def build_report(output_dir: Path | str, pictures: Mapping[tuple[str, Any], Picture] | None = None) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        output_dir: The run's folder; the module's text says what is read.
        pictures: From (split, id) to a picture, in place of the thumbnails in the folder.

    Raises:
        FileNotFoundError: if the folder has nothing to report.
        ValueError: if one of the files is not what it should be.
        OSError: if a picture cannot be read.
    """
    output_dir = Path(output_dir)
    summary = _read_json(output_dir / "run_summary.json", dict)
    log_history = _read_json(output_dir / "log_history.json", list)
    scores = _read_scores(output_dir)
    if summary is None and log_history is None and not scores:
        raise FileNotFoundError(
            f"{output_dir}: nothing to report; expected run_summary.json, log_history.json or eval/<split>/scores.json"
        )
    missing = [] if summary is not None else ["run_summary.json: how and on what it was trained"]
    summary = summary or {}
    title = str(summary.get("title") or output_dir.resolve().name)

    drawn, has_loss = html.charts(scores, log_history or [])
    if not has_loss:
        missing.append("log_history.json: the loss curve")
    parts = [_header(title, summary), html.lead(scores)]
    if scores:
        parts += ["<h2>Scores</h2>", html.scores_section(scores)]
        for name, what in (("before", "the scores before training"), ("blind", "the blind control")):
            if not any(name in conditions for conditions in scores.values()):
                missing.append(f"scores.json of a split's folder with -{name} at its end: {what}")
    else:
        missing.append("scores.json of any split: the scores")
    parts.append(drawn)
    gallery = _gallery(output_dir, scores, pictures, missing)
    parts += [gallery, _use(summary, output_dir), _making(summary)]
    if missing:
        items = "".join(f"<li>{item}</li>" for item in missing)
        parts.append(f'<h2>Not in this report</h2><p class="soft">The run left no</p><ul class="soft">{items}</ul>')
    target = output_dir / "report.html"
    write_text(target, html.page(title, "\n".join(filter(None, parts))))
    return target


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def _read_scores(output_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return split -> condition -> scores.json; conditions in the order of `pages.CONDITIONS`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(output_dir.glob("eval/*/scores.json")):
        split, dash, condition = path.parent.name.rpartition("-")
        if not dash or condition not in ("before", "blind"):
            split, condition = path.parent.name, "after"
        found.setdefault(split, {})[condition] = _read_json(path, dict)
    return {
        split: {name: conditions[name] for name in html.CONDITIONS if name in conditions}
        for split, conditions in sorted(found.items())
    }


def _header(title: str, summary: Mapping[str, Any]) -> str:
    trained = summary.get("trainable_parameters")
    if trained is not None and summary.get("parameters"):
        share = 100 * trained / summary["parameters"]
        trained = f"{trained:,} of {summary['parameters']:,} parameters ({share:.1f} %)"
    facts = {
        "date": summary.get("date"),
        "image encoder": summary.get("vision_model"),
        "language model": summary.get("text_model"),
        "data": summary.get("dataset"),
        "trained": trained,
        "device": summary.get("device"),
    }
    return f"<h1>{html.text(title)}</h1>{html.description(facts)}"


def _gallery(
    output_dir: Path, scores: html.Scores, pictures: Mapping[tuple[str, Any], Picture] | None, missing: list[str]
) -> str:
    parts: list[str] = []
    has_question = has_boxes = False
    for split, conditions in scores.items():
        path = output_dir / "eval" / split / "predictions.jsonl"
        rows = read_predictions(path) if path.is_file() and "after" in conditions else []
        metrics = ranking(conditions.get("after", {}))
        best, worst = best_and_worst(rows, metrics)
        images = {}
        for row in [*best, *worst]:
            stored = picture_path(output_dir, split, row["id"])
            picture: Picture | None = stored if stored.is_file() else None
            if pictures is not None:
                picture = pictures.get((split, row["id"]))
            if picture is not None:
                images[str(row["id"])] = thumbnail(picture)
        if not images:
            continue
        has_question |= any(row.get("question") for row in [*best, *worst])
        has_boxes |= any("boxes" in row for row in [*best, *worst])
        shown = "".join(
            f"<h3>{kind.capitalize()} {len(chosen)} of {len(rows)}, {kind} first</h3>"
            + html.cards(chosen, images, kind, metrics[0])
            for kind, chosen in (("best", best), ("worst", worst))
            if chosen
        )
        state = "" if parts else " open"
        parts.append(f"<details{state}><summary>Split {html.text(split)}</summary>{shown}</details>")
    if not parts:
        missing.append("pictures, or predictions.jsonl with each row's scores: the gallery")
        return ""
    intro = "Rows the training never saw. "
    intro += "First the question, in bold what" if has_question else "In bold what"
    intro += " the model says, then the references."
    if has_boxes:
        keys = (("predicted", "the model's boxes"), ("reference", "the true ones"))
        intro += " " + "".join(f'<span class="key {name}">{said}</span>' for name, said in keys)
    return f'<h2>What it says</h2><p class="soft">{intro}</p>{"".join(parts)}'


def _use(summary: Mapping[str, Any], output_dir: Path) -> str:
    # The folder's name, not its path: a page that is passed on should not tell how somebody's disk is laid out.
    adapter = str(summary.get("adapter") or output_dir.resolve().name)
    return f"<h2>Load it</h2><pre>{html.text(_PACKAGE_LINES.format(adapter=adapter))}</pre>"


def _making(summary: Mapping[str, Any]) -> str:
    seconds = summary.get("seconds") or {}
    times = ", ".join(f"{phase} {_duration(value)}" for phase, value in seconds.items())
    versions = ", ".join(f"{package} {version}" for package, version in (summary.get("versions") or {}).items())
    seed = summary.get("seed")
    facts = {"seed": None if seed is None else str(seed), "wall time": times, "versions": versions}
    parts = [f"<pre>{html.text(summary['command'])}</pre>" if summary.get("command") else "", html.description(facts)]
    if summary.get("trained"):
        parts += ["<h3>What was trained</h3>", html.trained_table(summary["trained"])]
    parts += [f"<p>{html.text(note)}</p>" for note in summary.get("notes") or []]
    body = "".join(parts)
    return f"<h2>How it was made</h2>{body}" if body else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
