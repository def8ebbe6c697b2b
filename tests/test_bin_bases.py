"""Bases of which the Hub has only pickled weights: their conversion pull requests, the cache, and `vlm-peft convert`.

Against `hub_server.py`, in this process: what the Hub's client reads of its environment is set for each test.
"""

import io
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import OWNER, HubServer, Repo, serve
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import _cache_assets
from peft import get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save

from vlm_peft import VisionQwen, __main__
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.lora import lora_config
from vlm_peft.hub import weights
from vlm_peft.hub.access import HubError
from vlm_peft.hub.convert import convert_base
from vlm_peft.hub.unpickle import NotTensorsError, convert_weights
from vlm_peft.hub.weights import CONVERSION_BOT, CONVERSION_TITLE, safetensors_revision
from vlm_peft.metrics.clip_score import clip_scores
from vlm_peft.model.joining import joint_config

NAMES = ("tiny/clip", "tiny/qwen3")
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and this process as one that knows no other."""
    with serve() as server:
        reach(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "hf" / "assets"))
        weights._say.cache_clear()
        yield server
        # Neither was a pickle fetched, nor anybody asked to convert one.
        assert not [path for method, path, _ in server.requests if method == "POST" or path.endswith(".bin")]


def reach(monkeypatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + TEMPLATE)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pickled(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with `pytorch_model.bin` in place of safetensors."""
    content = io.BytesIO()
    torch.save(load(files["model.safetensors"]), content)
    return {name: each for name, each in files.items() if name != "model.safetensors"} | {
        "pytorch_model.bin": content.getvalue()
    }


