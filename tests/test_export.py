"""Export: stock Llava folders and merged ones answer as their adapter does, also without this package."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flickr_rows, make_config, make_processor, make_tokenizer
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2WithRegistersConfig,
    GPT2Config,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters import export
from vlm_peft.adapters.export import check_llava, export_llava, export_merged
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.lora import lora_config

# What stock Llava has fields for.
JOINTS = {
    "mlp": {},
    "class token": {"keep_class_token": True},
    "several layers": {"vision_feature_layer": [0, -2]},
    "linear": {"projector_type": "linear"},
    "linear without bias": {"projector_type": "linear", "projector_bias": False, "vision_feature_layer": 1},
}
# As a folder's generation_config says where no task.json was.
TOKENS = 48
CHAT = [
    {"role": "system", "content": "You see."},
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What differs? ü"}]},
    {"role": "assistant", "content": "The wall."},
    {"role": "user", "content": "Say more."},
]


def train(clip: Path, qwen3: Path, folder: Path, **fields) -> Path:
    """An adapter folder as after training: no weight of LoRA or projector is where it started."""
    model = VisionQwen.from_vision_text_pretrained(clip, qwen3, **fields)
    processor = VisionQwenProcessor.from_vision_text_pretrained(clip, qwen3, model.config)
    adapted = get_peft_model(model, lora_config(model, r=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    save_composite_config(adapted, folder)
    processor.save_pretrained(folder)
    return folder


def picture() -> Image.Image:
    """A row's picture; neither square nor of the encoder's size."""
    return Image.open(io.BytesIO(flickr_rows()["image"][1]["bytes"]))


def ask(model, processor, image: Image.Image, **arguments) -> tuple[torch.Tensor, str]:
    """Logits `(1, T, V)` of a prompt and the greedy answer as it is, special tokens included."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the picture."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, **arguments)
        return model(**inputs).logits, processor.decode(ids[0, inputs["input_ids"].shape[1] :])


def without_special_tokens(text: str) -> str:
    return re.sub(r"<\|\w+\|>", "", text)


def ask_adapter(folder: Path, **arguments) -> tuple[torch.Tensor, str]:
    """The answer of the merged adapter, ended as this package ends it; the LoRA in it matters."""
    model, processor = VisionQwen.from_adapter(folder, merge=True), VisionQwenProcessor.from_pretrained(folder)
    return ask(model, processor, picture(), eos_token_id=processor.end_of_turn_token_id, **arguments)


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: train(*bases, folder / name.replace(" ", "_"), **fields) for name, fields in JOINTS.items()}


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {name: export_llava(adapter, folder / adapter.name) for name, adapter in adapters.items()}


@pytest.fixture(scope="module")
def answers(adapters) -> dict[str, tuple[torch.Tensor, str]]:
    return {name: ask_adapter(adapter) for name, adapter in adapters.items()}


# --- stock Llava ---


@pytest.mark.parametrize("joint", JOINTS)
def test_llava_answers_as_the_adapter_bit_for_bit(adapters, exported, answers, joint):
    model = AutoModelForImageTextToText.from_pretrained(exported[joint])
    processor = AutoProcessor.from_pretrained(exported[joint])
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    expected_logits, expected_text = answers[joint]
    logits, text = ask(model, processor, picture())
    assert torch.equal(logits, expected_logits)
    assert text == expected_text
    unadapted = VisionQwen.from_adapter(adapters[joint])
    with unadapted.disable_adapter():
        base_logits, _ = ask(unadapted, VisionQwenProcessor.from_pretrained(adapters[joint]), picture())
    assert (logits - base_logits).abs().max() > 0.1
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.model.vision_tower.encoder.layers) == (1 if joint == "linear without bias" else 2)


@pytest.mark.parametrize("joint", ["mlp", "class token"])
def test_llava_processor_renders_and_counts_as_ours(adapters, exported, joint):
    ours, stock = VisionQwenProcessor.from_pretrained(adapters[joint]), AutoProcessor.from_pretrained(exported[joint])
    for add_prompt in (True, False):
        rendered = stock.apply_chat_template(CHAT, add_generation_prompt=add_prompt)
        assert rendered == ours.apply_chat_template(CHAT, add_generation_prompt=add_prompt)
        assert rendered == stock.tokenizer.apply_chat_template(CHAT, add_generation_prompt=add_prompt, tokenize=False)
    images = [picture(), Image.new("RGB", (30, 9), "red")]
    inputs, expected = (each(images=[images], text=[rendered], return_tensors="pt") for each in (stock, ours))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert (inputs["input_ids"] == 259).sum() == 2 * (17 if joint == "class token" else 16)


