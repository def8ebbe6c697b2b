"""The report's sections and style as HTML. Everything that comes from a run or a data set is escaped here."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..metrics.boxes import LabelledBox, parse_boxes
from .charts import bar_chart, box_overlay, finite_points, step_chart
from .gallery import Thumbnail, ranking

Summary = Mapping[str, Any]
"""What a scores.json holds."""

Scores = Mapping[str, Mapping[str, Summary]]
"""From a split and a condition to its scores.json."""

CONDITIONS = ("before", "after", "blind")

_SEQUENCES = "share of word sequences, as long as the number says or shorter, that a reference has, too"
HIGHEST = {"CIDEr": 10, "CLIPScore": 2.5, "RefCLIPScore": 1.43}
"""Metrics that go beyond 1."""

EXPLAINED = {
    "CIDEr": "word sequences shared with the references, rare ones counting more",
    "Bleu_1": _SEQUENCES,
    "Bleu_2": _SEQUENCES,
    "Bleu_3": _SEQUENCES,
    "Bleu_4": _SEQUENCES,
    "ROUGE_L": "longest sequence of words in common with a reference",
    "METEOR": "words in common with a reference, also by stem and synonym",
    "SPICE": "objects, their attributes and relations in common with the references",
    "CLIPScore": "likeness of caption and picture to a CLIP",
    "RefCLIPScore": "the same, and likeness to the nearest reference",
    "vqa_accuracy": "1 where three or more of ten people gave the answer, less where fewer did",
    "f1": "words in common with the nearest accepted answer, missing and extra ones counted",
    "exact_match": "share of rows that equal an accepted answer, case, spaces and signs aside",
    "anls": "characters in common with the nearest accepted answer, nothing where half of them or more differ",
    "page_precision": "share of the pages named that hold the evidence",
    "page_recall": "share of the pages with the evidence that are named",
    "page_f1": "harmonic mean of these two for each row",
    "f1_50": "share of boxes, predicted and true, that match one of the other kind: same label, overlap of a half",
    "AP50": "COCO's average precision where an overlap of half is a match",
    "AP": "COCO's average precision, mean over matches from an overlap of 0.5 to 0.95",
    "precision50": "share of the predicted boxes that match a true one",
    "recall50": "share of the true boxes that a predicted one matches",
    "mean_iou": "overlap of true boxes with the best predicted one: area shared by area covered",
    "digit_accuracy": "share of the digits that are right once they are aligned",
}
"""What each metric is; CIDEr goes from 0 to 10, all others from 0 to 1."""

_NOTHING = "\u2013"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f26; --soft: #5b6472; --rule: #dde1e7;
  --after: #1f6feb; --before: #98a2b1; --blind: #d9822b; --good: #1a7f4b; --bad: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1d2229; --ink: #e7eaef; --soft: #9aa5b4;
  --rule: #313843; --after: #6aa5ff; --before: #75808f; --blind: #eba45a; --good: #5ec98f; --bad: #f08a7e; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb; --after: #1f6feb;
    --before: #98a2b1; --blind: #d9822b; --good: #1a7f4b; --bad: #b3382c; }
  .card, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3, summary { font-size: 1.05rem; font-weight: 600; margin: 1.6rem 0 .6rem; }
summary { cursor: pointer; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, dt { color: var(--soft); }
.lead { font-size: 1.15rem; max-width: none; } .lead b { font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .8rem 0; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: min(100%, 42rem); }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); } td.text, th.text { text-align: left; }
tr.after td { font-weight: 600; } tr.first td { border-top: 2px solid var(--rule); }
td small { display: block; font-weight: 400; color: var(--soft); }
dl.metrics { font-size: .88rem; color: var(--soft); } dl.metrics dt { color: var(--ink); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: .8rem 0; min-width: 0; } figcaption { font-size: .9rem; margin-bottom: .5rem; }
svg { width: 100%; height: auto; display: block; max-width: 34rem; }
svg text { font-size: 13px; fill: var(--soft); }
svg .value, svg .name { fill: var(--ink); } svg .name { font-weight: 600; font-size: 14px; }
svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .line.train, svg .line.score { stroke: var(--after); } svg .line.held-out { stroke: var(--blind); }
svg .dot.train, svg .dot.score { fill: var(--after); } svg .dot.held-out { fill: var(--blind); }
svg .bar.after { fill: var(--after); } svg .bar.before { fill: var(--before); } svg .bar.blind { fill: var(--blind); }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; opacity: .65; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .35em 0 .7em; background: var(--after); }
.key.held-out::before { background: var(--blind); }
.key.predicted::before { background: none; border: 2px solid #1f6feb; }
.key.reference::before { background: none; border: 2px dashed #d9660b; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 10rem), 1fr)); gap: .9rem; }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.card { background: var(--card); border-radius: .5rem; overflow: hidden; font-size: .88rem; line-height: 1.38;
  display: flex; flex-direction: column; border: 1px solid var(--rule); }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; background: var(--rule); }
.card .said { padding: .55rem .7rem .7rem; overflow-wrap: anywhere; }
.photo { position: relative; }
.photo svg { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; }
svg.boxes rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg.boxes rect.edge { stroke: #fff; stroke-width: 4; opacity: .8; } svg.boxes rect.predicted { stroke: #1f6feb; }
svg.boxes rect.reference { stroke: #d9660b; stroke-dasharray: 5 4; }
svg.boxes text { font-size: 50px; font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 14px; }
svg.boxes text.predicted { fill: #1f6feb; } svg.boxes text.reference { fill: #b35408; }
.card p { margin: .1rem 0 .35rem; font-weight: 600; } .card p.question { font-weight: 400; margin-top: .3rem; }
.card ul { margin: 0; padding: 0; list-style: none; color: var(--soft); font-size: .8rem; }
.card li { margin-top: .2rem; padding-left: .7rem; text-indent: -.7rem; }
.card li::before { content: "\\2013\\00a0"; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; font-size: .8rem; }
.best .score { color: var(--good); } .worst .score { color: var(--bad); }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""


def text(value: Any) -> str:
    """Return a value as escaped text; numbers with thousands separators, surrogates that no page can hold as U+FFFD."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def page(title: str, body: str) -> str:
    """Return a whole HTML page that loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def description(pairs: Mapping[str, Any]) -> str:
    """Return names and values as a description list, without those that are None or empty."""
    items = [f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs.items() if value not in (None, "")]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def by_task(scores: Scores) -> dict[str, dict[str, Mapping[str, Summary]]]:
    """Return task -> split -> condition -> scores.json; scores without a task are of captions, all there once was."""
    tasks: dict[str, dict[str, Mapping[str, Summary]]] = {}
    for split, conditions in scores.items():
        task = next((str(s["task"]) for s in conditions.values() if s.get("task")), "caption")
        tasks.setdefault(task, {})[split] = conditions
    return tasks


def primary_of(conditions: Mapping[str, Summary]) -> str:
    """Return the metric that stands for a split."""
    return ranking(conditions.get("after") or next(iter(conditions.values())))[0]


def lead(scores: Scores) -> str:
    """Return one sentence a split on what training changed."""
    sentences = []
    for split, conditions in scores.items():
        metric = primary_of(conditions)
        values = {name: _number(summary, metric) for name, summary in conditions.items()}
        if values.get("after") is None:
            continue
        said = f"{text(metric)} on {text(split)}: <b>{_shown(metric, values['after'])}</b>"
        if values.get("before") is not None:
            said += f", before training {_shown(metric, values['before'])}"
        if values.get("blind") is not None:
            said += f", with the wrong pictures {_shown(metric, values['blind'])}"
        sentences.append(said + ".")
    return f'<p class="lead">{"<br>".join(sentences)}</p>' if sentences else ""


def scores_section(scores: Scores) -> str:
    """Return for each task the table of its scores and what they mean; then how the texts were made."""
    tasks = by_task(scores)
    parts = [
        '<p class="soft">Higher is better. n is the number of rows: pictures, or questions about them. Small print is '
        "the 95 % bootstrap interval over rows. <b>blind</b> is the control: the trained model with each picture "
        "swapped for another one, that is, what can be scored without looking.</p>"
    ]
    for task, splits in tasks.items():
        if len(tasks) > 1:
            parts.append(f"<h3>{text(task)}</h3>")
        parts += [_scores_table(splits), _kinds_tables(splits)]
    summaries = [summary for conditions in scores.values() for summary in conditions.values()]
    tokenizers = sorted({str(s["tokenizer"]) for s in summaries if s.get("tokenizer")})
    settings = [s["decoding"].items() for s in summaries if s.get("decoding")]
    # The rows say which of them are blind.
    decodings = sorted({", ".join(f"{name} {value}" for name, value in s if name != "blind") for s in settings})
    skipped = sorted({f"{name}: {why}" for s in summaries for name, why in (s.get("skipped") or {}).items()})
    notes = sorted({str(note) for s in summaries for note in s.get("notes") or []})
    parts.append(
        description(
            {
                "tokenizer": "; ".join(tokenizers),
                "decoding": "; ".join(decodings),
                "left out": "; ".join(skipped),
                "note": "; ".join(notes),
            }
        )
    )
    return "".join(parts)


def _scores_table(splits: Scores) -> str:
    summaries = [summary for conditions in splits.values() for summary in conditions.values()]
    primaries = [primary_of(conditions) for conditions in splits.values()]
    names = [name for s in summaries for name in s.get("metrics") or {} if "[" not in name]
    columns = [c for c in dict.fromkeys([*primaries, *names]) if any(_number(s, c) is not None for s in summaries)]
    rows: list[str] = []
    for split, conditions in splits.items():
        for index, (name, summary) in enumerate(conditions.items()):
            cells = [f'<td class="text">{text(split) if index == 0 else ""}</td><td class="text">{name}</td>']
            cells.append(f"<td>{text(summary.get('n', _NOTHING))}</td>")
            for column in columns:
                value, interval = _number(summary, column), interval_of(summary, column)
                said = _NOTHING if value is None else f"{value:.3f}"
                if interval is not None:
                    said += f"<small>{_shown(column, interval[0])} to {_shown(column, interval[1])}</small>"
                cells.append(f"<td>{said}</td>")
            rows.append(f'<tr class="{name}{" first" if index == 0 and rows else ""}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{text(column)}</th>" for column in ("n", *columns))
    meanings: dict[str, list[str]] = {}
    for name in columns:
        if name in EXPLAINED:
            meanings.setdefault(f"{EXPLAINED[name]}; 0 to {HIGHEST.get(name, 1)}", []).append(name)
    explained = "".join(f"<dt>{', '.join(names)}</dt><dd>{text(said)}</dd>" for said, names in meanings.items())
    return (
        '<div class="scroll"><table><thead><tr><th class="text">split</th><th class="text">model</th>'
        f'{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div><dl class="metrics">{explained}</dl>'
    )


def _kinds_tables(splits: Scores) -> str:
    """Scores of kinds of rows, which a scores.json has as `vqa_accuracy[answer_type=number]`."""
    parts = []
    for split, conditions in splits.items():
        tables: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for condition, summary in conditions.items():
            for name in summary.get("metrics") or {}:
                match = re.fullmatch(r"(\w+)\[(\w+)=(.*)\]", name, re.DOTALL)
                value = _number(summary, name)
                if match and value is not None:
                    kinds = tables.setdefault((match[1], match[2]), {})
                    kinds.setdefault(match[3], {})[condition] = value
        for (metric, key), kinds in tables.items():
            head = "".join(f"<th>{condition}</th>" for condition in conditions)
            rows = "".join(
                f'<tr><td class="text">{text(kind)}</td>'
                + "".join(f"<td>{_shown(metric, values.get(condition))}</td>" for condition in conditions)
                + "</tr>"
                for kind, values in kinds.items()
            )
            parts.append(
                f"<details><summary>{text(metric)} on {text(split)} by {text(key)}</summary>"
                f'<div class="scroll"><table><thead><tr><th class="text">{text(key)}</th>{head}</tr></thead>'
                f"<tbody>{rows}</tbody></table></div></details>"
            )
    return "".join(parts)


def charts(scores: Scores, log_history: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """Return the charts that the inputs allow, and whether the loss curve is one of them."""
    figures = []
    tasks = by_task(scores)
    for task, splits in tasks.items():
        for metric in dict.fromkeys(map(primary_of, splits.values())):
            groups = {
                split: [
                    (name, value, interval_of(summary, metric))
                    for name, summary in conditions.items()
                    if (value := _number(summary, metric)) is not None
                ]
                for split, conditions in splits.items()
                if primary_of(conditions) == metric
            }
            groups = {split: bars for split, bars in groups.items() if bars}
            if groups:
                title = f"{task}: {metric}" if len(tasks) > 1 else metric
                drawn = bar_chart(title, groups, _digits(metric))
                figures.append(_figure(f"{text(title)}, with its 95 % interval where known", drawn))
    train, held_out = finite_points(log_history, "loss"), finite_points(log_history, "eval_loss")
    if train or held_out:
        keys = "".join(
            f'<span class="key {name}">{name}</span>' for name, s in (("train", train), ("held-out", held_out)) if s
        )
        drawn = step_chart("Loss", {"train": train, "held-out": held_out})
        figures.append(_figure(f"Loss by step, nats a token {keys}", drawn))
    for title, points in _scores_in_training(scores, log_history).items():
        figures.append(_figure(f"{text(title)} by step, on held-out rows", step_chart(title, {"score": points})))
    return f'<div class="pair">{"".join(figures)}</div>' if figures else "", bool(train or held_out)


def _scores_in_training(
    scores: Scores, log_history: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[float, float]]]:
    """What was logged as `eval_CIDEr` or, for one of several sets, `eval_test_CIDEr`; by a name to show.

    The metrics that stand for the run's tasks, or, where none of those was logged, all that are known here.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key in dict.fromkeys(key for entry in log_history for key in entry if key.startswith("eval_")):
        # The longest: page_f1 is not the f1 of a set called page.
        metric = max((m for m in EXPLAINED if key.endswith(f"_{m}")), key=len, default=None)
        points = finite_points(log_history, key)
        if metric is not None and points:
            split = key.removeprefix("eval_").removesuffix(metric).removesuffix("_")
            found.setdefault(metric, {})[f"{metric} on {split}" if split else metric] = points
    primaries = set(map(primary_of, scores.values())) & found.keys()
    return {
        name: points for metric in found if metric in (primaries or found) for name, points in found[metric].items()
    }


