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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..evaluation.blind import blind_lines
from ..evaluation.records import CONDITIONS, read_all_scores, read_predictions, write_text
from ..hub.access import is_hub_id
from ..hub.licences import common_licence, licence_line, stated_licence
from ..hub.markup import Markdown, code, markdown, one_line, visible
from ..hub.models import Published
from ..json_files import read_json
from .explained import ranking
from .gallery import best_and_worst, picture_path, references_of
from .pages import loads_with, render

SAMPLES = 3
"""Sample pictures of each kind: best, worst."""

LONGEST = 500
"""Characters of a text in the table of samples; the rest is cut off."""

METRIC_TYPES = {"Bleu": "bleu", "ROUGE_L": "rouge", "METEOR": "meteor", "CIDEr": "cider", "SPICE": "spice"}
"""What the Hub calls a metric, by how its name begins; others keep their name in small letters."""

NEEDED = (
    "title",
    "date",
    "command",
    "vision_model",
    "text_model",
    "dataset",
    "device",
    "seed",
    "parameters",
    "trainable_parameters",
    "seconds",
    "versions",
)
"""What `run_summary.json` must say."""

Licences = Sequence[tuple[str, str, str | None]]
"""Of the encoder, the decoder and the data sets: what it is, its name, what its card states (see `stated_licence`)."""


def write_model_card(output_dir: Path | str) -> Path:
    """Write `README.md` into a run's folder and return its path.

    Args:
        output_dir: The run's folder, with `run_summary.json`; scores and pictures are listed where there are any.

    Raises:
        FileNotFoundError: if there is no `run_summary.json`.
        ValueError: if one of the files is not what it should be.
    """
    output_dir = Path(output_dir)
    path = output_dir / "run_summary.json"
    summary = read_json(path)
    missing = [name for name in NEEDED if name not in summary]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing, which the card shows")
    target = output_dir / "README.md"
    write_text(target, _card_of(output_dir, summary))
    return target


def card_for_others(folder: Path, published: Published) -> str:
    """Return the folder's card with the names under which others find the adapter and its bases.

    A card that is as the run wrote it is made anew. Lines that its owner wrote stay; only the metadata by which the Hub
    files it as an adapter is completed.

    Args:
        folder: With `README.md`.
        published: What to call the adapter and its bases.

    Raises:
        ValueError: if the card's metadata or one of the run's files is damaged.
    """
    return completed_card(folder, published, _card_of, NEEDED, "image-text-to-text")


def completed_card(
    folder: Path,
    published: Published,
    card_of: Callable[[Path, Mapping[str, Any], Published | None], str],
    needed: Sequence[str],
    pipeline_tag: str,
) -> str:
    """Return a folder's card for others, whatever kind of card it is; see `card_for_others`.

    Args:
        folder: With `README.md`.
        published: What to call the model and its bases; without bases it is no adapter.
        card_of: Makes the card from `run_summary.json`, for this machine (`None`) or for others.
        needed: What `run_summary.json` must say for that.
        pipeline_tag: As the Hub files it.

    Raises:
        ValueError: if the card's metadata or one of the run's files is damaged.
    """
    path, summary = folder / "README.md", folder / "run_summary.json"
    written = path.read_text(encoding="utf-8")
    recorded = read_json(summary) if summary.is_file() else {}
    here = there = ""
    if set(needed) <= recorded.keys():
        here, there = card_of(folder, recorded, None), card_of(folder, published.summary(recorded), published)
        if written == here:
            return there
    try:
        card = ModelCard(written)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path} has damaged metadata ({error}).") from error
    card.data.pipeline_tag = pipeline_tag
    if published.bases:
        card.data.library_name = "peft"
        card.data.base_model = published.base_model
        card.data["base_model_relation"] = "adapter"
    card.data.license = card.data.license or common_licence(published.licences.values())
    before, after = (ModelCard(made).text.splitlines() for made in (here, there))
    renamed = dict(zip(map(_without_licence, before), after, strict=True))
    card.text = "\n".join(renamed.get(_without_licence(line), line) for line in card.text.splitlines()) + "\n"
    return str(card)


def _without_licence(line: str) -> str:
    # A base's card may lie here that did not when the run wrote its own.
    return line.partition("`: ")[0] if line.startswith(("- encoder `", "- decoder `")) else line


