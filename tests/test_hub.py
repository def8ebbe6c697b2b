"""The Hub: what a push sends and what it refuses, pulls in a fresh process, and data sets; against `hub_server.py`.

Pushes run in one process of their own, pulls in another, as their environment has to be set before the client is
imported.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, make_processor
from datasets import Dataset, Image
from hub_client import IDS, Worker, environment
from hub_server import GUEST, OWNER, serve
from peft import get_peft_model
from PIL import Image as PILImage
from yaml import safe_load

from vlm_peft import VisionQwen
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.lora import lora_config
from vlm_peft.hub.access import refuse_secret
from vlm_peft.hub.datasets import stored_hash
from vlm_peft.hub.models import LOADED_FILES, HubError, pull_model, push_adapter
from vlm_peft.report.model_card import card_for_others, write_model_card

SECRETS = (
    "hf_" + "aB3" * 12,
    "ghp_" + "aB3" * 12,
    "sk-" + "aB3-" * 10,
    "AKIA" + "AB34" * 4,
    "-----BEGIN RSA PRIVATE KEY-----\nMIIaB3",
    "--api_key " + "aB3" * 8,
    "password=" + "aB3" * 8,
)
PREDICTION = {"id": "a/b", "prediction": "a red wall", "references": ["red wall", "a wall"]}

PULL = """
import sys, torch
torch.set_num_threads(1)
from datasets import load_dataset
from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.hub.models import pull_model
folder = pull_model("me/run")
print(*sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")))
batch = torch.load("batch.pt")
with torch.inference_mode():
    logits = VisionQwen.from_adapter("me/run")(**batch).logits
text = VisionQwenProcessor.from_pretrained("me/run").tokenizer.decode([104, 105])
rows = load_dataset("me/walls")
pictures = {split: [picture.getpixel((0, 0)) for picture in rows[split]["image"]] for split in rows}
torch.save({"logits": logits, "text": text, "captions": rows["train"]["caption"][:], "pictures": pictures}, "pulled.pt")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "home").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(bases):
    with serve() as server:
        for name, base in zip(IDS.values(), bases, strict=True):
            files = {path.name: path.read_bytes() for path in base.iterdir()}
            server.add(name, files | {"README.md": b"---\nlicense: mit\n---\n"})
        yield server


@pytest.fixture(scope="module")
def hub(server, home):
    worker = Worker(server, home)
    yield worker
    assert OWNER not in worker.close()