PLAIN = """
import json, re, sys
sys.modules["vlm_peft"] = None
import torch
torch.set_num_threads(1)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

for case in json.load(open("cases.json")):
    processor = AutoProcessor.from_pretrained(case["folder"])
    model = AutoModelForImageTextToText.from_pretrained(case["folder"])
    parts = [{"type": "image", "image": Image.open("picture.jpg")}, {"type": "text", "text": "Describe the picture."}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, load_file(case["logits"])["logits"]), case["folder"]

def said(text):
    print(json.dumps(text))

card = open(case["folder"] + "/README.md").read()
program = re.search(r"```python\\n(.*?)```", card, re.DOTALL).group(1)
exec(program.replace("THIS_FOLDER_OR_ID", case["folder"]), {"print": said})
"""


def test_a_process_without_this_package_loads_the_folders_and_runs_their_card(exported, answers, tmp_path):
    # The pipeline of the card reads a file: PNG, whatever its name says, so that no pixel changes.
    picture().save(tmp_path / "picture.jpg", "PNG")
    cases = []
    for joint, folder in exported.items():
        path = tmp_path / f"{folder.name}.safetensors"
        save_file({"logits": answers[joint][0]}, path)
        cases.append({"folder": str(folder), "logits": str(path)})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == without_special_tokens(answers[joint][1])


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}


