"""Tiny models and a tokenizer built in code: no network, no downloads, a few thousand parameters."""

import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_peft import VisionQwen, VisionQwenConfig, VisionQwenProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "eval"))
sys.path.append(str(ROOT / "recipes"))

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


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
