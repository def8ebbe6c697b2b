"""Feature cache: the model's own features, made once, never taken for another's, and safe to interrupt."""

import io
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_processor
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from vlm_peft import VisionQwen
from vlm_peft.data import feature_cache
from vlm_peft.data.feature_cache import build_feature_cache, encoder_key
from vlm_peft.data.pictures import Pictures


def encode(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (9, 8), colour).save(file, "PNG")
    return file.getvalue()


def make_pictures(cells: list) -> Pictures:
    rows = [{"bytes": cell, "path": None} if isinstance(cell, bytes) else cell for cell in cells]
    return Pictures(Dataset.from_dict({"image": rows}, features=Features({"image": Image()})), ["image"])


CELLS = [encode((40 * index, 255 - 40 * index, 7)) for index in range(6)]


@pytest.fixture
def run(model, processor, tmp_path, monkeypatch):
    """Builds a cache of shards of two pictures; `run.encoded` counts what went through the encoder."""
    monkeypatch.setattr(feature_cache, "SHARD_PICTURES", 2)
    model.model.vision_tower.requires_grad_(False)
    state = SimpleNamespace(encoded=0, model=model, processor=processor, folder=tmp_path / "cache")
    original = type(model.model).get_vision_features

    def counted(self, pixel_values):
        state.encoded += len(pixel_values)
        return original(self, pixel_values)

    monkeypatch.setattr(type(model.model), "get_vision_features", counted)

    def build(cells=CELLS, **arguments):
        state.encoded = 0
        used = arguments.pop("model", model), arguments.pop("image_processor", processor.image_processor)
        return build_feature_cache(*used, make_pictures(cells), directory=state.folder, **arguments)

    state.build = build
    return state


def expected_features(run, cells=CELLS) -> torch.Tensor:
    pictures = make_pictures(cells)
    opened = [pictures.open(index) for index in range(len(pictures))]
    pixel_values = run.processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    return run.model.model.get_vision_features(pixel_values)


def test_float32_features_are_the_models_own_in_the_asked_order(run):
    cache = run.build(dtype="float32")
    order = [5, 0, 0, 3, 2]
    assert len(cache) == 6
    torch.testing.assert_close(cache.get(order), expected_features(run)[order], rtol=0, atol=1e-6)
    assert not torch.equal(cache.get([0]), cache.get([1]))


def test_float16_features_are_rounded_and_cost_the_loss_less_than_a_thousandth(run):
    """Measured here: the loss moves by 1e-6 of itself; half precision keeps 11 bits, 5e-4 of each value."""
    cache = run.build()
    exact = expected_features(run)
    stored = cache.get(list(range(6)))
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), exact, rtol=2**-11, atol=1e-6)
    input_ids = torch.tensor([[1, *[259] * 16, 5 * index + 2, 7, 9] for index in range(6)])
    labels = input_ids.masked_fill(input_ids == 259, -100)
    losses = [
        float(run.model(input_ids=input_ids, labels=labels, image_features=value).loss.detach())
        for value in (stored, exact)
    ]
    assert 0 < abs(losses[0] - losses[1]) / losses[1] < 1e-3


def test_the_second_build_encodes_nothing(run):
    first = run.build().get([0, 5])
    assert run.encoded == 6
    second = run.build().get([0, 5])
    assert run.encoded == 0
    assert torch.equal(first, second)


def test_changed_and_inserted_pictures_encode_themselves_only(run):
    before = run.build().get([0, 1, 3, 4, 5])
    changed = [encode((9, 9, 9)), *CELLS[:2], encode((1, 2, 3)), *CELLS[3:]]
    cache = run.build(changed)
    assert run.encoded == 2
    torch.testing.assert_close(cache.get([0, 3]).float(), expected_features(run, changed)[[0, 3]], rtol=1e-3, atol=1e-4)
    assert torch.equal(cache.get([1, 2, 4, 5, 6]), before)


def test_layers_that_are_not_built_do_not_enter_the_key(model, processor):
    whole = model.config.vision_config.to_dict() | {"num_hidden_layers": 2}
    other = VisionQwen(make_config(vision_config=whole, vision_feature_layer=-1)).eval()
    other.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    keys = {encoder_key(each, processor.image_processor, "float32") for each in (model, other)}
    assert len(keys) == 1


def another_layer(run):
    other = VisionQwen(make_config(vision_feature_layer=-3)).eval()
    other.model.vision_tower.load_state_dict(run.model.model.vision_tower.state_dict(), strict=False)
    other.model.vision_tower.requires_grad_(False)
    return {"model": other}


def another_layer_of_equal_weights(run):
    run.model.config.vision_feature_layer = 1
    return {}


def other_weights(run):
    parameter = next(run.model.model.vision_tower.parameters())
    parameter.data.view(-1)[-1] += 1e-3
    return {}


def other_architecture(run):
    run.model.model.vision_tower.config.num_attention_heads = 4
    return {}


def other_processor(run):
    processor = make_processor(run.model.config).image_processor
    processor.image_mean = [0.4, 0.5, 0.5]
    return {"image_processor": processor}


