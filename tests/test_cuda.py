"""What a GPU run is made of, as far as a CPU can tell: one length for all batches, and plain attention for texts."""

import random

import pytest
from conftest import make_config
from tiny_decoders import save_decoder

from vlm_peft import VisionQwen
from vlm_peft.model.cuda.training import decoder_layers, plain_decoder, sequence_length


def test_nearly_every_batch_fits_into_the_sequence():
    drawn = random.Random(0)
    lengths = [drawn.randint(90, 160) for _ in range(2000)]
    capacity = sequence_length(lengths, 64)
    assert capacity % 128 == 0
    sums = [sum(drawn.sample(lengths, 64)) for _ in range(2000)]
    assert sum(tokens > capacity for tokens in sums) <= 10
    # Not much padding either: less than a tenth of the mean.
    assert capacity < 1.1 * sum(sums) / len(sums)


@pytest.mark.parametrize(
    ("lengths", "batch", "expected"), [([10, 10], 8, 128), ([300] * 4, 4, 1280), ([1, 500], 1, 512)]
)
def test_a_sequence_is_no_longer_than_the_longest_rows_need(lengths, batch, expected):
    assert sequence_length(lengths, batch) == expected


@pytest.mark.parametrize(("name", "plain"), [("Qwen3", "sdpa"), ("GPT-OSS", "eager")])
def test_texts_are_generated_with_plain_attention_and_training_goes_on_with_flex(bases, tmp_path, name, plain):
    model = VisionQwen.from_vision_text_pretrained(bases[0], save_decoder(name, tmp_path))
    model.set_attn_implementation({"text_config": "flex_attention"})
    config = model.model.language_model.config
    with plain_decoder(model):
        assert config._attn_implementation == plain
    assert config._attn_implementation == "flex_attention"


def test_the_decoders_layers_are_found():
    model = VisionQwen(make_config())
    assert decoder_layers(model) == list(model.model.language_model.layers)
