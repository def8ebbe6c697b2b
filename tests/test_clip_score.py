"""CLIPScore by the demo's small CLIP: against a computation by hand, and right captions above wrong ones."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from vlm_peft.metrics.clip_score import clip_scores

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo"
CLIP = DEMO / "clip"


@pytest.fixture(scope="module")
def scenes():
    data = str(DEMO / "scenes" / "data" / "test-*.parquet")
    return load_dataset("parquet", data_files={"test": data}, split="test").select(range(12))


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def test_equals_a_computation_by_hand(scenes):
    pictures, captions = list(scenes["image"])[:3], ["a dog", "an airplane above a pineapple", "red"]
    references = [["a cat"], ["an airplane", "a pineapple below an airplane"], ["blue", "green", "a red background"]]
    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    image_processor, tokenizer = AutoImageProcessor.from_pretrained(CLIP), AutoTokenizer.from_pretrained(CLIP)

    def image(picture) -> torch.Tensor:
        pixels = image_processor(picture, return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output)[0]

    def text(words: str) -> torch.Tensor:
        ids = tokenizer(f"see {words}<|im_end|>", return_tensors="pt")["input_ids"]
        return model.text_projection(model.text_model(ids).last_hidden_state[0, -1])

    alone, with_references = [], []
    with torch.no_grad():
        for picture, caption, group in zip(pictures, captions, references, strict=True):
            alone.append(2.5 * max(cosine(image(picture), text(caption)), 0))
            nearest = max(max(cosine(text(caption), text(each)) for each in group), 0)
            with_references.append(2 * alone[-1] * nearest / (alone[-1] + nearest) if alone[-1] + nearest else 0)
    # Batches of two put texts of other lengths beside each other, and pictures in two batches.
    scores = clip_scores(CLIP, pictures, captions, references, prefix="see ", batch_size=2)
    assert scores.per_picture["CLIPScore"] == pytest.approx(alone, abs=1e-5)
    assert scores.per_picture["RefCLIPScore"] == pytest.approx(with_references, abs=1e-5)
    assert scores.metrics["CLIPScore"] == pytest.approx(sum(alone) / 3, abs=1e-5)
    assert scores.notes == []


def test_right_captions_score_higher_than_swapped_ones(scenes):
    captions = [group[0] for group in scenes["captions"]]
    references = [group[1:] for group in scenes["captions"]]
    right = clip_scores(CLIP, scenes["image"], captions, references, prefix="")
    wrong = clip_scores(CLIP, scenes["image"], captions[6:] + captions[:6], references, prefix="")
    pairs = zip(right.per_picture["CLIPScore"], wrong.per_picture["CLIPScore"], strict=True)
    assert sum(a > b for a, b in pairs) >= 11
    assert right.metrics["CLIPScore"] > 2 * wrong.metrics["CLIPScore"]
    assert right.metrics["RefCLIPScore"] > wrong.metrics["RefCLIPScore"]


def test_a_caption_that_is_its_reference_and_a_caption_too_long(scenes):
    long = "a dog " * 40
    scores = clip_scores(CLIP, list(scenes["image"])[:1], [long], [[long, "a cat"]], prefix="")
    alone = scores.per_picture["CLIPScore"][0]
    assert scores.per_picture["RefCLIPScore"] == pytest.approx([2 * alone / (alone + 1)], abs=1e-5)
    assert scores.notes == ["2 of 3 texts are longer than CLIP reads, and were cut."]


def test_opposite_captions_score_zero_and_not_less(scenes):
    scores = clip_scores(CLIP, list(scenes["image"])[:4], ["a; b; c; d; e; f"] * 4, [["xyz"]] * 4, prefix="")
    assert min(scores.per_picture["CLIPScore"]) == 0
    assert all(score >= 0 for values in scores.per_picture.values() for score in values)


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([], None, "expected a caption for each picture, got 1 pictures, 0 captions"),
        (["a"], [], "expected references for each of 1 pictures, got 0 lists"),
        (["a"], [[]], "picture 0: expected a list of one or more references"),
        (["a"], ["a"], "picture 0: expected a list of one or more references"),
    ],
)
def test_bad_input_is_named(scenes, captions, references, message):
    with pytest.raises(ValueError, match=message):
        clip_scores(CLIP, list(scenes["image"])[:1], captions, references)


def test_what_is_no_clip_with_both_towers_is_named(bases, scenes, tmp_path):
    pictures = list(scenes["image"])[:1]
    with pytest.raises(ValueError, match="which is of the type 'qwen3'"):
        clip_scores(bases[1], pictures, ["a"])
    model = CLIPModel.from_pretrained(CLIP)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("text_model")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"which lacks text_model"):
        clip_scores(tmp_path, pictures, ["a"])
