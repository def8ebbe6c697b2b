"""CLIP and SigLIP: losses, what trains, folders, large batches, several processes, and giving the encoder back."""

import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, make_tokenizer
from PIL import Image
from tiny_clips import COLORS, SIDE, TOWER, save_tiny
from transformers import AutoModel, CLIPModel, Siglip2Config, Siglip2Model, TrainingArguments
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from vlm_peft.contrastive.adapt import TUNINGS, Tuning, adapt, trained_parameters, tuning_table
from vlm_peft.contrastive.encoder import DualEncoder
from vlm_peft.contrastive.folder import interpolate, load_clip, load_trained, save_clip, save_merged
from vlm_peft.contrastive.loss import info_nce, matches, sigmoid_loss
from vlm_peft.contrastive.pairs import PairCollator, PairRows, check_texts, class_names, load_pairs, picture_vectors
from vlm_peft.contrastive.trainer import ContrastiveTrainer
from vlm_peft.data.arguments import DataArguments

KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("clips")
    return {kind: save_tiny(place / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures of one colour each, with two captions and a class, as a folder with metadata."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for index, color in enumerate(COLORS):
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "captions": [f"it is {color}", f"{color} it is"], "label": color})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def load(folder, **options):
    return load_pairs(DataArguments(dataset_name=str(folder)), "train", **options)


def batch(encoder, pairs, count=4, **options):
    rows = PairRows(pairs, **options)
    return PairCollator(encoder, pairs)([rows[index] for index in range(count)])


def loss_of(encoder, inputs, loss="info_nce"):
    """As the trainer computes it."""
    arguments = TrainingArguments(use_cpu=True, report_to="none", remove_unused_columns=False)
    return ContrastiveTrainer(encoder, arguments, loss=loss).compute_loss(encoder, inputs)


# --- losses


@pytest.mark.parametrize(("kind", "loss"), [("clip", "info_nce"), ("siglip", "sigmoid")])
def test_with_one_text_a_picture_the_loss_is_the_models_own(folders, pictures, kind, loss):
    encoder = load_clip(folders[kind])
    inputs = batch(encoder, load(pictures), texts_per_picture=1)
    own = encoder.clip(**inputs["text"], **inputs["image"], return_loss=True).loss
    torch.testing.assert_close(loss_of(encoder, inputs, loss), own, rtol=1e-6, atol=1e-6)


def test_pictures_of_any_shape_have_the_models_own_loss_too(pictures):
    """SigLIP 2 with native aspect ratios takes patches, a mask and their grid."""
    text = {**TOWER, "vocab_size": 260, "max_position_embeddings": 24, "projection_size": 16, "pad_token_id": 256}
    model = Siglip2Model(
        Siglip2Config(text_config=text, vision_config={**TOWER, "num_patches": 16, "patch_size": 2})
    ).eval()
    processor = SimpleNamespace(
        image_processor=Siglip2ImageProcessorPil(patch_size=2, max_num_patches=16), tokenizer=make_tokenizer()
    )
    encoder = DualEncoder(model, processor)
    inputs = batch(encoder, load(pictures), texts_per_picture=1)
    own = model(**inputs["text"], **inputs["image"], return_loss=True).loss
    for size in (None, 2):
        encoder.chunk_size = size
        torch.testing.assert_close(loss_of(encoder, inputs, "sigmoid"), own, rtol=1e-5, atol=1e-5)


def test_other_texts_of_a_picture_are_never_negatives():
    logits = torch.randn(3, 5)
    picture_of, ids = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 2])
    true = matches(ids, picture_of, torch.arange(5))
    loss = info_nce(logits, picture_of, true)
    terms = []
    for text, owner in enumerate(picture_of.tolist()):
        others = [other for other in range(5) if picture_of[other] != owner]
        to_text = torch.logsumexp(logits[owner, [text, *others]], 0) - logits[owner, text]
        terms.append((owner, to_text, torch.logsumexp(logits[:, text], 0) - logits[owner, text]))
    by_picture = [[each[1] for each in terms if each[0] == owner] for owner in range(3)]
    expected = torch.stack([torch.stack(each).mean() for each in by_picture]).mean()
    expected = (expected + torch.stack([each[2] for each in terms]).mean()) / 2
    torch.testing.assert_close(loss, expected)
    # The sibling's logit enters the sum over siblings, and no denominator.
    raised = logits.clone()
    raised[0, 1] += 5
    assert info_nce(raised, picture_of, true) < loss


