"""The README.md of an adapter folder: what the run measured, how to load it, and nothing else.

It reads what the run wrote and takes the place of TRL's own card, which describes a text model:

- `run_summary.json`, see report.py; also `vision_revision`, `text_revision`, `dataset_revision` (commits or branches)
  and `data` (from the name of a split to any of `rows`, `pictures` and `content_hash`), where there are any; `dataset`
  and `dataset_revision` are lists after a run on several;
- `eval/<split>/scores.json` of any task, with `eval/<split>-before` and `eval/<split>-blind` beside it;
- `eval/<split>/predictions.jsonl` and `eval/<split>/pictures/*.webp`, for the sample pictures.

Licences are those that the cards of the bases and of the data set state, as far as they lie on this machine.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.records import read_predictions, write_text
from ..hub.licences import common_licence, licence_line, stated_licence
from .gallery import picture_path

SAMPLES = 3
"""Sample pictures of each kind: best, worst."""

METRIC_TYPES = {"Bleu": "bleu", "ROUGE_L": "rouge", "METEOR": "meteor", "CIDEr": "cider", "SPICE": "spice"}
"""What the Hub calls a metric, by how its name begins; others keep their name in small letters."""


def write_model_card(output_dir: Path | str) -> Path:
    """Write `README.md` into a run's folder and return its path.

    Args:
        output_dir: The run's folder, with `run_summary.json`; scores and pictures are listed where there are any.

    Raises:
        FileNotFoundError: if there is no `run_summary.json`.
        ValueError: if one of the files is not what it should be.
    """
    output_dir = Path(output_dir)
    summary = json.loads((output_dir / "run_summary.json").read_text(encoding="utf-8"))
    scores = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(output_dir.glob("eval/*/scores.json"))
    }
    encoder, decoder, datasets = summary["vision_model"], summary["text_model"], _datasets(summary)
    licences = {
        "encoder": stated_licence(encoder, revision=summary.get("vision_revision")),
        "decoder": stated_licence(decoder, revision=summary.get("text_revision")),
    }
    # Local folders are no ids: the Hub would show broken links.
    bases = [name for name in (decoder, encoder) if _is_hub_id(name)]
    title = str(summary["title"])
    relation: Any = {"base_model_relation": "adapter"} if bases else {}
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag="image-text-to-text",
        license=common_licence((licences["encoder"], licences["decoder"])),
        base_model=bases or None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        tags=["vlm_peft", "lora", "vision-language"],
        model_name=title,
        eval_results=_eval_results(scores, summary) or None,
        **relation,
    )
    trained, total = summary["trainable_parameters"], summary["parameters"]
    adapter = json.dumps(str(summary.get("adapter") or output_dir.resolve().name), ensure_ascii=False)
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {title}\n",
        f"An adapter (LoRA and projector, {trained:,} trained of {total:,} parameters, {100 * trained / total:.2f} %) "
        f"that joins the encoder `{encoder}` and the decoder `{decoder}`, made with vlm_peft on "
        f"{', '.join(f'`{name}`' for name in datasets)}.\n",
        "```python\nfrom vlm_peft import VisionQwen, VisionQwenProcessor\n"
        f"model = VisionQwen.from_adapter({adapter})\n"
        f"processor = VisionQwenProcessor.from_pretrained({adapter})\n```\n",
        _scores_table(scores),
        _samples(output_dir, scores),
        "## Data\n",
        *_data_lines(summary),
        "\n## Licences\n",
        licence_line("encoder", encoder, licences["encoder"]),
        licence_line("decoder", decoder, licences["decoder"]),
        *(
            licence_line("data", name, stated_licence(name, revision=revision, repo_type="dataset"))
            for name, revision in datasets.items()
        ),
        "\n## How it was made\n",
        *_making_lines(summary),
    ]
    target = output_dir / "README.md"
    write_text(target, "\n".join(part for part in parts if part) + "\n")
    return target


def _datasets(summary: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> revision; a run on a mixture has several, each with its own or none."""
    names, revisions = summary["dataset"], summary.get("dataset_revision")
    names = [names] if isinstance(names, str) else names
    revisions = revisions if isinstance(revisions, list) else [revisions] * len(names)
    return dict(zip(map(str, names), revisions, strict=True))