@pytest.fixture(scope="module")
def adapted(bases):
    model = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259)
    model = get_peft_model(model, lora_config(model, r=4)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_run(adapted, folder: Path, bases, home: Path) -> Path:
    """A run's folder as training leaves it, with much that is not for others."""
    adapted.save_pretrained(folder)
    save_composite_config(adapted, folder)
    make_processor(adapted.get_base_model().config).save_pretrained(folder)
    summary = {
        "title": "run",
        "date": "2026-01-01 00:00 UTC",
        "command": f"accelerate launch recipes/sft.py --output_dir {folder} --cache {home}/home/cache",
        "vision_model": str(bases[0]),
        "text_model": str(bases[1]),
        "dataset": str(folder / "eval"),
        "device": "cpu",
        "seed": 7,
        "parameters": 1000,
        "trainable_parameters": 10,
        "seconds": {"train": 1.5},
        "versions": {"torch": "2"},
        "adapter": str(folder),
    }
    scores = {"n": 1, "metrics": {"CIDEr": 1.25}, "model": str(folder), "split": "test"}
    pictures = folder / "eval" / "test" / "pictures"
    pictures.mkdir(parents=True)
    for name in ("a%2Fb.webp", "not-shown.webp"):
        PILImage.new("RGB", (4, 4), "red").save(pictures / name)
    (folder / "run_summary.json").write_text(json.dumps(summary))
    (folder / "eval" / "test" / "scores.json").write_text(json.dumps(scores))
    (folder / "eval" / "test" / "predictions.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    write_model_card(folder)
    (folder / "checkpoint-5").mkdir()
    for name in (
        "checkpoint-5/adapter_model.safetensors",
        "checkpoint-5/optimizer.pt",
        "training_args.bin",
        "README.md.tmp",
        "run.log",
        "log_history.json",
        "report.html",
        "events.out.tfevents.1",
        "eval/test/scores.json.tmp",
        "state.pkl",
    ):
        (folder / name).write_bytes(b"not for others")
    return folder


@pytest.fixture
def run(adapted, bases, home, tmp_path):
    return save_run(adapted, tmp_path / "run", bases, home)


@pytest.fixture
def push(hub, run):
    def push(repo_id: str, **arguments) -> tuple[str, str]:
        return hub("push_adapter", **{"folder": run, "repo_id": repo_id, "token": OWNER, **IDS, **arguments})

    return push


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what goes up ---


def test_a_push_sends_the_adapter_and_what_was_measured_and_nothing_else(push, server, run):
    before = snapshot(run)
    assert push("me/first") == ("ok", f"{server.url}/me/first")
    repo = server.repos["model", "me/first"]
    assert set(repo.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "eval/test/pictures/a%2Fb.webp",
        "eval/test/predictions.jsonl",
        "eval/test/scores.json",
        "processor_config.json",
        "run_summary.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(repo.history) == 1
    assert repo.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    # The run's own folder keeps its local names, and no token was written into it.
    assert snapshot(run) == before


def test_local_names_become_ids_and_no_path_of_this_machine_is_left(push, server, run, bases, home):
    assert push("me/ids")[0] == "ok"
    files = server.repos["model", "me/ids"].files
    config = json.loads(files["config.json"])
    assert {part: config[f"{part}_name_or_path"] for part in IDS} == IDS
    assert config["vision_revision"] == server.repos["model", "tiny/clip"].branches["main"]
    assert json.loads(files["eval/test/scores.json"])["model"] == "me/ids"
    summary = json.loads(files["run_summary.json"])
    assert summary["command"] == "accelerate launch recipes/sft.py --output_dir run --cache ~/cache"
    assert (summary["vision_model"], summary["adapter"]) == ("tiny/clip", "me/ids")
    card = files["README.md"].decode()
    assert 'VisionQwen.from_adapter("me/ids")' in card
    assert "the encoder `tiny/clip` and the decoder `tiny/qwen3`" in card
    for name, content in files.items():
        for path in (home, run.parent, bases[0].parent):
            assert str(path).encode() not in content, name


def test_the_card_files_it_as_an_adapter_of_both_bases_with_its_scores(push, server):
    assert push("me/card")[0] == "ok"
    card = server.repos["model", "me/card"].files["README.md"].decode()
    front = safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["base_model"] == ["tiny/qwen3", "tiny/clip"]
    assert front["base_model_relation"] == "adapter"
    # Both bases' cards on the Hub say so; the folder's card did not know.
    assert front["license"] == "mit"
    assert "- encoder `tiny/clip`: mit" in card
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "cider", "value": 1.25, "name": "CIDEr"}]


def test_what_the_owner_wrote_in_the_card_stays(push, server, run):
    path = run / "README.md"
    card = (
        path.read_text()
        .replace("---\n\n# run", "language: de\n---\n\n# Walls")
        .replace("`: not known", "`: not stated", 2)
    )
    path.write_text(card + f"\n## Mine\n\nTrained in {run.parent}.\n")
    assert push("me/own")[0] == "ok"
    pushed = server.repos["model", "me/own"].files["README.md"].decode()
    front = safe_load(pushed.split("---")[1])
    assert (front["language"], front["base_model"]) == ("de", ["tiny/qwen3", "tiny/clip"])
    assert "# Walls\n" in pushed
    assert f"## Mine\n\nTrained in {run.parent.name}.\n" in pushed
    # The lines left alone are those of a card that was not touched.
    write_model_card(run)
    assert push("me/made")[0] == "ok"
    made = server.repos["model", "me/made"].files["README.md"].decode().replace("me/made", "me/own")
    assert set(made.partition("# run")[2].splitlines()) <= set(pushed.splitlines())


def test_a_name_without_an_owner_is_the_users(push, server):
    assert push("mine") == ("ok", f"{server.url}/me/mine")


# --- one commit ---


@pytest.mark.parametrize("fail_at", ["/lfs/", "commit"])
def test_an_interrupted_push_leaves_the_old_version_whole(push, server, run, fail_at):
    name = f"me/broken-{fail_at.strip('/')}"
    assert push(name)[0] == "ok"
    repo = server.repos["model", name]
    repo.files["notes.md"] = b"the owner's own"
    old, history = dict(repo.files), list(repo.history)
    # A new version: other weights, another picture, no predictions.
    weights = run / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    (run / "eval" / "test" / "predictions.jsonl").unlink()
    server.fail_at = fail_at
    try:
        kind, message = push(name)
    finally:
        server.fail_at = None
    assert kind == "HubError"
    assert "\n" not in message
    assert "refused for ***" in message if fail_at == "/lfs/" else "cannot be reached or broke off" in message
    assert (repo.files, repo.history) == (old, history)
    assert push(name)[0] == "ok"
    assert len(repo.history) == 2
    assert repo.files["adapter_model.safetensors"] == weights.read_bytes()
    assert set(old) - set(repo.files) == {"eval/test/predictions.jsonl"}


# --- what is refused ---


def test_local_bases_are_refused_before_anything_is_sent(hub, server, run, bases):
    asked = len(server.requests)
    kind, message = hub("push_adapter", folder=run, repo_id="me/x", token=OWNER)
    assert kind == "ValueError"
    assert f"encoder is the local folder {bases[0]}" in message
    assert '(vision="owner/name", --vision owner/name on the command line)' in message
    kind, message = hub("push_adapter", folder=run, repo_id="me/x", token=OWNER, vision="tiny/clip")
    assert f"decoder is the local folder {bases[1]}" in message
    assert len(server.requests) == asked


@pytest.mark.parametrize("name", ["a/b/c", "../x", "me/x y", "me/x--y", "me/x.git", "", "me/ü"])
def test_an_invalid_name_is_refused_before_anything_is_sent(push, server, name):
    asked = len(server.requests)
    kind, message = push(name)
    assert kind == "HubError"
    assert f"{name!r} is no name for a repository, expected owner/name" in message
    assert len(server.requests) == asked


def test_without_a_token_a_private_repository_is_refused(push, server):
    kind, message = push("me/secret", token=None, private=True)
    assert (kind, message) == (
        "HubError",
        "Nothing is pushed to the private repository me/secret without an access token: run `hf auth login`, or set "
        "HF_TOKEN to a token with write permission.",
    )
    assert ("model", "me/secret") not in server.repos
    assert push("me/secret", private=True)[0] == "ok"
    assert server.repos["model", "me/secret"].private
    kind, message = push("me/open")
    kind, message = push("me/open", private=True)
    assert message.startswith("me/open is public already")


def test_each_error_of_the_hub_is_one_line_with_what_to_do(push, hub, server):
    assert push("me/errors")[0] == "ok"
    server.add("me/pictures", {"README.md": b""}, kind="dataset")
    server.add("tiny/hidden", {}, private=True)
    cases = {
        "did not accept the access token": push("me/errors", token="hf_nobody"),
        "may not do this to me/errors (you do not have write access": push("me/errors", token=GUEST),
        "me/pictures is the name of a dataset repository, not of a model one": push("me/pictures"),
        "me/errors has no revision 'dev'": push("me/errors", revision="dev"),
        "me/fresh is not there yet, so it has no branch 'dev'": push("me/fresh", revision="dev"),
        "The encoder tiny/gone is not on the Hub": push("me/errors", vision="tiny/gone"),
        "The encoder tiny/hidden is not on the Hub, or the token may not": push("me/errors", vision="tiny/hidden"),
        "http://127.0.0.1:9 cannot be reached": push("me/errors", endpoint="http://127.0.0.1:9"),
        "me/nothing is not on": hub("pull_model", repo_id="me/nothing"),
        "me/errors has no revision 'v9'": hub("pull_model", repo_id="me/errors", revision="v9"),
    }
    for expected, (kind, message) in cases.items():
        assert kind == "HubError", message
        assert expected in message
        assert "\n" not in message
        assert OWNER not in message
    assert ("model", "me/fresh") not in server.repos


def test_offline_is_said_as_such(run):
    # The tests' own process is offline.
    with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE is set, and me/run cannot be had without http"):
        push_adapter(run, "me/run", card=card_for_others, token=OWNER, **IDS)
    with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE is set, and me/run cannot be had without http"):
        pull_model("me/run")


def test_a_card_that_the_hub_does_not_like_is_refused_in_one_line(push, server, run):
    (run / "README.md").write_text("---\ntags: [a\n---\n# Damaged\n")
    kind, message = push("me/card-refused")
    assert (kind, "README.md has damaged metadata" in message) == ("ValueError", True)
    (run / "README.md").write_text("---\nlicense: my-own\n---\n# Refused\n")
    assert push("me/card-refused") == (
        "HubError",
        f"{server.url} refused this for me/card-refused: Invalid metadata in README.md. - no such licence",
    )


def test_what_would_stop_a_push_is_found_before_training(hub, server):
    asked = {"repo_id": "me/later", "token": OWNER, **IDS}
    assert hub("check_push", **asked) == ("ok", "None")
    assert ("model", "me/later") not in server.repos
    assert (
        f"is the local folder {ROOT / 'recipes/demo/clip'},"
        in hub("check_push", **asked | {"vision": "recipes/demo/clip"})[1]
    )
    # A folder that looks like an id: the working directory's `vlm_peft/tasks`.
    assert (
        f"is the local folder {ROOT / 'vlm_peft/tasks'}," in hub("check_push", **asked | {"text": "vlm_peft/tasks"})[1]
    )
    assert "without an access token" in hub("check_push", **asked | {"token": None})[1]
    assert "did not accept the access token" in hub("check_push", **asked | {"token": "hf_nobody"})[1]


def break_weights(run: Path) -> None:
    weights = run / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def leak_token(run: Path) -> None:
    (run / "run_summary.json").write_text(json.dumps({"command": f"sft.py --hub_token {OWNER}"}))


def leak_another(run: Path) -> None:
    rows = [PREDICTION, {**PREDICTION, "id": "c", "prediction": f"it reads {SECRETS[0]}"}]
    (run / "eval" / "test" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def link_out(run: Path) -> None:
    (run.parent / "private").write_text("{}")
    (run / "task.json").symlink_to(run.parent / "private")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: (run / "processor_config.json").unlink(),
            "no complete adapter folder: processor_config.json missing",
        ),
        (lambda run: (run / "README.md").unlink(), "no complete adapter folder: README.md missing"),
        (lambda run: (run / "adapter_config.json").write_text("{"), "adapter_config.json is damaged, expected JSON"),
        (lambda run: (run / "README.md").write_text("![a](eval/a.webp)"), "shows eval/a.webp, which is not there"),
        (break_weights, "adapter_model.safetensors is damaged"),
        (leak_token, "run_summary.json is not pushed: it holds your access token"),
        (leak_another, "eval/test/predictions.jsonl is not pushed: line 2 holds what looks like a secret (hf_...)"),
        (link_out, "task.json leads out of the folder"),
    ],
)
def test_a_folder_that_is_not_fit_for_others_is_refused(push, server, run, spoil, message):
    spoil(run)
    kind, said = push("me/spoilt")
    assert kind in ("ValueError", "FileNotFoundError")
    assert message in said
    assert OWNER not in said
    assert SECRETS[0] not in said
    assert ("model", "me/spoilt") not in server.repos


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_refused_without_being_shown(secret):
    for text in (f"--option {secret} --next", json.dumps({"said": f"a\n{secret}"}), f"\n{secret}"):
        with pytest.raises(
            ValueError, match=r"^a\.json is not pushed: line \d holds what looks like a secret \("
        ) as refused:
            refuse_secret("a.json", text, OWNER)
        assert secret.rpartition(" ")[2] not in str(refused.value)
    refuse_secret("vocab.json", secret, OWNER, is_vocabulary=True)