def _figure(caption: str, drawn: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def cards(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Thumbnail], kind: str, metric: str) -> str:
    """Return rows of predictions.jsonl as cards.

    Args:
        rows: Beside what all rows have, `question`, `evidence_pages` and `boxes` are shown; predicted and true boxes
            are drawn over the picture.
        pictures: From an id as text to its picture.
        kind: best or worst.
        metric: Whose value each row has under its name in lower case.

    Raises:
        ValueError: if a row's `boxes` are none.
    """
    parts = []
    for row in rows:
        question, boxes = row.get("question"), _true_boxes(row)
        picture = pictures.get(str(row["id"]))
        image = f'<img src="{picture.address}" alt="picture {text(str(row["id"]))}">' if picture else ""
        if picture and boxes is not None:
            predicted, _ = parse_boxes(row["prediction"])
            drawn = box_overlay(predicted, boxes, picture.width, picture.height)
            image = f'<div class="photo">{image}{drawn}</div>'
        asked = f'<p class="question">{text(question)}</p>' if isinstance(question, str) and question else ""
        references = "".join(f"<li>{text(said)}</li>" for said in _references(row, boxes or []))
        said = text(row["prediction"]) or '<span class="soft">(nothing)</span>'
        score = f"{text(metric)} {float(row[metric.lower()]):.2f}"
        parts.append(
            f'<article class="card">{image}<div class="said"><span class="score">{score}</span>'
            f"{asked}<p>{said}</p><ul>{references}</ul></div></article>"
        )
    wide = " wide" if any("boxes" in row for row in rows) else ""
    return f'<div class="cards {kind}{wide}">{"".join(parts)}</div>'


