"""The README.md of a CLIP's adapter folder, or of its merged checkpoint: what the run measured, and how to load it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..evaluation.records import read_all_scores, write_text
from ..hub.access import is_hub_id
from ..hub.licences import common_licence, licence_line, stated_licence
from ..hub.markup import Markdown, one_line, visible
from ..hub.models import Published
from ..json_files import read_json
from ..report.model_card import completed_card, eval_results, score_rows, scored_how
from ..report.pages import render

PIPELINE = "zero-shot-image-classification"
"""As the Hub files a CLIP."""

NEEDED = (
    "title",
    "date",
    "command",
    "vision_model",
    "dataset",
    "device",
    "seed",
    "parameters",
    "trainable_parameters",
    "seconds",
    "versions",
)
"""What `run_summary.json` must say."""


def write_clip_card(folder: Path | str) -> Path:
    """Writes `README.md` into a folder, from its run_summary.json and eval/*/scores.json, and returns its path.

    Args:
        folder (`Path` or `str`): Of the run, or of [`describe_merged`].

    Raises:
        FileNotFoundError: When there is no run_summary.json.
    """
    folder = Path(folder)
    summary = read_json(folder / "run_summary.json")
    target = folder / "README.md"
    write_text(target, _card_of(folder, summary, None))
    return target


def describe_merged(run: Path | str, merged: Path | str) -> None:
    """Gives a plain checkpoint what its run measured, and a card of its own, so that it can be pushed by itself.

    Args:
        run (`Path` or `str`): The adapter's folder; without run_summary.json there is nothing to tell.
        merged (`Path` or `str`): Of [`~vlm_peft.contrastive.folder.save_merged`].
    """
    run, merged = Path(run), Path(merged)
    if not (run / "run_summary.json").is_file():
        return
    summary = read_json(run / "run_summary.json")
    write_text(merged / "run_summary.json", json.dumps(summary | {"adapter": str(merged)}, indent=2) + "\n")
    for path in run.glob("eval/*/scores.json"):
        target = merged / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    write_clip_card(merged)


def clip_card_for_others(folder: Path, published: Published) -> str:
    """The folder's card with the names under which others find it and its base; lines that its owner wrote stay.

    Args:
        folder (`Path`): With `README.md`.
        published ([`~vlm_peft.hub.models.Published`]): What to call the model and its base.

    Raises:
        ValueError: When the card's metadata or one of the run's files is damaged.
    """
    return completed_card(folder, published, _card_of, NEEDED, PIPELINE)


def _card_of(folder: Path, summary: Mapping[str, Any], published: Published | None) -> str:
    base, data = str(summary["vision_model"]), str(summary["dataset"])
    is_adapter = (folder / "adapter_config.json").is_file()
    if published is not None and published.bases:
        licence = published.licences["vision"] or None
    else:
        licence = stated_licence(base, revision=summary.get("vision_revision"))
    scores, revision = read_all_scores(folder), summary.get("dataset_revision")
    relation: Any = {"base_model_relation": "adapter" if is_adapter else "finetune"} if is_hub_id(base) else {}
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINE,
        license=common_licence([licence]),
        base_model=[base] if is_hub_id(base) else None,
        datasets=[data] if is_hub_id(data) else None,
        tags=["vlm_peft", "clip", "contrastive"],
        model_name=one_line(summary["title"]).replace("<", "\u2039").replace(">", "\u203a"),
        eval_results=eval_results(scores, {data: revision}, PIPELINE) or None,
        **relation,
    )
    of_data = stated_licence(data, revision=revision, repo_type="dataset")
    return render(
        "clip_card.md.jinja",
        metadata=Markdown(metadata.to_yaml()),
        title=summary["title"],
        base=base,
        dataset=data,
        is_adapter=is_adapter,
        trained=summary["trainable_parameters"],
        parameters=summary["parameters"],
        adapter=Markdown(json.dumps(visible(str(summary.get("adapter") or folder.name)), ensure_ascii=False)),
        rows=[row for split, conditions in scores.items() for row in score_rows(split, conditions)],
        made_by=scored_how(scores),
        licences=[licence_line("encoder", base, licence), licence_line("data", data, of_data)],
        seconds=[f"{name} {value:g}" for name, value in summary["seconds"].items()],
        versions=[f"{name} {value}" for name, value in summary["versions"].items()],
        **{name: str(summary[name]) for name in ("command", "date", "device", "seed")},
    )
