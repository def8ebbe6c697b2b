"""The report's sections and style as HTML. Everything that comes from a run or a data set is escaped here."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from report_charts import cider_chart, finite_points, loss_chart

METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR", "SPICE")
CONDITIONS = ("before", "after", "blind")

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
.lead { font-size: 1.15rem; } .lead b { font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .8rem 0; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); } td.text, th.text { text-align: left; }
tr.after td { font-weight: 600; } tr.first td { border-top: 2px solid var(--rule); }
td small { font-weight: 400; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: .8rem 0; min-width: 0; } figcaption { font-size: .9rem; margin-bottom: .5rem; }
svg { width: 100%; height: auto; display: block; max-width: 34rem; }
svg text { font-size: 13px; fill: var(--soft); }
svg .value, svg .name { fill: var(--ink); } svg .name { font-weight: 600; font-size: 14px; }
svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .line.train { stroke: var(--after); } svg .line.held-out { stroke: var(--blind); }
svg .dot.train { fill: var(--after); } svg .dot.held-out { fill: var(--blind); }
svg .bar.after { fill: var(--after); } svg .bar.before { fill: var(--before); } svg .bar.blind { fill: var(--blind); }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; opacity: .65; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .35em 0 .7em; background: var(--after); }
.key.held-out::before { background: var(--blind); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 10rem), 1fr)); gap: .9rem; }
.card { background: var(--card); border-radius: .5rem; overflow: hidden; font-size: .88rem; line-height: 1.38;
  display: flex; flex-direction: column; border: 1px solid var(--rule); }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; background: var(--rule); }
.card div { padding: .55rem .7rem .7rem; overflow-wrap: anywhere; }
.card p { margin: .1rem 0 .35rem; font-weight: 600; }
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


def lead(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return one sentence a split on what training changed; `scores` maps split and condition to scores.json."""
    sentences = []
    for split, conditions in scores.items():
        cider = {name: _number(summary, "CIDEr") for name, summary in conditions.items()}
        if "after" not in cider or cider["after"] is None:
            continue
        said = f"CIDEr on {text(split)}: <b>{cider['after']:.2f}</b>"
        if cider.get("before") is not None:
            said += f", before training {cider['before']:.2f}"
        if cider.get("blind") is not None:
            said += f", with the wrong pictures {cider['blind']:.2f}"
        sentences.append(said + ".")
    return f'<p class="lead">{"<br>".join(sentences)}</p>' if sentences else ""


def scores_section(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table of scores with what was left out and how the captions were made."""
    summaries = [summary for conditions in scores.values() for summary in conditions.values()]
    columns = [name for name in METRICS if any(_number(summary, name) is not None for summary in summaries)]
    rows: list[str] = []
    for split, conditions in scores.items():
        for index, name in enumerate(conditions):
            summary = conditions[name]
            interval = interval_of(summary)
            cells = [f'<td class="text">{text(split) if index == 0 else ""}</td><td class="text">{name}</td>']
            cells.append(f"<td>{text(summary.get('n', '–'))}</td>")  # noqa: RUF001
            for column in columns:
                value = _number(summary, column)
                said = "–" if value is None else f"{value:.3f}"  # noqa: RUF001
                if column == "CIDEr" and interval is not None:
                    said += f" <small>{interval[0]:.2f} to {interval[1]:.2f}</small>"
                cells.append(f"<td>{said}</td>")
            rows.append(f'<tr class="{name}{" first" if index == 0 and rows else ""}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{text(column)}</th>" for column in ("n", *columns))
    tokenizers = sorted({str(s["tokenizer"]) for s in summaries if s.get("tokenizer")})
    settings = [s["decoding"].items() for s in summaries if s.get("decoding")]
    # The rows say which of them are blind.
    decodings = sorted({", ".join(f"{name} {value}" for name, value in s if name != "blind") for s in settings})
    skipped = sorted({f"{name}: {why}" for s in summaries for name, why in (s.get("skipped") or {}).items()})
    notes = sorted({str(note) for s in summaries for note in s.get("notes") or []})
    return (
        '<p class="soft">CIDEr goes from 0 to 10, the others from 0 to 1; higher is better. n is the number of '
        "pictures. Small print after CIDEr is its 95 % bootstrap interval over pictures. <b>blind</b> is the control: "
        "the trained model with each picture swapped for another one, that is, what can be scored without looking.</p>"
        '<div class="scroll"><table><thead><tr><th class="text">split</th><th class="text">model</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + description(
            {
                "tokenizer": "; ".join(tokenizers),
                "decoding": "; ".join(decodings),
                "left out": "; ".join(skipped),
                "note": "; ".join(notes),
            }
        )
    )


def charts(
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]], log_history: Sequence[Mapping[str, Any]]
) -> tuple[str, bool]:
    """Return the charts that the inputs allow, and whether the loss curve is one of them."""
    groups = {}
    for split, conditions in scores.items():
        bars = [(name, _number(summary, "CIDEr"), interval_of(summary)) for name, summary in conditions.items()]
        drawn = [(name, value, interval) for name, value, interval in bars if value is not None]
        if drawn:
            groups[split] = drawn
    figures = []
    if groups:
        caption = "CIDEr, with its 95 % interval where known"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{cider_chart(groups)}</figure>")
    train, held_out = finite_points(log_history, "loss"), finite_points(log_history, "eval_loss")
    if train or held_out:
        keys = "".join(
            f'<span class="key {name}">{name}</span>' for name, s in (("train", train), ("held-out", held_out)) if s
        )
        caption = f"Loss by step, nats a token {keys}"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{loss_chart(train, held_out)}</figure>")
    return f'<div class="pair">{"".join(figures)}</div>' if figures else "", bool(train or held_out)


def cards(rows: Sequence[Mapping[str, Any]], images: Mapping[str, str], kind: str) -> str:
    """Return rows of predictions.jsonl as cards.

    `images` maps an id as text to a data: address, `kind` is best or worst.
    """
    parts = []
    for row in rows:
        source = images.get(str(row["id"]))
        image = f'<img src="{source}" alt="picture {text(str(row["id"]))}">' if source else ""
        references = "".join(f"<li>{text(reference)}</li>" for reference in row["references"])
        said = text(row["prediction"]) or '<span class="soft">(nothing)</span>'
        parts.append(
            f'<article class="card">{image}<div><span class="score">CIDEr {float(row["cider"]):.2f}</span>'
            f"<p>{said}</p><ul>{references}</ul></div></article>"
        )
    return f'<div class="cards {kind}">{"".join(parts)}</div>'


def trained_table(modules: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of modules: `module`, `parameters`, `trainable`, `dtype` of each."""
    rows = "".join(
        f'<tr><td class="text">{text(m.get("module", ""))}</td><td>{text(m.get("parameters", ""))}</td>'
        f"<td>{text(m.get('trainable', ''))}</td><td>{text(m.get('dtype', ''))}</td></tr>"
        for m in modules
    )
    head = '<th class="text">module</th><th>parameters</th><th>trainable</th><th>dtype</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def interval_of(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of CIDEr in a scores.json, or None."""
    interval = (summary.get("intervals") or {}).get("CIDEr")
    return (float(interval[0]), float(interval[1])) if interval else None


def _number(summary: Mapping[str, Any], metric: str) -> float | None:
    value = (summary.get("metrics") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