def _true_boxes(row: Mapping[str, Any]) -> list[LabelledBox] | None:
    if "boxes" not in row:
        return None
    try:
        return [LabelledBox(each["label"], tuple(each["box"])) for each in row["boxes"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = 'a list of {"label", "box": [x1, y1, x2, y2]}'
        raise ValueError(
            f"row {row['id']!r}: expected {expected} as boxes, got {row['boxes']!r} ({error!r})"
        ) from error


def _references(row: Mapping[str, Any], boxes: Sequence[LabelledBox]) -> list[str]:
    references = row.get("references") or [f"{each.label} {list(each.box)}" for each in boxes] or ["none"]
    counts = Counter(references)
    said = [f"{each} ({n} of {counts.total()})" if n > 1 else each for each, n in counts.most_common()]
    pages = row.get("evidence_pages")
    if isinstance(pages, list) and pages:
        said.append(f"{'pages' if len(pages) > 1 else 'page'} {', '.join(map(str, pages))}")
    return said


def trained_table(modules: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of modules: `module`, `parameters`, `trainable`, `dtype` of each."""
    rows = "".join(
        f'<tr><td class="text">{text(m.get("module", ""))}</td><td>{text(m.get("parameters", ""))}</td>'
        f"<td>{text(m.get('trainable', ''))}</td><td>{text(m.get('dtype', ''))}</td></tr>"
        for m in modules
    )
    head = '<th class="text">module</th><th>parameters</th><th>trainable</th><th>dtype</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def interval_of(summary: Summary, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric in a scores.json, or None."""
    interval = (summary.get("intervals") or {}).get(metric)
    return (float(interval[0]), float(interval[1])) if interval else None


def _number(summary: Summary, metric: str) -> float | None:
    value = (summary.get("metrics") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _digits(metric: str) -> int:
    return 2 if metric == "CIDEr" else 3


def _shown(metric: str, value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.{_digits(metric)}f}"