def _card_of(folder: Path, summary: Mapping[str, Any], published: Published | None = None) -> str:
    encoder, decoder = summary["vision_model"], summary["text_model"]
    if published is None:
        # Local folders are no ids: the Hub would show broken links.
        bases = [name for name in (decoder, encoder) if _is_hub_id(name)]
        stated = {"vision": stated_licence(encoder, revision=summary.get("vision_revision"))}
        stated["text"] = stated_licence(decoder, revision=summary.get("text_revision"))
    else:
        bases, stated = published.base_model, dict(published.licences)
    licences = [("encoder", encoder, stated["vision"]), ("decoder", decoder, stated["text"])]
    for name, revision in _datasets(summary).items():
        licences.append(("data", name, stated_licence(name, revision=revision, repo_type="dataset")))
    adapter = str(summary.get("adapter") or folder.resolve().name)
    scores = read_all_scores(folder)
    samples, blind = _samples(folder, scores), blind_lines(folder)
    return model_card(summary, scores, samples, licences, bases=bases, adapter=adapter, blind=blind)


def model_card(
    summary: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Any] | None,
    licences: Licences,
    *,
    bases: Sequence[str],
    adapter: str,
    blind: Sequence[str] = (),
) -> str:
    """Return the card: metadata and Markdown in which all that comes from a run or a data set is text.

    Args:
        summary: Of `run_summary.json`.
        scores: Of `read_all_scores`.
        samples: `split`, `how` they were chosen, `has_questions`, and `rows` with `kind`, `link`, `question`,
            `prediction` and `reference`; None for no samples.
        licences: What cards state.
        bases: Ids on the Hub of the decoder and the encoder, as far as there are any.
        adapter: What to pass to `from_adapter`.
        blind: Of `blind_lines`.
    """
    datasets = _datasets(summary)
    is_adapter = loads_with(summary) == "from_adapter"
    relation: Any = {"base_model_relation": "adapter" if is_adapter else "finetune"} if bases else {}
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        license=common_licence(licence for what, _, licence in licences if what != "data"),
        base_model=list(bases) or None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        tags=["vlm_peft", *(["lora"] if "LoRA" in _trains(summary) else []), "vision-language"],
        model_name=_named(summary["title"]),
        eval_results=eval_results(scores, datasets) or None,
        **relation,
    )
    revisions = {"encoder": summary.get("vision_revision"), "decoder": summary.get("text_revision")}
    return render(
        "card.md.jinja",
        metadata=Markdown(metadata.to_yaml()),
        title=summary["title"],
        encoder=summary["vision_model"],
        decoder=summary["text_model"],
        datasets=datasets,
        kind="An adapter" if is_adapter else "A model",
        trains=_trains(summary),
        loads_with=loads_with(summary),
        parameters=summary["parameters"],
        trained=summary["trainable_parameters"],
        adapter=Markdown(json.dumps(visible(adapter), ensure_ascii=False)),
        rows=[row for split, conditions in scores.items() for row in score_rows(split, conditions)],
        blind=blind,
        made_by=scored_how(scores),
        samples=samples,
        data={split: _facts(facts) for split, facts in (summary.get("data") or {}).items()},
        licences=[licence_line(*each) for each in licences],
        revisions={what: revision for what, revision in revisions.items() if revision},
        seconds=[f"{name} {value:g}" for name, value in summary["seconds"].items()],
        versions=[f"{name} {value}" for name, value in summary["versions"].items()],
        **{name: str(summary[name]) for name in ("command", "date", "device", "seed")},
    )


def _trains(summary: Mapping[str, Any]) -> str:
    """What trained; LoRA and the projector in runs that do not say."""
    return str(summary.get("trains") or "LoRA and projector")


def _datasets(summary: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> revision; a run on a mixture has several, each with its own or none."""
    names, revisions = summary["dataset"], summary.get("dataset_revision")
    names = [names] if isinstance(names, str) else names
    revisions = revisions if isinstance(revisions, list) else [revisions] * len(names)
    return dict(zip(map(str, names), revisions, strict=True))


def _trained_first(conditions: Mapping[str, Any]) -> list[Any]:
    return [conditions[name] for name in ("after", *CONDITIONS) if name in conditions]


def score_rows(split: str, conditions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line of a card's table for each metric, with the score before training and the blind control beside it.

    Args:
        split: Its name.
        conditions: Of `read_all_scores`.
    """
    some = _trained_first(conditions)
    metrics = dict.fromkeys(name for each in some for name in each["metrics"])
    known = {"split": split, "task": _task(some[0]), "n": some[0]["n"]}
    return [
        {**known, "metric": metric, **{name: _score(conditions.get(name), metric) for name in CONDITIONS}}
        for metric in metrics
    ]


def _task(scores: Mapping[str, Any]) -> str:
    return str(scores.get("task") or "caption")


def _score(scores: Mapping[str, Any] | None, metric: str) -> Markdown:
    value = None if scores is None else scores["metrics"].get(metric)
    if scores is None or value is None:
        return Markdown()
    interval = (scores.get("intervals") or {}).get(metric)
    return Markdown(f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))