def test_what_an_adapter_folder_says_is_no_secret():
    said = [path.read_text() for path in (ROOT / "tests/data/old_adapter").rglob("*.json")]
    said += [path.read_text() for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
    said += [
        "--hub_token *** --max_new_tokens 32 --output_dir outputs/run-2026-01-02T03-04",
        '{"eos_token": "<|endoftext|>", "content_hash": "0123456789abcdef0123456789abcdef", "num_tokens": 1234567890}',
        f"{'aB3/' * 5}AIza{'aB3x' * 10} + {'AB34' * 5}AKIA{'AB34' * 4}",
        "a task-0123456789abcdef0123 of hf_hub_download; the secret is a password of letters",
    ]
    for text in said:
        refuse_secret("README.md", text, OWNER)


def test_a_prediction_that_names_the_home_folder_is_refused(push, server, run, home):
    row = PREDICTION | {"file": f"{home}/home/pictures/a.png"}
    (run / "eval" / "test" / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    assert "predictions.jsonl is not pushed: it names your home folder" in push("me/spoilt")[1]


# --- data sets, and pulling both ---


def walls(folder: Path, colours: dict[str, tuple[int, int, int]]) -> Dataset:
    """Rows whose pictures lie in files."""
    folder.mkdir()
    for name, colour in colours.items():
        PILImage.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    rows = {
        "image": [str(folder / f"{name}.png") for name in colours],
        "caption": [f"a {name} wall" for name in colours],
    }
    return Dataset.from_dict(rows).cast_column("image", Image())


def test_adapter_and_data_set_come_back_in_a_fresh_process(push, hub, server, home, run, adapted, tmp_path):
    assert push("me/run", private=True)[0] == "ok"
    source = tmp_path / "walls"
    source.mkdir()
    colours = {"train": {"red": (250, 0, 0), "blue": (0, 0, 250)}, "test": {"green": (0, 250, 0)}}
    for split, each in colours.items():
        walls(tmp_path / f"{split}-pictures", each).to_parquet(source / f"{split}.parquet")
    (source / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Walls\n\nPainted by hand.\n")
    assert hub("push_dataset", data=source, repo_id="me/walls", token=OWNER) == (
        "ok",
        f"{server.url}/datasets/me/walls",
    )
    repo = server.repos["dataset", "me/walls"]
    assert set(repo.files) == {
        "README.md",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    }
    assert len(repo.history) == 1
    card = repo.files["README.md"].decode()
    assert "Painted by hand." in card
    assert "Licence: cc0-1.0." in card
    assert "| `caption` | `Value('string')` |" in card
    assert "| train | 2 |" in card
    front = safe_load(card.split("---")[1])
    assert front["license"] == "cc0-1.0"
    assert {split["name"]: split["num_examples"] for split in front["dataset_info"]["splits"]} == {
        "test": 1,
        "train": 2,
    }

    # The pictures' own files are gone when it is loaded.
    for path in tmp_path.glob("*-pictures/*"):
        path.unlink()
    batch = {"input_ids": torch.tensor([[1, *[259] * 16, 5, 6, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    torch.save(batch, tmp_path / "batch.pt")
    program = subprocess.run(
        [sys.executable, "-c", PULL],
        env=environment(server, home, HF_TOKEN=OWNER, HF_DEBUG="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr[-2000:]
    assert OWNER not in program.stdout + program.stderr
    pulled = torch.load(tmp_path / "pulled.pt")
    with torch.inference_mode():
        assert torch.equal(pulled["logits"], adapted(**batch).logits)
    assert pulled["text"] == make_processor(adapted.get_base_model().config).tokenizer.decode([104, 105])
    assert pulled["captions"] == ["a red wall", "a blue wall"]
    assert pulled["pictures"] == {split: list(each.values()) for split, each in colours.items()}
    fetched = set(program.stdout.split())
    assert {"adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= fetched <= set(LOADED_FILES)
    # Nothing that either process left on the disk holds the token.
    for folder in (home, tmp_path):
        assert not [path for path in folder.rglob("*") if path.is_file() and OWNER.encode() in path.read_bytes()]


def test_image_folders_and_saved_data_sets_are_pushed_with_their_pictures(hub, server, tmp_path):
    rows = walls(tmp_path / "train", {"red": (250, 0, 0), "blue": (0, 0, 250)})
    lines = [json.dumps({"file_name": f"{name}.png", "caption": f"a {name} wall"}) for name in ("red", "blue")]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    rows.save_to_disk(tmp_path / "saved")
    for source in ("train", "saved"):
        name = f"me/from-{source}"
        assert hub("push_dataset", data=tmp_path / source, repo_id=name, token=OWNER)[0] == "ok"
        files = server.repos["dataset", name].files
        assert "Licence: not stated by the source of this data set." in files["README.md"].decode()
        stored = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"])).to_pylist()
        found = {row["caption"]: PILImage.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0)) for row in stored}
        assert found == {"a red wall": (250, 0, 0), "a blue wall": (0, 0, 250)}


def test_a_columns_name_is_text_on_the_card(hub, server, tmp_path):
    Dataset.from_dict({"a|b`<i>": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    assert hub("push_dataset", data=tmp_path / "rows.parquet", repo_id="me/columns", token=OWNER)[0] == "ok"
    card = server.repos["dataset", "me/columns"].files["README.md"].decode()
    assert r"| ``a\|b`<i>`` | `Value('string')` |" in card


def test_a_data_set_with_secrets_or_without_pictures_is_refused(hub, server, home, tmp_path):
    Dataset.from_dict({"file": [f"{home}/home/a.png"]}).to_parquet(tmp_path / "paths.parquet")
    kind, message = hub("push_dataset", data=tmp_path / "paths.parquet", repo_id="me/paths", token=OWNER)
    assert "Column file of split train is not pushed: it names your home folder" in message
    gone = walls(tmp_path / "pictures", {"red": (250, 0, 0)})
    gone.to_parquet(tmp_path / "gone.parquet")
    (tmp_path / "pictures" / "red.png").unlink()
    kind, message = hub("push_dataset", data=tmp_path / "gone.parquet", repo_id="me/gone", token=OWNER)
    assert (kind, "red.png" in message) == ("FileNotFoundError", True)
    assert hub("push_dataset", data=tmp_path / "nowhere", repo_id="me/gone", token=OWNER)[0] == "FileNotFoundError"
    assert not [name for _, name in server.repos if name in ("me/paths", "me/gone")]


def test_the_hash_of_stored_rows_knows_content_and_not_where_it_lies(tmp_path):
    colours = {"red": (250, 0, 0), "blue": (0, 0, 250)}
    rows = walls(tmp_path / "here", colours)
    expected = stored_hash(rows)[0]
    assert stored_hash(walls(tmp_path / "there", colours))[0] == expected
    embedded = [
        {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}, "caption": row["caption"]}
        for row in rows.cast_column("image", Image(decode=False))
    ]
    assert stored_hash(Dataset.from_list(embedded).cast_column("image", Image()))[0] == expected
    assert stored_hash(rows.select([1, 0]))[0] != expected
    assert stored_hash(rows.map(lambda row: {"caption": row["caption"] + "."}))[0] != expected
    assert stored_hash(walls(tmp_path / "other", colours | {"red": (250, 0, 1)}))[0] != expected
