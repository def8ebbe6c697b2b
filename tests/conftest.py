"""Tiny models and a tokenizer built in code: no network, no downloads, a few thousand parameters."""

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests load and encode is neither read from nor left in the user's cache.
if "VLM_PEFT_TEST_CACHE" not in os.environ:
    os.environ["VLM_PEFT_TEST_CACHE"] = tempfile.mkdtemp(prefix="vlm_peft_tests_")
    atexit.register(shutil.rmtree, os.environ["VLM_PEFT_TEST_CACHE"], ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = os.environ["VLM_PEFT_TEST_CACHE"]

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_peft import VisionQwen, VisionQwenConfig, VisionQwenProcessor

# Tensors of a few kilobytes: threads cost more than they bring.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</style></main><script>alert(1)</script><!--",
    '\' onmouseover=alert(1) " autofocus onfocus=alert(1) x="',
    "| a | b |\n|---|---|\n| c | d |",
    "```\n# x\n```",
    "` `` `",
    "\\`\\",
    "[x](javascript:alert(1))",
    "![x](http://example.com/x.png) <http://example.com> http://example.com www.example.com",
    "[x]: http://example.com",
    "---\nlicense: mit\n---\n",
    "# heading",
    "- item",
    "1. item",
    "12) item",
    "> quote",
    "***bold*** __bold__ ~~gone~~ $x$ _a_",
    "&lt;b&gt; &amp; &#60;",
    "one\n\n    code\n\ntwo\n===",
    "\u2028# x\u2029\x85- y\r\n* z",
    "\x00\x1b[31mred\x07\x7f\x9b",
    "\u202egnp.exe\u2066",
    "\ud800",
    "word " * 2000,
    "x" * 5000,
    "{{ 7 * 7 }}{% if x %}{# no #}",
)
"""Texts that a page or a card might take for markup; in data, in names, in whatever a run was told."""

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, by name, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Any connection that leaves this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"A test tried to reach {address}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def make_config(**overrides) -> VisionQwenConfig:
    """CLIP (8 px pictures, 2 px patches, 3 layers) and Qwen3 (2 layers), 16 wide."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
    )
    text = Qwen3Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=258,
        pad_token_id=256,
        bos_token_id=None,
        # Large enough that attention and logits are far from uniform, so that a wrong mask shows.
        initializer_range=0.3,
    )
    fields = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "image_token_id": 259, **overrides}
    return VisionQwenConfig(**fields)


def make_processor(config: VisionQwenConfig) -> VisionQwenProcessor:
    """The processor of `make_config`'s model."""
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return VisionQwenProcessor(image_processor, make_tokenizer(), num_image_tokens=config.num_image_tokens)


@pytest.fixture
def config() -> VisionQwenConfig:
    return make_config()


@pytest.fixture
def model(config) -> VisionQwen:
    return VisionQwen(config).eval()


@pytest.fixture
def processor(config) -> VisionQwenProcessor:
    return make_processor(config)


def save_bases(folder: Path) -> tuple[Path, Path]:
    """The two parts of `make_config` as folders that look like a CLIP and a Qwen3 from the Hub."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = make_config()
    text_tower = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    clip = CLIPConfig(text_config=text_tower.to_dict(), vision_config=config.vision_config.to_dict())
    CLIPModel(clip).save_pretrained(folder / "clip")
    make_processor(config).image_processor.save_pretrained(folder / "clip")
    Qwen3ForCausalLM(config.text_config).save_pretrained(folder / "qwen3")
    make_tokenizer().save_pretrained(folder / "qwen3")
    return folder / "clip", folder / "qwen3"


def flickr_rows(train: int = 24, test: int = 8) -> dict[str, list]:
    """Rows of Flickr30k's schema as it lies on the Hub: plain pictures of one colour, five captions each."""
    import io

    from PIL import Image

    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
    rows: dict[str, list] = {name: [] for name in ("image", "caption", "sentids", "split", "filename", "img_id")}
    for index in range(train + test):
        name, (red, green, blue) = list(colours.items())[index % len(colours)]
        encoded = io.BytesIO()
        Image.new("RGB", (12, 10), (red, green, max(0, blue - index))).save(encoded, "PNG")
        rows["image"].append({"bytes": encoded.getvalue(), "path": f"{index}.png"})
        rows["caption"].append([f"{name} wall", f"a {name} wall", f"the {name} wall", f"all {name}", f"{name} paint"])
        rows["sentids"].append([str(5 * index + place) for place in range(5)])
        rows["split"].append("train" if index < train else "val" if index < train + test // 2 else "test")
        rows["filename"].append(f"{index}.jpg")
        rows["img_id"].append(str(index))
    return rows


def save_flickr(folder: Path, rows: dict[str, list] | None = None) -> Path:
    """Stores rows as the Hub does: one stored split `test`, the true one in the column `split`."""
    from datasets import Dataset, Image

    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_dict(rows or flickr_rows()).cast_column("image", Image())
    dataset.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tiny CLIP and a tiny Qwen3."""
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def wide_bases(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny CLIP, and a Qwen3 that can be quantized."""
    clip, qwen3 = save_bases(tmp_path_factory.mktemp("wide"))
    from tiny_runs import wide_config
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(wide_config()).save_pretrained(qwen3)
    return clip, qwen3


@pytest.fixture(scope="session")
def flickr(tmp_path_factory) -> Path:
    """A folder of Flickr30k's schema: 24 train, 4 val and 4 test rows."""
    return save_flickr(tmp_path_factory.mktemp("flickr30k"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, bases) -> Path:
    """An untrained adapter folder, drawn at random so that it says something else about each picture; read only."""
    from peft import get_peft_model

    from vlm_peft.adapters.folder import save_composite_config
    from vlm_peft.adapters.lora import lora_config
    from vlm_peft.tasks import TASK_FILE, TaskSettings

    torch.manual_seed(0)
    vision, text = bases
    model = VisionQwen.from_vision_text_pretrained(vision, text)
    processor = VisionQwenProcessor.from_vision_text_pretrained(vision, text, model.config)
    adapted = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "multi_modal_projector" in name:
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    save_composite_config(adapted, folder)
    processor.save_pretrained(folder)
    settings = TaskSettings(instruction="Say what you see.", max_new_tokens=6, num_beams=2)
    (folder / TASK_FILE).write_text(settings.to_json())
    return folder