@pytest.mark.parametrize(
    ("tower", "keep_class_token", "placeholders"),
    [
        (SiglipVisionConfig(**SMALL, intermediate_size=32), False, 16),
        (SiglipVisionConfig(**SMALL, intermediate_size=32), True, 16),
        (Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2), True, 21),
    ],
    ids=["siglip", "siglip-class", "dinov2"],
)
def test_other_towers_and_a_placeholder_outside_the_vocabulary(tmp_path, tower, keep_class_token, placeholders):
    """The decoder is untied, too."""
    torch.manual_seed(2)
    AutoModel.from_config(tower).save_pretrained(tmp_path / "tower")
    make_processor(make_config()).image_processor.save_pretrained(tmp_path / "tower")
    text = {**make_config().text_config.to_dict(), "vocab_size": 259, "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(**text)).save_pretrained(tmp_path / "qwen3")
    make_tokenizer().save_pretrained(tmp_path / "qwen3")
    adapter = train(tmp_path / "tower", tmp_path / "qwen3", tmp_path / "adapter", keep_class_token=keep_class_token)
    folder = export_llava(adapter, tmp_path / "llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor(images=[picture()], text="<|image_pad|>")["input_ids"] == [[259] * placeholders]
    expected_logits, expected_text = ask_adapter(adapter)
    logits, text = ask(model, processor, picture())
    assert logits.shape[-1] == 260
    assert torch.equal(logits[..., :259], expected_logits)
    assert text == expected_text
    # The placeholder's logit is the mean of all others: it is never the answer.
    torch.testing.assert_close(logits[..., 259], expected_logits.mean(-1), rtol=1e-4, atol=1e-4)


def test_llava_folder_has_the_hubs_names_and_no_trace_of_this_machine(exported, tmp_path_factory):
    """Servers read `vision_tower.vision_model.` and `language_model.model.`, and the decoder's architecture."""
    folder = exported["mlp"]
    names = set(load_file(folder / "model.safetensors"))
    parts = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
    assert {part for name in names for part in parts if name.startswith(part)} == set(parts)
    assert all(name.startswith(parts) for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["image_seq_length"] == 16
    files = {path.name for path in folder.iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "preprocessor_config.json", "README.md"} < files
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".md", ".safetensors"}
    for path in folder.glob("*.[jm]*"):
        if path.suffix != ".safetensors":
            assert str(tmp_path_factory.getbasetemp()) not in path.read_text()


@pytest.mark.parametrize(
    ("fields", "lacking"),
    [
        ({"pixel_shuffle_factor": 2}, "no pixel_shuffle_factor=2:"),
        ({"projector_layer_norm": True}, "no projector_layer_norm=True:"),
        (
            {"pixel_shuffle_factor": 2, "projector_layer_norm": True},
            "no pixel_shuffle_factor=2 and no projector_layer_norm=True:",
        ),
        (
            {
                "vision_config": Dinov2WithRegistersConfig(
                    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
                ).to_dict()
            },
            "no keep_class_token=False with 5 class and register tokens:",
        ),
        (
            {"text_config": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=264).to_dict()},
            "no a decoder of the type gpt2 with tied embeddings:",
        ),
    ],
)
def test_what_llava_cannot_express_is_refused_by_name(fields, lacking):
    with pytest.raises(ValueError, match=rf"Stock Llava has {lacking} export with --to merged"):
        check_llava(make_config(**fields))


# --- merged ---


@pytest.mark.parametrize("fields", [{"pixel_shuffle_factor": 2, "projector_layer_norm": True}, {}])
def test_a_merged_folder_answers_as_the_adapter_and_needs_no_bases(bases, tmp_path, fields):
    moved = [Path(shutil.copytree(base, tmp_path / base.name)) for base in bases]
    adapter = train(*moved, tmp_path / "adapter", **fields)
    (adapter / "task.json").write_text('{"task": "caption", "instruction": "What is it?", "max_new_tokens": 5}')
    expected_logits, expected_text = ask_adapter(adapter)
    folder = export_merged(adapter, tmp_path / "merged")
    for base in moved:
        shutil.rmtree(base)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is VisionQwen
    logits, text = ask(model, AutoProcessor.from_pretrained(folder), picture())
    assert torch.equal(logits, expected_logits)
    assert text == expected_text
    assert model.generation_config.max_new_tokens == 5
    assert (folder / "task.json").read_text() == (adapter / "task.json").read_text()
    assert '"text": "What is it?"' in (folder / "README.md").read_text()
    if fields:
        with pytest.raises(ValueError, match="export with --to merged"):
            export_llava(folder, tmp_path / "llava")
    else:
        llava = AutoModelForImageTextToText.from_pretrained(export_llava(folder, tmp_path / "llava"))
        assert torch.equal(ask(llava, AutoProcessor.from_pretrained(folder), picture())[0], expected_logits)


def test_half_precision_rounds_the_merged_weights_once(adapters, tmp_path):
    folder = export_llava(adapters["mlp"], tmp_path / "llava", dtype=torch.bfloat16)
    llava = AutoModelForImageTextToText.from_pretrained(folder)
    assert {parameter.dtype for parameter in llava.parameters()} == {torch.bfloat16}
    merged = dict(VisionQwen.from_adapter(adapters["mlp"], merge=True).named_parameters())
    for name, parameter in llava.named_parameters():
        assert torch.equal(parameter, merged[name].to(torch.bfloat16)), name
    assert '"float32"' not in (folder / "config.json").read_text()


# --- folders ---


def test_a_folder_with_something_in_it_is_left_alone_and_an_empty_one_is_filled(adapters, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for output in (tmp_path / "full", tmp_path / "full" / "mine"):
        for export_to in (export_llava, export_merged):
            with pytest.raises(FileExistsError, match="is there already and not empty: name another folder"):
                export_to(adapters["mlp"], output)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
    (tmp_path / "empty").mkdir()
    export_merged(adapters["mlp"], tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    export_merged(adapters["mlp"], tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep" / "model.safetensors").is_file()


def test_an_interrupted_export_leaves_nothing(adapters, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        assert any(path.name == "model.safetensors" for path in tmp_path.rglob("*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_card", interrupt)
    for export_to in (export_llava, export_merged):
        with pytest.raises(KeyboardInterrupt):
            export_to(adapters["mlp"], tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_folder_that_answers_differently_is_given_up(adapters, tmp_path, monkeypatch):
    convert = export.to_llava

    def damage(model):
        llava = convert(model)
        with torch.no_grad():
            llava.model.multi_modal_projector.linear_2.bias.add_(0.01)
        return llava

    with monkeypatch.context() as patch:
        patch.setattr(export, "to_llava", damage)
        with pytest.raises(ValueError, match=r"answers differently than .*mlp: its logits differ by .* was given up"):
            export_llava(adapters["mlp"], tmp_path / "out")
    monkeypatch.setattr(export, "select_strategy", lambda config: "full")
    with pytest.raises(ValueError, match=r"makes \d+ tokens of a prompt, the source's \d+, and not the same"):
        export_llava(adapters["mlp"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_trained_model_is_named(exported, bases, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there"):
        export_llava(tmp_path / "nowhere", tmp_path / "out")
    for folder in (tmp_path, exported["mlp"], bases[1]):
        with pytest.raises(ValueError, match=r"holds no trained model: expected .* of a vision_qwen model; it holds"):
            export_llava(folder, tmp_path / "out")


def test_moved_bases_are_named_and_the_card_carries_licences(adapters, bases, tmp_path):
    adapter = Path(shutil.copytree(adapters["mlp"], tmp_path / "adapter"))
    (adapter / "README.md").write_text("---\nlicense: cc-by-4.0\ndatasets:\n- someone/pictures\n---\n# x\n")
    config = json.loads((adapter / "config.json").read_text())
    moved = {"vision_name_or_path": str(tmp_path / "gone"), "text_name_or_path": "someone/qwen3"}
    (adapter / "config.json").write_text(json.dumps(config | moved))
    with pytest.raises(FileNotFoundError, match="vision="):
        export_llava(adapter, tmp_path / "out")
    clip = Path(shutil.copytree(bases[0], tmp_path / "my_clip"))
    (clip / "README.md").write_text("---\nlicense: mit\n---\n# y\n")
    card = (export_llava(adapter, tmp_path / "out", vision=clip, text=bases[1]) / "README.md").read_text()
    assert "license: cc-by-4.0\n" in card
    assert "- someone/pictures\n" in card
    assert "\n- encoder `my_clip`: mit\n" in card
    assert "\n- decoder `someone/qwen3`: not known" in card
    assert "base_model:\n- someone/qwen3\n" in card
    assert "# out\n" in card
    assert re.search(r"\| largest difference of a logit, this folder against its source \| \S+e\S+ \|", card)


# --- serving the demo's weights ---


SERVER = """
import sys
sys.modules["vlm_peft"] = None
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def demo_llava(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter on the demo's CLIP and Qwen3 with a two-layer projector, and its export."""
    folder = tmp_path_factory.mktemp("demo")
    adapter = train(ROOT / "recipes/demo/clip", ROOT / "recipes/demo/qwen3", folder / "adapter")
    return adapter, export_llava(adapter, folder / "llava")


def scene() -> Image.Image:
    """A picture of the demo."""
    from datasets import load_dataset

    files = str(ROOT / "recipes/demo/scenes/data/test-00000-of-00001.parquet")
    return load_dataset("parquet", data_files=files, split="train")[0]["image"].convert("RGB")


def test_transformers_serve_answers_a_chat_request_as_the_adapter_does(demo_llava, tmp_path):
    adapter, folder = demo_llava
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *arguments],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        model, processor = VisionQwen.from_adapter(adapter, merge=True), VisionQwenProcessor.from_pretrained(adapter)
        image = scene()
        logits, expected = ask(model, processor, image, eos_token_id=processor.end_of_turn_token_id)
        stock = AutoModelForImageTextToText.from_pretrained(folder)
        assert torch.equal(ask(stock, AutoProcessor.from_pretrained(folder), image)[0], logits)
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the picture."}]
        body = {"model": str(folder), "max_tokens": TOKENS, "messages": [{"role": "user", "content": parts}]}
        answer = request(f"http://127.0.0.1:{port}/v1/chat/completions", body, server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(30)
    assert len(expected) > 10
    assert answer["choices"][0]["message"]["content"] == without_special_tokens(expected)
    assert answer["usage"]["prompt_tokens"] == logits.shape[1]


def request(url: str, body: dict, server: subprocess.Popen, log: Path) -> dict:
    """Posts JSON as soon as the server listens."""
    data, deadline = json.dumps(body).encode(), time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
            ) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