def other_dtype(run):
    return {"dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [another_layer, another_layer_of_equal_weights, other_weights, other_architecture, other_processor, other_dtype],
)
def test_an_entry_is_never_read_for_another_encoder(run, change):
    run.build()
    run.build(**change(run))
    assert run.encoded == 6


def test_equal_pictures_are_encoded_once_within_a_data_set_and_in_the_next(run, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "copy of a.png", "b.png")]
    for path, cell in zip(paths, [CELLS[0], CELLS[0], CELLS[1]], strict=True):
        path.write_bytes(cell)
    stored = [{"bytes": None, "path": str(path)} for path in paths]
    cells = [*stored, CELLS[1], b"garbage", stored[0], CELLS[0], b"garbage"]
    cache = run.build(cells)
    assert run.encoded == 2
    assert len(cache) == 8
    assert cache.unreadable.keys() == {4, 7}
    assert torch.equal(cache.get([1, 5, 6, 3]), cache.get([0, 0, 0, 2]))
    assert not torch.equal(cache.get([0]), cache.get([2]))
    other = run.build([CELLS[2], CELLS[1], CELLS[0]])
    assert run.encoded == 1
    assert torch.equal(other.get([2, 1]), cache.get([0, 2]))


def test_of_two_entries_of_a_picture_the_older_is_read(run, tmp_path, monkeypatch):
    """Two runs at once may both encode it; the one that goes on later reads what it read before."""
    before = run.build(CELLS[:1]).get([0])
    (file,) = run.folder.iterdir()
    folder, run.folder = run.folder, tmp_path / "another run"
    counted = type(run.model.model).get_vision_features
    monkeypatch.setattr(type(run.model.model), "get_vision_features", lambda *arguments: counted(*arguments) + 1)
    assert not torch.equal(run.build(CELLS[:2]).get([0]), before)
    key = file.stem.partition("-")[0]
    for number, added in enumerate(run.folder.iterdir()):
        added.replace(folder / f"{key}-{number}.arrow")
    run.folder = folder
    assert torch.equal(run.build(CELLS[:1]).get([0]), before)


def test_a_file_is_hashed_once_by_a_process_and_again_when_it_changes(run, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(CELLS[0])
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or read_bytes(self))
    cells = [{"bytes": None, "path": str(path)}] * 3
    run.build(cells)
    run.build(cells)
    assert read == ["a.png"]
    path.write_bytes(noisy(9, 8))
    run.build(cells)
    assert run.encoded == 1


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(noisy(9, 8)), Path.unlink])
def test_a_picture_that_changes_while_it_is_encoded_is_stored_under_no_name(run, tmp_path, monkeypatch, change):
    path = tmp_path / "a.png"
    path.write_bytes(CELLS[0])
    open_picture = Pictures.open

    def opening(self, index):
        change(path)
        return open_picture(self, index)

    monkeypatch.setattr(Pictures, "open", opening)
    with pytest.raises(ValueError, match="The file of picture 0 changed while the pictures were being read"):
        run.build([{"bytes": None, "path": str(path)}])
    assert not list(run.folder.iterdir())


def test_an_interrupted_run_keeps_finished_shards_and_leaves_no_half_file(run, monkeypatch):
    whole = run.build(dtype="float32").get(list(range(6)))
    shutil.rmtree(run.folder)
    original = feature_cache.encode_batch

    def stop(batch, **arguments):
        if 2 in batch["index"]:
            raise KeyboardInterrupt
        return original(batch, **arguments)

    monkeypatch.setattr(feature_cache, "encode_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run.build(dtype="float32")
    assert len(list(run.folder.iterdir())) == 1
    monkeypatch.setattr(feature_cache, "encode_batch", original)
    resumed = run.build(dtype="float32")
    assert run.encoded == 4
    assert torch.equal(resumed.get(list(range(6))), whole)


def test_unreadable_pictures_are_recorded_and_their_features_refused(run, tmp_path):
    cells = [CELLS[0], b"garbage", {"bytes": None, "path": str(tmp_path / "missing.png")}, CELLS[3]]
    cache = run.build(cells)
    assert run.encoded == 2
    assert cache.unreadable.keys() == {1, 2}
    assert "cannot identify" in cache.unreadable[1]
    assert "No such file" in cache.unreadable[2]
    assert cache.get([3, 0]).shape == (2, 16, 16)
    with pytest.raises(ValueError, match="Picture 1 has no features: Cannot read the picture"):
        cache.get([0, 1])
    (tmp_path / "missing.png").write_bytes(CELLS[2])
    assert run.build(cells).unreadable.keys() == {1}


def test_a_full_disk_is_refused_with_both_figures(run, monkeypatch):
    free = 3_100_000_000
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=r"needs 4\.20 GB in .*cache, which has 3\.10 GB free: point --feature_cache_dir"):
        feature_cache.check_disk(run.folder / "cache", 4_200_000_000)
    free = 6 * 16 * 16 * 2 - 1
    with pytest.raises(OSError, match="The feature cache needs"):
        run.build()
    assert run.encoded == 0
    free += 1
    run.build()


def test_a_trainable_tower_is_refused(run):
    run.model.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="trainable parameters: its features cannot be cached"):
        run.build()