def _of_split(scores: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Folder of a split -> `""`, `"before"` or `"blind"` -> scores.json."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, each in scores.items():
        split, dash, condition = name.rpartition("-")
        if not dash or condition not in ("before", "blind"):
            split, condition = name, ""
        found.setdefault(split, {})[condition] = each
    return found


def _scores_table(scores: Mapping[str, Any]) -> str:
    """One line for each split and metric, with the score before training and the blind control beside it."""
    if not scores:
        return ""
    lines = [
        "## Scores\n",
        "In brackets 95 % intervals. Before: the same model before training. Blind: the trained model, each picture "
        "swapped for another one. Empty: not measured in this run.\n",
        "| split | task | metric | n | score | before | blind |",
        "|---|---|---|---|---|---|---|",
    ]
    made_by: dict[str, list[str]] = {}
    for split, conditions in _of_split(scores).items():
        some = next(iter(conditions.values()))
        metrics = dict.fromkeys(name for each in conditions.values() for name in each["metrics"])
        for metric in metrics:
            cells = [_score(conditions.get(condition), metric) for condition in ("", "before", "blind")]
            lines.append(f"| {split} | {_task(some)} | {metric} | {some['n']:,} | {' | '.join(cells)} |")
        shown = conditions.get("", some)
        decoding = {name: value for name, value in (shown.get("decoding") or {}).items() if name != "blind"}
        made = [f"tokenizer of the metrics: {shown['tokenizer']}"] if shown.get("tokenizer") else []
        made += [f"decoding: {json.dumps(decoding)}"] if decoding else []
        made += [f"left out: {json.dumps(shown['skipped'])}"] if shown.get("skipped") else []
        made += [str(note) for note in shown.get("notes") or []]
        made_by.setdefault("; ".join(made), []).append(split)
    lines.append("")
    lines += [f"- {', '.join(splits)}: {made}" for made, splits in made_by.items() if made]
    return "\n".join(lines) + "\n"


def _task(scores: Mapping[str, Any]) -> str:
    return str(scores.get("task") or "caption")


def _score(scores: Mapping[str, Any] | None, metric: str) -> str:
    value = None if scores is None else scores["metrics"].get(metric)
    if scores is None or value is None:
        return ""
    interval = (scores.get("intervals") or {}).get(metric)
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _eval_results(scores: Mapping[str, Any], summary: Mapping[str, Any]) -> list[EvalResult]:
    """The scores after training, for the Hub's `model-index`."""
    revisions = _datasets(summary)
    results = []
    for split, conditions in _of_split(scores).items():
        each = conditions.get("", {})
        for metric, value in each.get("metrics", {}).items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            dataset = str(each.get("dataset") or next(iter(revisions)))
            kind = next((known for start, known in METRIC_TYPES.items() if metric.startswith(start)), metric.lower())
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    task_name=_task(each),
                    dataset_type=dataset if _is_hub_id(dataset) else Path(dataset).name,
                    dataset_name=Path(dataset).name,
                    dataset_split=split,
                    dataset_revision=revisions.get(dataset),
                    metric_type=kind,
                    metric_name=metric,
                    metric_value=round(float(value), 6),
                )
            )
    return results


def _samples(output_dir: Path, scores: Mapping[str, Any]) -> str:
    """Pictures that the training never saw, with what the model says: the best and the worst of the first split."""
    for split, conditions in _of_split(scores).items():
        path = output_dir / "eval" / split / "predictions.jsonl"
        if "" not in conditions or not path.is_file():
            continue
        rows = [row for row in read_predictions(path) if picture_path(output_dir, split, row["id"]).is_file()]
        ranked = sorted((row for row in rows if row.get("cider") is not None), key=lambda row: -float(row["cider"]))
        half = min(SAMPLES, len(ranked) // 2)
        kinds = {"best": ranked[:half], "worst": ranked[len(ranked) - half :][::-1]}
        if not half:
            kinds = {"first": rows[: 2 * SAMPLES]}
        lines = [
            f"| ![{split}, {kind}]({_link(output_dir, split, row['id'])}) | {kind} | {_cell(row['prediction'])} | "
            f"{_cell(row['references'][0])} |"
            for kind, shown in kinds.items()
            for row in shown
        ]
        if lines:
            how = f"the {half} best and the {half} worst by CIDEr" if half else "the first ones"
            head = f"## What it says\n\nPictures of split {split}, {how} among those that the run kept.\n"
            table = ["| picture | | the model | first reference |", "|---|---|---|---|", *lines]
            return "\n".join([head, *table]) + "\n"
    return ""


def _link(output_dir: Path, split: str, picture_id: Any) -> str:
    """Relative address of a stored thumbnail; its file name may hold percent signs of its own."""
    return quote(picture_path(output_dir, split, picture_id).relative_to(output_dir).as_posix())


def _cell(text: str) -> str:
    """Text of a model or a data set as one cell: no markup gets through, and no line ends."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", text)


def _data_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- `{name}`" + (f" at revision `{revision}`" if revision else "")
        for name, revision in _datasets(summary).items()
    ]
    for split, facts in (summary.get("data") or {}).items():
        shown = [f"{facts[name]:,} {name}" for name in ("rows", "pictures") if facts.get(name) is not None]
        if facts.get("content_hash"):
            shown.append(f"content hash `{facts['content_hash']}`")
        lines.append(f"- split {split}: {', '.join(shown)}")
    return lines


def _making_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"- command: `{summary['command']}`"]
    for name, what in (("vision", "encoder"), ("text", "decoder")):
        if summary.get(f"{name}_revision"):
            lines.append(f"- revision of the {what}: `{summary[f'{name}_revision']}`")
    lines.append(f"- date: {summary['date']}, device: {summary['device']}, seed: {summary['seed']}")
    lines.append("- seconds: " + ", ".join(f"{name} {value:g}" for name, value in summary["seconds"].items()))
    lines.append("- versions: " + ", ".join(f"{name} {value}" for name, value in summary["versions"].items()))
    return lines


def _is_hub_id(name: str) -> bool:
    """`owner/name` that is no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
