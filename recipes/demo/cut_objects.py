"""Cut the demo's objects out of its scenes: a table of pictures with one object and its name for each split.

    python recipes/demo/cut_objects.py --output outputs/demo_objects

For zero-shot and few-shot scores over all 64 names (`recipes/configs/clip_demo_objects.yaml`): only 35 pictures of the
scenes' ``test`` show one kind of object. A cut is a square around the object's box, with a quarter of it as margin, and
shows a part of its neighbours where these are near.
"""

import argparse
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

SCENES = Path(__file__).parent / "scenes" / "data"
SIDE = 64
MARGIN = 0.25
SPLITS = ("train", "test", "test_style")
CARD = "---\nconfigs:\n  - config_name: default\n    data_files:\n"


def cut(scene: Image.Image, box: list[int]) -> bytes:
    """A square around a box [x, y, width, height], as lossless WebP of 64 x 64; beyond the scene is its background."""
    x, y, width, height = box
    half = round(max(width, height) * (1 + MARGIN) / 2)
    left, top = x + width // 2 - half, y + height // 2 - half
    square = Image.new("RGB", (2 * half, 2 * half), scene.getpixel((0, 0)))
    square.paste(scene, (-left, -top))
    buffer = BytesIO()
    square.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def main() -> None:
    """Writes a parquet file for each split with pictures of objects."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo_objects"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    columns = Features({"image": ImageFeature(), "label": Value("string")})
    # Without a card the file of `test_style` would be taken for a part of `test`.
    files = "".join(f"      - split: {split}\n        path: {split}-*.parquet\n" for split in SPLITS)
    (output / "README.md").write_text(f"{CARD}{files}---\nObjects cut out of the demo's scenes.\n", encoding="utf-8")
    for split in SPLITS:
        rows: dict[str, list] = {"image": [], "label": []}
        for row in pq.read_table(SCENES / f"{split}-00000-of-00001.parquet").to_pylist():
            scene = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
            for each in row["objects"]:
                rows["image"].append({"bytes": cut(scene, each["box"]), "path": None})
                rows["label"].append(each["name"])
        Dataset.from_dict(rows, columns).to_parquet(output / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(rows['label']):,} objects of {len(set(rows['label']))} names")


if __name__ == "__main__":
    main()
