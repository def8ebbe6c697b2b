"""Which rows a run reads, trains on and holds out: one list for the recipe, the doctor and inspect."""

import json

import pytest
import torch
from conftest import flickr_rows, make_processor, save_flickr

from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.data import load_held_out, load_training, parts


@pytest.fixture
def options(bases, tmp_path):
    """A mixture of two data sets, whose pictures are not read ahead."""
    rows = flickr_rows(8, 4)
    rows["image"] = flickr_rows()["image"][-12:]
    first = {"dataset_name": str(save_flickr(tmp_path / "first")), "train_limit": 6, "eval_splits": ["val", "test"]}
    second = {"dataset_name": str(save_flickr(tmp_path / "second", rows)), "eval_splits": ["test"], "eval_limit": 1}
    stored = {"stored_split": "test", "split_column": "split", "task": "caption"}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"mixture": [first | stored, second | stored]}))
    return [
        *("--config", str(config), "--vision_model", str(bases[0]), "--model_name_or_path", str(bases[1])),
        *("--vision_feature_layer", "-1", "--output_dir", str(tmp_path / "out"), "--use_peft", "true"),
        *("--use_cpu", "true", "--bf16", "false", "--feature_cache", "false", "--allow_overlap", "true"),
        *("--eval_strategy", "steps", "--eval_steps", "5", "--per_device_train_batch_size", "2"),
    ]


def test_what_a_run_reads_is_listed_once(options):
    vision, _, _ = parse_arguments(options)
    assert [(part.name, part.is_held_out, part.limit) for part in parts(vision)] == [
        ("train", False, 6),
        ("val", True, None),
        ("test", True, None),
        ("train", False, None),
        ("test", True, 1),
    ]


def test_encoded_rows_have_the_pictures_of_their_own_data_set(options, model):
    vision, training, _ = parse_arguments(options)
    processor = make_processor(model.config)
    held_out = load_held_out(vision, model, processor)
    assert {name: len(split.texts) for name, split in held_out.items()} == {
        "caption-val": 4,
        "caption-test": 4,
        "second-caption-test": 1,
    }
    data = load_training(vision, training, model, processor, held_out)
    first, second = data.splits
    assert (len(first.texts), len(second.texts), len(data.dataset)) == (6, 8, 14)
    # The loss at evaluations is that of each data set's first held-out split.
    watched = [held_out["caption-val"], held_out["second-caption-test"]]
    assert len(data.eval_dataset) == 4 + 1
    owners = [split for split in [first, second, *watched] for _ in range(len(split.texts))]
    for row, split in zip([*data.dataset, *data.eval_dataset], owners, strict=True):
        expected = split.fetch_images(list(split.pictures.of_row(row["row"])))
        assert torch.equal(data.fetch_images(row["image_ids"])["pixel_values"], expected["pixel_values"])


def test_rows_that_make_no_step_are_refused(options, model):
    vision, training, _ = parse_arguments([*options, "--dataloader_drop_last", "true"])
    training.per_device_train_batch_size = 15
    with pytest.raises(ValueError, match="The run has no step: 14 rows in batches of 15"):
        load_training(vision, training, model, make_processor(model.config), {})