def sharded(files: dict[str, bytes], kind: str) -> dict[str, bytes]:
    """Weights in two shards with an index, as `"safetensors"` or `"bin"`."""
    tensors = load(files["model.safetensors"])
    stem = "model" if kind == "safetensors" else "pytorch_model"
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    whole = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    made = {name: each for name, each in files.items() if name != "model.safetensors"}
    places = {}
    for number, half in enumerate(halves, 1):
        name = f"{stem}-{number:05}-of-00002.{kind}"
        made[name] = weights_file(half, kind)
        places |= dict.fromkeys(half, name)
    made[f"{whole}.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    return made


def weights_file(tensors: dict[str, torch.Tensor], kind: str) -> bytes:
    if kind == "safetensors":
        return save(tensors, {"format": "pt"})
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def other_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    changed = {name: tensor + 1 for name, tensor in load(files["model.safetensors"]).items()}
    return files | {"model.safetensors": save(changed, {"format": "pt"})}


def add_pickled(hub: HubServer, bases, shape: str = "single") -> dict[str, str]:
    """Both bases with pickled weights on main; commits of their conversions, which add safetensors."""
    commits = {}
    for name, base in zip(NAMES, bases, strict=True):
        files = files_of(base)
        on_main = pickled(files) if shape == "single" else sharded(files, "bin")
        converted = files if shape == "single" else sharded(files, "safetensors")
        repo = hub.add(name, on_main)
        commits[name] = repo.open_pull_request(on_main | converted, CONVERSION_BOT, CONVERSION_TITLE)
    return commits


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.tensor([[1, *[259] * 16, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
    }


def logits_of_bases(vision, text, batch, **revisions) -> torch.Tensor:
    """With the same random projector every time."""
    torch.manual_seed(3)
    model = VisionQwen.from_vision_text_pretrained(vision, text, image_token_id=259, **revisions)
    with torch.inference_mode():
        return model(**batch).logits


def test_safetensors_on_main_are_loaded_without_a_look_at_pull_requests(hub, bases, batch):
    for name, base in zip(NAMES, bases, strict=True):
        repo = hub.add(name, pickled(files_of(base)) | files_of(base))
        repo.open_pull_request(other_weights(files_of(base)), CONVERSION_BOT, CONVERSION_TITLE)
    assert torch.equal(logits_of_bases(*NAMES, batch), logits_of_bases(*bases, batch))
    config = joint_config(*NAMES)
    assert (config.vision_revision, config.text_revision) == (None, None)
    assert not [path for _, path, _ in hub.requests if path.endswith("discussions")]


@pytest.mark.parametrize("shape", ["single", "sharded"])
@pytest.mark.parametrize("pinned", [True, False])
def test_pickled_bases_are_loaded_from_their_conversion_online_and_from_the_cache(
    hub, bases, batch, monkeypatch, caplog, shape, pinned
):
    commits = add_pickled(hub, bases, shape)
    revisions = {}
    if pinned:
        revisions = {
            f"{part}_revision": hub.repos["model", name].branches["main"]
            for part, name in zip(("vision", "text"), NAMES, strict=True)
        }
        for name in NAMES:
            # The conversion is of the pinned commit, no longer of the branch.
            repo = hub.repos["model", name]
            repo.commit({file: each[::-1] if file.endswith(".bin") else each for file, each in repo.files.items()})
            with pytest.raises(HubError, match="no conversion pull request with the same weights"):
                safetensors_revision(name)
    monkeypatch.setattr(torch, "load", None)
    expected = logits_of_bases(*bases, batch)
    with caplog.at_level(logging.WARNING, weights.__name__):
        assert torch.equal(logits_of_bases(*NAMES, batch, **revisions), expected)
    said = [record.getMessage() for record in caplog.records if record.name == weights.__name__]
    assert [line.partition(" has only")[0] for line in said] == list(NAMES)
    assert f"refs/pr/1, commit {commits['tiny/clip']}." in said[0]
    config = joint_config(*NAMES, **revisions)
    assert (config.vision_revision, config.text_revision) == tuple(commits.values())

    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of_bases(*NAMES, batch, **revisions), expected)
    assert joint_config(*NAMES, **revisions).to_dict() == config.to_dict()
    recorded = {"vision_revision": commits["tiny/clip"], "text_revision": commits["tiny/qwen3"]}
    assert torch.equal(logits_of_bases(*NAMES, batch, **recorded), expected)
    assert len(hub.requests) == asked
    # Without a connection, and nobody who says so.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reach(monkeypatch, "http://127.0.0.1:9")
    assert joint_config(*NAMES, **revisions).vision_revision == commits["tiny/clip"]


def test_a_branch_is_looked_at_anew_as_long_as_it_has_no_safetensors(hub, bases, batch):
    commits = add_pickled(hub, bases)
    assert safetensors_revision("tiny/clip") == commits["tiny/clip"]
    repo = hub.repos["model", "tiny/clip"]
    repo.commit(repo.files | {"README.md": b"merged by hand"} | files_of(bases[0]))
    assert safetensors_revision("tiny/clip") is None
    repo.commit(pickled(other_weights(files_of(bases[0]))))
    with pytest.raises(HubError, match="no conversion pull request"):
        safetensors_revision("tiny/clip")


def test_a_pull_request_that_is_named_is_followed_to_its_commit(hub, bases, monkeypatch):
    repo = hub.add("tiny/clip", pickled(files_of(bases[0])))
    commit = repo.open_pull_request(files_of(bases[0]), "somebody", "safetensors")
    assert safetensors_revision("tiny/clip", "refs/pr/1") == commit
    # Also where the cache knows it by its name, under which it may mean another commit tomorrow.
    hf_hub_download("tiny/clip", "model.safetensors", revision="refs/pr/1")
    assert safetensors_revision("tiny/clip", "refs/pr/1") == commit
    repo.commit(other_weights(files_of(bases[0])), "refs/pr/1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert safetensors_revision("tiny/clip", "refs/pr/1") == commit


def test_other_files_of_the_conversion_are_said_to_be_its_own(hub, bases, caplog):
    commits = add_pickled(hub, bases)
    repo = hub.repos["model", "tiny/qwen3"]
    repo.commit(repo.files | {"tokenizer.json": b"{}", "vocab.txt": b"", "README.md": b"better"})
    assert safetensors_revision("tiny/qwen3") == commits["tiny/qwen3"]
    assert "Of that commit, and not of main, are also tokenizer.json, vocab.txt." in caplog.text


def no_pull_request(repo: Repo, files: dict[str, bytes]) -> None:
    pass


def by_somebody(repo: Repo, files: dict[str, bytes]) -> None:
    repo.open_pull_request(repo.files | files, "somebody", CONVERSION_TITLE)


def closed(repo: Repo, files: dict[str, bytes]) -> None:
    repo.open_pull_request(repo.files | files, CONVERSION_BOT, CONVERSION_TITLE, "closed")


def of_other_weights(repo: Repo, files: dict[str, bytes]) -> None:
    changed = other_weights(files)
    repo.open_pull_request(changed | pickled(changed), CONVERSION_BOT, CONVERSION_TITLE)


def of_another_configuration(repo: Repo, files: dict[str, bytes]) -> None:
    repo.open_pull_request(repo.files | files | {"config.json": b"{}"}, CONVERSION_BOT, CONVERSION_TITLE)


def without_safetensors(repo: Repo, files: dict[str, bytes]) -> None:
    repo.open_pull_request(repo.files | {"README.md": b""}, CONVERSION_BOT, CONVERSION_TITLE)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    "propose",
    [no_pull_request, by_somebody, closed, of_other_weights, of_another_configuration, without_safetensors],
)
def test_without_a_conversion_of_its_own_a_pickled_base_is_refused_with_the_ways_out(hub, bases, part, propose):
    name, other = NAMES[part], bases[1 - part]
    repo = hub.add(name, pickled(files_of(bases[part])))
    propose(repo, files_of(bases[part]))
    pair = (name, other) if part == 0 else (other, name)
    with pytest.raises(HubError) as refusal:
        VisionQwen.from_vision_text_pretrained(*pair, image_token_id=259)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(
        f"{name} has only pickled weights (pytorch_model.bin) at main, which could run any program"
    )
    for way in ("name a revision with safetensors", "another repository", f"`vlm-peft convert {name} --to FOLDER`"):
        assert way in message


def test_a_repository_without_discussions_has_no_conversion(hub, bases):
    add_pickled(hub, bases)
    hub.fail_at = "discussions"
    with pytest.raises(HubError, match="and no conversion pull request"):
        safetensors_revision("tiny/clip")


def test_weights_without_a_hash_are_not_taken_for_the_same(hub, bases):
    add_pickled(hub, bases)
    hub.tells_hashes = False
    with pytest.raises(HubError, match="and no conversion pull request"):
        safetensors_revision("tiny/clip")


def test_the_conversion_of_a_private_base_is_its_owners(hub, bases, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    files = files_of(bases[0])
    repo = hub.add("me/clip", pickled(files), private=True)
    # Pages hold two: the one that is looked for is on the second.
    commit = repo.open_pull_request(repo.files | files, "me", CONVERSION_TITLE)
    for title in ("one", "two"):
        repo.open_pull_request(repo.files | files, "me", title)
    assert safetensors_revision("me/clip") == commit


def test_what_is_not_there_is_one_line(hub, bases, monkeypatch):
    hub.add("tiny/flax", {"config.json": b"{}", "flax_model.msgpack": b""})
    named = hub.add("tiny/named", {"config.json": b"{}", "weights.safetensors": b""})
    for name, revision, message in (
        ("tiny/gone", None, "tiny/gone is not on"),
        ("tiny/flax", None, "tiny/flax has neither model.safetensors nor model.safetensors.index.json at main"),
        ("tiny/flax", "v9", "tiny/flax has no revision 'v9'"),
    ):
        with pytest.raises(HubError) as refusal:
            safetensors_revision(name, revision)
        assert str(refusal.value).startswith(message)
        assert "\n" not in str(refusal.value)
    # By commit, so that transformers looks for no conversion of the branch.
    assert safetensors_revision("tiny/named") == named.branches["main"]
    reach(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        safetensors_revision("tiny/clip")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match=r"^There is no folder tiny/clip, and HF_HUB_OFFLINE is set: .* at main\. Load it"
    ):
        joint_config("tiny/clip", bases[1])
    assert safetensors_revision(bases[0], "anything") == "anything"


def test_an_adapter_on_a_conversion_reloads_wherever_its_commits_are(hub, bases, batch, monkeypatch, tmp_path):
    commits = add_pickled(hub, bases)
    torch.manual_seed(0)
    model = VisionQwen.from_vision_text_pretrained(*NAMES, image_token_id=259)
    adapted = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    save_composite_config(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert (config["vision_revision"], config["text_revision"]) == tuple(commits.values())
    with torch.inference_mode():
        expected = adapted(**batch).logits
    # Elsewhere, after the pull request was closed: a commit stays.
    for name in NAMES:
        hub.repos["model", name].pull_requests[0]["status"] = "closed"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with torch.inference_mode():
        assert torch.equal(VisionQwen.from_adapter(tmp_path / "adapter")(**batch).logits, expected)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with torch.inference_mode():
        assert torch.equal(VisionQwen.from_adapter(tmp_path / "adapter")(**batch).logits, expected)
    assert len(hub.requests) == asked


def test_clip_score_reads_a_clip_from_its_conversion(hub, monkeypatch):
    clip = ROOT / "recipes" / "demo" / "clip"
    files = files_of(clip)
    repo = hub.add("tiny/scorer", pickled(files))
    repo.open_pull_request(repo.files | files, CONVERSION_BOT, CONVERSION_TITLE)
    pictures, captions = [Image.new("RGB", (32, 32), "red")], ["a red wall"]
    monkeypatch.setattr(torch, "load", None)
    assert clip_scores("tiny/scorer", pictures, captions) == clip_scores(clip, pictures, captions)


# --- vlm-peft convert ---


@pytest.fixture
def served(monkeypatch, tmp_path):
    """As `hub`, where pickles may be fetched."""
    with serve() as server:
        reach(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        yield server


def test_converted_bases_are_the_bases(served, bases, batch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    for name, base, shape in zip(NAMES, bases, ("single", "sharded"), strict=True):
        files = files_of(base) | {"notes.py": b"", "tf_model.h5.index.json": b"{}", "LICENSE": b"mine"}
        served.add(name, pickled(files) if shape == "single" else sharded(files, "bin"))
        revision = served.repos["model", name].branches["main"]
        assert __main__.main(["convert", name, "--to", str(tmp_path / name), "--revision", revision]) == 0
        assert capsys.readouterr().out == f"Written and compared: {tmp_path / name}\n"
        expected = files_of(base) if shape == "single" else sharded(files_of(base), "safetensors")
        assert {path.name for path in (tmp_path / name).iterdir()} == {*expected, "LICENSE"}
    converted = [tmp_path / name for name in NAMES]
    assert torch.equal(logits_of_bases(*converted, batch), logits_of_bases(*bases, batch))
    # Nothing half written is left beside them.
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"clip", "qwen3"}


def test_shared_and_strange_tensors_are_written_whole(tmp_path):
    table = torch.randn(6, 4)
    tensors = {
        "embed.weight": table,
        "head.weight": table,
        "rows": table[1:3],
        "transposed": table.t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    convert_weights(tmp_path, tmp_path)
    written = load((tmp_path / "model.safetensors").read_bytes())
    assert written.keys() == tensors.keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, tensor in tensors.items():
        torch.testing.assert_close(written[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_pickle_that_would_run_a_program_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "quiet_imports", lambda: None)
    base, marker = tmp_path / "base", tmp_path / "ran"
    base.mkdir()
    torch.save({"weight": torch.ones(2), "more": Evil(marker)}, base / "pytorch_model.bin")
    assert __main__.main(["convert", str(base), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vlm-peft convert: {base} is not converted: pytorch_model.bin is a pickle with the name ")
    assert "system" in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle at all", r"^pytorch_model\.bin is (damaged|a pickle)"),
        ([torch.ones(2)], r"^pytorch_model\.bin holds no named tensors, got list"),
        ({"epoch": 3}, r"^pytorch_model\.bin holds 'epoch', expected tensors, got int"),
        ({"state_dict": {"weight": torch.ones(2)}}, r"holds 'state_dict', expected tensors, got dict"),
        ({"weight": torch.eye(2).to_sparse()}, r"holds weight as torch\.sparse_coo, expected a dense tensor"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(NotTensorsError, match=message) as refusal:
        convert_weights(tmp_path, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "expected an object with a weight_map"),
        ({"weight_map": {"weight": "../outside.bin"}}, r"names the shard '\.\./outside\.bin', which is not beside it"),
        ({"weight_map": {"weight": "gone.bin"}}, "names the shard 'gone.bin', which is not beside it"),
        ({"weight_map": {"weight": "here.bin", "bias": "here.bin"}}, "lack 1 tensors .* for example bias"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index, message):
    base = tmp_path / "base"
    base.mkdir()
    torch.save({"weight": torch.ones(2)}, tmp_path / "outside.bin")
    torch.save({"weight": torch.ones(2)}, base / "here.bin")
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(NotTensorsError, match=message):
        convert_weights(base, base)


def test_a_conversion_neither_overwrites_nor_invents(tmp_path, bases):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ValueError, match="full is there already and not empty"):
        convert_base(bases[0], tmp_path / "full")
    with pytest.raises(ValueError, match="has safetensors already: there is nothing to convert"):
        convert_base(bases[0], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"full has neither pytorch_model\.bin nor"):
        convert_base(tmp_path / "full", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        convert_base(tmp_path / "nowhere", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
