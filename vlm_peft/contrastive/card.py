"""The README.md of a CLIP's adapter folder: what the run measured, and how to load it."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from ..evaluation.records import write_text
from ..hub.access import is_hub_id
from ..hub.licences import licence_line, stated_licence


def write_clip_card(output_dir: Path | str) -> Path:
    """Writes `README.md` into a run's folder, from its run_summary.json and eval/*/scores.json, and returns its path.

    Args:
        output_dir (`Path` or `str`): The run's folder.

    Raises:
        FileNotFoundError: When there is no run_summary.json.
    """
    output_dir = Path(output_dir)
    summary = json.loads((output_dir / "run_summary.json").read_text(encoding="utf-8"))
    base, data = str(summary["vision_model"]), str(summary["dataset"])
    licence = stated_licence(base, revision=summary.get("vision_revision"))
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        license=licence or None,
        base_model=[base] if is_hub_id(base) else None,
        datasets=[data] if is_hub_id(data) else None,
        tags=["vlm_peft", "clip", "contrastive"],
    )
    trained, total = summary["trainable_parameters"], summary["parameters"]
    adapter = json.dumps(str(summary["adapter"]), ensure_ascii=False)
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {summary['title']}\n",
        f"`{base}` fine-tuned with a contrastive loss on `{data}` by vlm_peft: {trained:,} trained of {total:,} "
        f"parameters ({100 * trained / total:.2f} %).\n",
        f"```python\nfrom vlm_peft.contrastive.folder import load_clip\nencoder = load_clip({adapter})\n"
        'texts = encoder.embed_texts(["a red bicycle"])  # (1, D), of unit length\n```\n',
        "## Scores\n",
    ]
    for path in sorted(output_dir.glob("eval/*/scores.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        shown = ", ".join(
            f"{name} {value:.3f}" + _interval(scores["intervals"].get(name))
            for name, value in scores["metrics"].items()
        )
        lines.append(f"- **{path.parent.name}** (n = {scores['n']}): {shown}. {' '.join(scores['notes'])}")
    lines += [
        "\n## Licences\n",
        licence_line("encoder", base, licence),
        licence_line("data", data, stated_licence(data, revision=summary.get("dataset_revision"), repo_type="dataset")),
        f"\n## How it was made\n\n`{summary['command']}`, {summary['date']}, on {summary['device']}, seed "
        f"{summary['seed']}, {summary['seconds']['train']:.0f} s of training.\n",
    ]
    target = output_dir / "README.md"
    write_text(target, "\n".join(lines))
    return target


def _interval(found: list[float] | None) -> str:
    return "" if found is None else f" ({found[0]:.3f} to {found[1]:.3f})"