def test_features_that_float16_cannot_hold_are_refused(run):
    run.model.model.vision_tower.encoder.layers[-1].mlp.fc2.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"more than float16 holds \(65504\): use --feature_dtype float32"):
        run.build()
    assert run.build(dtype="float32").get([0]).max() > 9e5


def test_a_tower_left_in_training_mode_does_not_drop_out(run):
    run.model.model.vision_tower.config.attention_dropout = 0.5
    for module in run.model.model.vision_tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    run.model.model.vision_tower.train()
    stored = run.build(dtype="float32").get([0, 1])
    run.model.model.vision_tower.eval()
    torch.testing.assert_close(stored, expected_features(run)[:2], rtol=0, atol=1e-6)


def test_processes_share_the_shards(run, monkeypatch):
    """Two threads play two processes: each encodes its own shards once and reads all of them."""
    barrier = threading.Barrier(2)

    def state():
        rank = int(threading.current_thread().name)
        return SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: barrier.wait(30)
        )

    encoded_by: dict[str, list[int]] = {"0": [], "1": []}
    original = feature_cache.encode_batch

    def recorded(batch, **arguments):
        encoded_by[threading.current_thread().name] += batch["index"]
        return original(batch, **arguments)

    monkeypatch.setattr(feature_cache, "PartialState", state)
    monkeypatch.setattr(feature_cache, "encode_batch", recorded)
    caches = {}

    def build():
        caches[threading.current_thread().name] = run.build(dtype="float32")

    threads = [threading.Thread(target=build, name=name) for name in encoded_by]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoded_by == {"0": [0, 1, 4, 5], "1": [2, 3]}
    for cache in caches.values():
        torch.testing.assert_close(cache.get(list(range(6))), expected_features(run), rtol=0, atol=1e-6)


def test_what_another_run_adds_between_the_looks_of_two_processes_leaves_no_picture_out(run, monkeypatch):
    """The first process looks at an empty folder, the second one when another run has stored a picture."""
    barrier = threading.Barrier(2)
    pictures = make_pictures(CELLS)
    key = encoder_key(run.model, run.processor.image_processor, "float32")

    def build():
        caches.append(run.build(dtype="float32"))

    caches: list = []
    second = threading.Thread(target=build, name="1")

    def state():
        rank = int(threading.current_thread().name)
        if rank == 0:
            first = {pictures.hashes[0]: 0}
            run_of = run.model, run.processor.image_processor, pictures
            feature_cache._encode_shard(*run_of, first, run.folder, key, "float32", 64)
            second.start()
        return SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: barrier.wait(30)
        )

    monkeypatch.setattr(feature_cache, "PartialState", state)
    first = threading.Thread(target=build, name="0")
    first.start()
    first.join()
    second.join()
    assert len(caches) == 2
    for cache in caches:
        torch.testing.assert_close(cache.get(list(range(6))), expected_features(run), rtol=0, atol=1e-6)


def test_no_pictures_give_an_empty_cache(run):
    assert len(run.build([])) == 0


def noisy(width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    PILImage.fromarray(pixels.numpy()).save(file, "JPEG")
    return file.getvalue()


def test_pictures_prepared_by_threads_are_those_of_one_batch(run):
    pictures = make_pictures([noisy(8 + 5 * index, 40 - 3 * index) for index in range(9)])
    processor = run.processor.image_processor
    batch = processor([pictures.open(index) for index in range(9)], return_tensors="pt")["pixel_values"]
    with ThreadPoolExecutor(4) as threads:
        prepare = partial(feature_cache.prepare_picture, image_processor=processor, pictures=pictures)
        batches = list(feature_cache.prepare_batches(threads, prepare, range(9), 4, ahead=1))
    assert [len(prepared) for prepared in batches] == [4, 4, 1]
    assert torch.equal(torch.stack([*chain(*batches)]), batch)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_so_many_batches_are_prepared_ahead_and_not_more(ahead):
    begun = []

    def prepare(index):
        begun.append(index)
        return index

    with ThreadPoolExecutor(1) as threads:
        batches = feature_cache.prepare_batches(threads, prepare, range(10, 20), 2, ahead)
        assert next(batches) == [10, 11]
        threads.submit(int).result()
        assert begun == list(range(10, 12 + 2 * ahead))
        assert list(batches) == [[12, 13], [14, 15], [16, 17], [18, 19]]
    assert begun == list(range(10, 20))


def test_an_interrupted_shard_leaves_the_rest_of_its_pictures_alone(run, monkeypatch):
    opened = []
    open_picture = Pictures.open
    monkeypatch.setattr(feature_cache, "SHARD_PICTURES", 60)
    monkeypatch.setattr(feature_cache.os, "cpu_count", lambda: 1)

    def opening(self, index):
        opened.append(index)
        if index == 0:
            raise KeyboardInterrupt
        time.sleep(0.01)
        return open_picture(self, index)

    monkeypatch.setattr(Pictures, "open", opening)
    with pytest.raises(KeyboardInterrupt):
        run.build([encode((index, 0, 0)) for index in range(60)])
    assert len(opened) < 30