def test_equal_texts_and_equal_pictures_are_true_of_each_other():
    true = matches(torch.tensor([7, 8, 7]), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    assert true.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    true = matches(torch.tensor([7, 8]), torch.tensor([0, 1]), torch.tensor([5, 5]))
    assert true.all()
    # Nothing is left to learn from, and nothing is broken by it.
    logits = torch.randn(2, 2, requires_grad=True)
    info_nce(logits, torch.tensor([0, 1]), true).backward()
    assert torch.isfinite(logits.grad).all()
    assert info_nce(logits, torch.tensor([0, 1]), true) == 0
    torch.testing.assert_close(sigmoid_loss(logits, true), -torch.nn.functional.logsigmoid(logits).sum() / 2)


# --- large batches and several processes


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_gradients_of_the_whole_batch(folders, pictures, kind):
    found = []
    for size in (None, 3):
        encoder = load_clip(folders[kind])
        encoder.clip = adapt(encoder.clip, Tuning(vision="full", text="full"))
        encoder.chunk_size = size
        loss = loss_of(encoder, batch(encoder, load(pictures), 8))
        loss.backward()
        found.append((loss.detach(), {name: each.grad for name, each in trained_parameters(encoder.clip).items()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_chunks_hold_fewer_activations(folders, pictures):
    def saved(size):
        encoder = load_clip(folders["clip"])
        encoder.clip = adapt(encoder.clip, Tuning(vision="full", text="locked"))
        encoder.chunk_size = size
        inputs, total = batch(encoder, load(pictures), 8), [0]

        def count(tensor):
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss_of(encoder, inputs)
        return total[0]

    assert saved(2) < saved(None) / 3


def train(
    folder, pictures, output, *, tuning=None, steps=3, size=4, callbacks=(), vectors=False, loss="info_nce", **more
):
    torch.manual_seed(0)
    encoder, pairs = load_clip(folder), load(pictures)
    found = picture_vectors(encoder, pairs, str(output / "vectors")) if vectors else None
    encoder.clip = adapt(encoder.clip, tuning or Tuning())
    arguments = {"max_steps": steps, "per_device_train_batch_size": size, "learning_rate": 1e-2, "logging_steps": 1}
    arguments |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False}
    trainer = ContrastiveTrainer(
        encoder,
        TrainingArguments(output_dir=str(output), disable_tqdm=True, **{**arguments, **more}),
        train_dataset=PairRows(pairs, 1),
        data_collator=PairCollator(encoder, pairs, found),
        loss=loss,
        callbacks=list(callbacks),
    )
    return trainer


# Adam would make steps of the rounding of gradients that are zero.
_TOGETHER = {"tuning": Tuning(vision="lora", text="full"), "optim": "sgd", "learning_rate": 0.1}


def _one_of_two(rank, port, folder, pictures, output):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    trainer = train(folder, pictures, output, size=2, **_TOGETHER, ddp_backend="gloo")
    trainer.train()
    if rank == 0:
        trainer.save_model(str(output / "two"))
        (output / "two.json").write_text(
            json.dumps([each["loss"] for each in trainer.state.log_history if "loss" in each])
        )


def test_two_processes_train_as_one_with_the_whole_batch(folders, pictures, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, (port, folders["clip"], pictures, tmp_path), nprocs=2)
    trainer = train(folders["clip"], pictures, tmp_path, size=4, **_TOGETHER)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    # Logged losses are rounded to four digits.
    assert json.loads((tmp_path / "two.json").read_text()) == pytest.approx(losses, abs=2e-4)
    two = load_clip(tmp_path / "two", merge=False).clip.state_dict()
    for name, value in trainer.model.clip.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


# --- what trains, and folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", TUNINGS[1:])
def test_a_tower_trains_as_asked_and_its_folder_loads(folders, pictures, tmp_path, kind, way):
    trainer = train(folders[kind], pictures, tmp_path, tuning=Tuning(vision=way, text="locked"), loss="sigmoid")
    before = {name: value.clone() for name, value in trainer.model.clip.state_dict().items()}
    trainer.train()
    moved = {n for n, value in trainer.model.clip.state_dict().items() if not torch.equal(before[n], value)}
    assert moved
    assert all("vision" in name or "visual" in name or "logit_" in name for name in moved)
    if way == "last_layers":
        assert not [name for name in moved if "embeddings" in name or "layers.0." in name]
    counts = {part: trained for part, _, trained in tuning_table(trainer.model.clip)}
    assert counts["text tower"] == 0
    assert counts["vision tower"] > 0

    trainer.save_model(str(tmp_path / "adapter"))
    encoder, loaded = trainer.model.eval(), load_clip(tmp_path / "adapter", merge=False)
    picture = [Image.new("RGB", (SIDE, SIDE), "teal")]
    assert torch.equal(encoder.embed_pictures(picture), loaded.embed_pictures(picture))
    assert torch.equal(encoder.logit_scale, loaded.logit_scale)
    # The merged folder is any program's: stock transformers, without a key too many or too few.
    save_merged(tmp_path / "adapter", tmp_path / "merged")
    stock, info = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    features = stock.get_image_features(**encoder.pixels(picture)).pooler_output
    expected = encoder.embed_pictures(picture)
    torch.testing.assert_close(torch.nn.functional.normalize(features), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_checkpoints_train_in_float32(tmp_path, pictures):
    trainer = train(save_tiny(tmp_path / "half", dtype=torch.float16), pictures, tmp_path, steps=5)
    assert {each.dtype for each in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert all(torch.isfinite(each).all() for each in trainer.model.parameters())


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(folders, pictures, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 3, "steps": 6}
    whole = train(folders["clip"], pictures, tmp_path / "whole", **more)
    whole.train()
    resumed = train(folders["clip"], pictures, tmp_path / "resumed", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_locked_tower_is_trained_against_from_stored_vectors(folders, pictures, tmp_path):
    locked = Tuning(vision="locked", text="full")
    runs = [train(folders["clip"], pictures, tmp_path / str(v), tuning=locked, vectors=v) for v in (False, True)]
    for trainer in runs:
        trainer.train()
    # What is stored is rounded to float16.
    losses = [[each["loss"] for each in run.state.log_history if "loss" in each] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert runs[1].data_collator([runs[1].train_dataset[0]])["image"].shape == (1, 12)


def test_weights_between_two_encoders(folders, tmp_path):
    encoder = load_clip(folders["clip"])
    encoder.clip.requires_grad_(True)
    with torch.no_grad():
        for each in encoder.clip.parameters():
            each.add_(1)
    half = interpolate(load_clip(folders["clip"]), encoder, 0.5)
    for name, value in load_clip(folders["clip"]).clip.named_parameters():
        torch.testing.assert_close(dict(half.clip.named_parameters())[name], value + 0.5)


# --- given back to the captioner


def test_the_captioner_sees_with_the_fine_tuned_encoder(folders, pictures, tmp_path):
    from vlm_peft import VisionQwen
    from vlm_peft.data.feature_cache import encoder_key

    trainer = train(folders["clip"], pictures, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    save_merged(tmp_path / "adapter", tmp_path / "merged")
    places = {"stock": folders["clip"], "adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    models = {
        name: VisionQwen.from_vision_text_pretrained(place, ROOT / "recipes/demo/qwen3", vision_feature_layer=[-1])
        for name, place in places.items()
    }
    prints = {name: model.config.vision_fingerprint for name, model in models.items()}
    assert prints["adapter"] == prints["merged"] != prints["stock"]
    processor = trainer.model.processor.image_processor
    keys = {name: encoder_key(model, processor, "float16") for name, model in models.items()}
    assert keys["adapter"] == keys["merged"] != keys["stock"]
    for name, value in models["adapter"].model.vision_tower.state_dict().items():
        assert torch.equal(value, models["merged"].model.vision_tower.state_dict()[name]), name


# --- bad input is named


def test_texts_that_cannot_be_learnt_from_are_named(folders, pictures, tmp_path):
    encoder, pairs = load_clip(folders["clip"]), load(pictures)
    assert check_texts(encoder, pairs) == 0
    # The tokenizer writes no end token, which is what the text tower pools.
    assert encoder.tokens(["red"])["input_ids"].tolist() == [[*encoder.processor.tokenizer("red")["input_ids"], 258]]
    pairs.texts[1] = ["far too long a text for this tower"]
    with pytest.raises(ValueError, match=r"1 of 15 texts of train are longer than the 24 tokens .* row 1 the first"):
        check_texts(encoder, pairs)
    assert check_texts(encoder, pairs, "cut") == 1
    assert encoder.tokens(pairs.texts[1])["input_ids"].shape == (1, 24)
    assert int(encoder.tokens(pairs.texts[1])["input_ids"][0, -1]) == encoder.processor.tokenizer.eos_token_id
    pairs.texts = [["a picture"]] * len(pairs)
    with pytest.raises(ValueError, match="All 8 pictures of train have one and the same text"):
        check_texts(encoder, pairs)


def test_what_is_no_clip_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"is a 'qwen3' model: expected a CLIP or SigLIP with both towers"):
        load_clip(ROOT / "recipes/demo/qwen3")
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_clip(tmp_path / "nothing")
    encoder = load_clip(folders["clip"])
    for names, said in ((["cat", "cat"], "every label once, got 'cat'"), (["cat"], "at least two labels")):
        with pytest.raises(ValueError, match=said):
            encoder.embed_classes(names, ["{}"])
    with pytest.raises(ValueError, match="Both towers are locked"):
        adapt(encoder.clip, Tuning(vision="locked", text="locked"))
    with pytest.raises(ValueError, match="at most 2 last layers"):
        adapt(encoder.clip, Tuning(vision="last_layers", last_layers=3))


def test_an_adapter_folder_refuses_another_base_and_damage(folders, pictures, tmp_path):
    encoder = load_clip(folders["clip"])
    encoder.clip = adapt(encoder.clip, Tuning())
    save_clip(encoder, tmp_path / "adapter")
    torch.manual_seed(7)
    other = CLIPModel(CLIPModel.from_pretrained(folders["clip"]).config)
    other.save_pretrained(tmp_path / "other")
    encoder.processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base"):
        load_clip(tmp_path / "adapter", base=tmp_path / "other")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be used"):
        load_clip(tmp_path / "adapter")
    plain = load_clip(folders["clip"])
    save_clip(encoder, tmp_path / "lora")
    with pytest.raises(ValueError, match="does not fit"):
        load_trained(plain.clip, tmp_path / "lora")


# --- data


def test_pairs_have_all_texts_of_a_picture_and_its_class(pictures):
    pairs = load(pictures, label_column="label")
    assert pairs.texts[0] == ["it is red", "red it is"]
    assert pairs.labels[0] == "red"
    assert class_names([pairs]) == sorted(COLORS)
    with pytest.raises(ValueError, match="2 labels are not among the 6 class names, 'black'"):
        class_names([pairs], [color for color in COLORS if color not in ("black", "blue")])
    rows = PairRows(pairs, 1, seed=3)
    drawn = []
    for epoch in (0, 1, 2, 0):
        rows.set_epoch(epoch)
        drawn.append([row["texts"] for row in (rows[index] for index in range(len(rows)))])
    assert drawn[0] == drawn[3]
    assert len({json.dumps(each) for each in drawn}) == 3


def test_a_row_a_caption_becomes_a_picture_with_its_captions(pictures, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((pictures / name).read_bytes())
    lines = [("0.png", "one"), ("1.png", "two"), ("0.png", "three")]
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f, "caption": c}) + "\n" for f, c in lines)
    )
    assert load(tmp_path).texts == [["one", "three"], ["two"]]


def test_a_folder_per_class_is_read(pictures, tmp_path):
    for index, color in enumerate(COLORS[:3]):
        (tmp_path / color).mkdir()
        (tmp_path / color / "a.png").write_bytes((pictures / f"{index}.png").read_bytes())
    pairs = load(tmp_path, label_column="label", with_texts=False)
    assert sorted(map(str, pairs.labels)) == ["blue", "green", "red"]
    assert not any(pairs.texts)
    row = PairRows(pairs, templates=["a {} thing"])[0]
    assert row["texts"] == [f"a {pairs.labels[0]} thing"]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_models_own(folders, pictures, kind):
    encoder, pairs = load_clip(folders[kind]), load(pictures)
    inputs = batch(encoder, pairs)
    out = encoder.clip(**inputs["text"], **inputs["image"])
    torch.testing.assert_close(encoder.embed_pictures([pairs.picture(i) for i in range(4)]), out.image_embeds)
    flat = [text for texts in pairs.texts[:4] for text in texts]
    torch.testing.assert_close(encoder.embed_texts(flat, batch_size=3), out.text_embeds, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        picture_vectors(encoder, pairs)[:4].astype(np.float32), out.image_embeds.detach(), atol=1e-3
    )