def scored_how(scores: Mapping[str, Mapping[str, Any]]) -> dict[Markdown, list[str]]:
    """How texts were made and scored -> the splits of which that is so.

    Args:
        scores: Of `read_all_scores`.
    """
    made_by: dict[Markdown, list[str]] = {}
    for split, conditions in scores.items():
        shown = _trained_first(conditions)[0]
        decoding = {name: value for name, value in (shown.get("decoding") or {}).items() if name != "blind"}
        made = [f"tokenizer of the metrics: {markdown(shown['tokenizer'])}"] if shown.get("tokenizer") else []
        made += [f"decoding: {code(json.dumps(decoding, ensure_ascii=False))}"] if decoding else []
        made += [f"left out: {code(json.dumps(shown['skipped'], ensure_ascii=False))}"] if shown.get("skipped") else []
        made += [markdown(str(note)) for note in shown.get("notes") or []]
        if made:
            made_by.setdefault(Markdown("; ".join(made)), []).append(split)
    return made_by


def eval_results(
    scores: Mapping[str, Mapping[str, Any]],
    datasets: Mapping[str, str | None],
    task_type: str = "image-text-to-text",
) -> list[EvalResult]:
    """The scores after training, for the Hub's `model-index`.

    Args:
        scores: Of `read_all_scores`.
        datasets: Name -> revision.
        task_type: As the Hub calls it.
    """
    results = []
    for split, conditions in scores.items():
        each = conditions.get("after", {})
        for metric, value in each.get("metrics", {}).items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            dataset = str(each.get("dataset") or next(iter(datasets)))
            revision = datasets.get(dataset)
            kind = next((known for start, known in METRIC_TYPES.items() if metric.startswith(start)), metric.lower())
            results.append(
                EvalResult(
                    task_type=task_type,
                    task_name=_named(_task(each)),
                    dataset_type=dataset if _is_hub_id(dataset) else _named(Path(dataset).name),
                    dataset_name=_named(Path(dataset).name),
                    dataset_split=split,
                    dataset_revision=_named(revision) if revision else None,
                    metric_type=_named(kind),
                    metric_name=_named(metric),
                    metric_value=round(float(value), 6),
                )
            )
    return results


def _samples(output_dir: Path, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Pictures that the training never saw, with what the model says: the best and the worst of the first split."""
    for split, conditions in scores.items():
        path = output_dir / "eval" / split / "predictions.jsonl"
        if "after" not in conditions or not path.is_file():
            continue
        rows = [row for row in read_predictions(path) if picture_path(output_dir, split, row["id"]).is_file()]
        metrics = ranking(conditions["after"])
        half = min(SAMPLES, sum(row.get(metrics[0].lower()) is not None for row in rows) // 2)
        best, worst = best_and_worst(rows, metrics, 2 * half)
        kinds = {"best": best, "worst": worst} if half else {"first": rows[: 2 * SAMPLES]}
        shown = [
            {
                "kind": kind,
                # The thumbnail's file name may hold percent signs of its own.
                "link": Markdown(quote(picture_path(output_dir, split, row["id"]).relative_to(output_dir).as_posix())),
                "question": _short(row.get("question") or ""),
                "prediction": _short(row["prediction"]),
                "reference": _short(references_of(row)[0]),
            }
            for kind, chosen in kinds.items()
            for row in chosen
        ]
        if shown:
            how = f"the {half} best and the {half} worst by {metrics[0]}" if half else "the first ones"
            has_questions = any(row["question"] for row in shown)
            return {"split": split, "how": how, "has_questions": has_questions, "rows": shown}
    return None


def _short(text: Any) -> str:
    text = one_line(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _named(value: Any) -> str:
    # What does not know metadata takes it for a part of the text.
    return one_line(value).replace("<", "\u2039").replace(">", "\u203a")


def _facts(facts: Mapping[str, Any]) -> list[str]:
    shown = [f"{facts[name]:,} {name}" for name in ("rows", "pictures") if facts.get(name) is not None]
    if facts.get("content_hash"):
        shown.append(Markdown(f"content hash {code(facts['content_hash'])}"))
    return shown


def _is_hub_id(name: str) -> bool:
    """`owner/name` that is no folder here."""
    return "/" in name and is_hub_id(name) and not Path(name).exists()
