"""The README.md of an adapter folder: what the run measured, how to load it, and nothing else.

It reads what the run wrote (`run_summary.json`, `eval/<split>/scores.json`, see report.py) and takes the place of TRL's
own card, which describes a text model.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from predictions import write_text


def write_model_card(output_dir: Path | str) -> Path:
    """Write `README.md` into a run's folder and return its path.

    Args:
        output_dir: The run's folder, with `run_summary.json`; scores are listed where there are any.

    Raises:
        FileNotFoundError: if there is no `run_summary.json`.
    """
    output_dir = Path(output_dir)
    summary = json.loads((output_dir / "run_summary.json").read_text(encoding="utf-8"))
    scores = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(output_dir.glob("eval/*/scores.json"))
    }
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-text-to-text",
        # Local folders are no ids: the Hub would show broken links.
        base_model=[name for name in (summary["text_model"], summary["vision_model"]) if _is_hub_id(name)] or None,
        datasets=[summary["dataset"]] if _is_hub_id(summary["dataset"]) else None,
        tags=["vlm_peft", "lora", "vision-language"],
    )
    trained = summary["trainable_parameters"]
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {summary['title']}\n",
        f"An adapter (LoRA and projector, {trained:,} trained of {summary['parameters']:,} parameters) that joins "
        f"`{summary['vision_model']}` and `{summary['text_model']}`, made with vlm_peft on `{summary['dataset']}`.\n",
        "```python\nfrom vlm_peft import VisionQwen, VisionQwenProcessor\n"
        'model = VisionQwen.from_adapter("THIS_FOLDER_OR_ID")\n'
        'processor = VisionQwenProcessor.from_pretrained("THIS_FOLDER_OR_ID")\n```\n',
        _scores_table(scores),
        "## How it was made\n",
        "\n".join(
            [
                f"- command: `{summary['command']}`",
                f"- date: {summary['date']}, device: {summary['device']}, seed: {summary['seed']}",
                "- seconds: " + ", ".join(f"{name} {value:g}" for name, value in summary["seconds"].items()),
                "- versions: " + ", ".join(f"{name} {value}" for name, value in summary["versions"].items()),
            ]
        ),
    ]
    target = output_dir / "README.md"
    write_text(target, "\n".join(part for part in parts if part) + "\n")
    return target


def _scores_table(scores: dict[str, dict[str, Any]]) -> str:
    """One line for each scores.json; `-before` is the untrained model, `-blind` the control with swapped pictures."""
    if not scores:
        return ""
    metrics = list(dict.fromkeys(name for each in scores.values() for name in each["metrics"]))
    lines = [
        "## Scores\n",
        "`-before`: before training. `-blind`: each picture swapped for another one. In brackets 95 % intervals.\n",
        "| split | n | " + " | ".join(metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for name, each in scores.items():
        cells = []
        for metric in metrics:
            value, interval = each["metrics"].get(metric), each.get("intervals", {}).get(metric)
            shown = "" if value is None else f"{value:.3f}"
            cells.append(shown + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        lines.append(f"| {name} | {each['n']} | " + " | ".join(cells) + " |")
    some = next(iter(scores.values()))
    lines.append(f"\nTokenizer of the metrics: {some['tokenizer']}. Decoding: {json.dumps(some['decoding'])}.\n")
    return "\n".join(lines)


def _is_hub_id(name: str) -> bool:
    """`owner/name` that is no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
