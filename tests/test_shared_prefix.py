"""Shared-prefix batches against separate samples: same loss, same gradients, nothing leaks."""

import random

import pytest
import torch
from conftest import make_config, make_processor
from separate_samples import (
    IMAGE,
    RELATIVE,
    ROWS,
    ask,
    compare,
    count_images,
    encode,
    gradients,
    largest_difference,
    make_collator,
    separate_loss,
)
from torch import nn

from vlm_peft import VisionQwen
from vlm_peft.data.collator import pack_best_fit
from vlm_peft.model import shared_prefix
from vlm_peft.model.cuda.training import compile_layers
from vlm_peft.model.shared_prefix import attention_mask_from_segments, block_mask_from_segments, lay_out


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 400}, {"packing": True, "max_length": 130}])
def test_loss_and_every_gradient_equal_separate_samples(name, layout):
    if layout.get("max_length") == 130 and name != "questions":
        layout = {"sequence_length": 256, "max_length": 220, "image_token_id": 259}
    loss, gradient = compare(ROWS[name], **layout)
    assert loss < RELATIVE
    assert gradient < RELATIVE


def test_bfloat16_agrees_to_its_own_precision():
    """Measured here: loss 3e-3; the bound is four units of bfloat16's last place (2^-8)."""
    loss, _ = compare(ROWS["packed rows"], dtype=torch.bfloat16, packing=True, max_length=400)
    assert loss < 4 * 2**-8


def leak(segment_ids, *_):
    """The mask with every branch of a row visible."""
    flat = segment_ids.clone()
    flat[..., 1] = 0
    return attention_mask_from_segments(flat)


def leak_between_rows(segment_ids, *_):
    flat = segment_ids.clone()
    flat[..., 0] = flat[..., 0].clamp(max=0)
    return attention_mask_from_segments(flat)


@pytest.mark.parametrize("mask", [leak, leak_between_rows])
def test_a_planted_leak_is_seen(monkeypatch, mask):
    monkeypatch.setattr("vlm_peft.model.shared_prefix.attention_mask_from_segments", mask)
    loss, gradient = compare(ROWS["packed rows"], packing=True, max_length=400)
    assert loss > 50 * RELATIVE
    assert gradient > 100 * RELATIVE


def test_wrong_positions_are_seen(monkeypatch):
    original = shared_prefix.lay_out

    def unbroken(conversations):
        row = original(conversations)
        return shared_prefix.SharedPrefixRow(row.input_ids, list(range(len(row))), row.branch_ids, row.shift_labels)

    monkeypatch.setattr("vlm_peft.model.processing_vision_qwen.lay_out", unbroken)
    _, gradient = compare(ROWS["captions"])
    assert gradient > 100 * RELATIVE


def test_layout_of_the_docstring_example():
    row = lay_out([([1, 2, 3, 7, 9], [-100, -100, -100, 7, 9]), ([1, 2, 3, 8, 9], [-100, -100, -100, 8, 9])])
    assert row.input_ids == [1, 2, 3, 7, 3, 8]
    assert row.position_ids == [0, 1, 2, 3, 2, 3]
    assert row.branch_ids == [0, 0, 1, 1, 2, 2]
    assert row.shift_labels == [-100, -100, 7, 9, 8, 9]


def test_golden_labels_are_the_completion_and_its_end_of_turn(processor):
    prompt, completions = ROWS["captions"][0]
    row = processor.encode_row(prompt, completions)
    for branch, completion in enumerate(completions, start=1):
        labels = [
            label
            for label, owner in zip(row.shift_labels, row.branch_ids, strict=True)
            if owner == branch and label != -100
        ]
        assert processor.tokenizer.decode(labels) == completion + "<|im_end|>"
    prefix_labels = {label for label, owner in zip(row.shift_labels, row.branch_ids, strict=True) if owner == 0}
    assert prefix_labels == {-100}
    assert row.input_ids.count(processor.image_token_id) == processor.num_image_tokens


def test_golden_rendering(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, ask("Describe.")]},
        {"role": "assistant", "content": "A dog."},
    ]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|image_pad|>Describe.<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>"
    )
    assert processor.apply_chat_template(messages[:2], add_generation_prompt=True).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_assistant_turn_is_labelled_and_nothing_else(processor):
    row = processor.encode_row(*ROWS["several turns"][0])
    labels = [label for label in row.shift_labels if label != -100]
    assert processor.tokenizer.decode(labels) == "a<|im_end|>two<|im_end|>"


@pytest.mark.parametrize("text", ["<|im_end|>", "<|image_pad|>", "<|im_start|>", "<image>", "<|endoftext|>"])
def test_control_tokens_in_user_text_stay_text(processor, text):
    plain = processor.tokenizer.encode(text, split_special_tokens=True)
    prompt = [{"role": "user", "content": [IMAGE, ask(text)]}]
    row = processor.encode_row(prompt, [text + " end"])
    joined = ",".join(map(str, row.input_ids))
    assert ",".join(map(str, plain)) in joined
    assert row.input_ids.count(processor.image_token_id) == processor.num_image_tokens
    labels = [label for label in row.shift_labels if label != -100]
    assert sum(label in (256, 257, 258, 259) for label in labels) == 1
    assert labels[-1] == processor.end_of_turn_token_id


@pytest.mark.parametrize("completion", ["", "  ", [{"role": "user", "content": "and?"}]])
def test_empty_completions_are_refused(processor, completion):
    with pytest.raises(ValueError, match="Expected a completion with text"):
        processor.encode_row([{"role": "user", "content": "a"}], [completion])


def positions_of(segments: list[list[int]]) -> list[int]:
    """Of each token in its separate sample."""
    positions, prefixes = [], {}
    for place, (row, branch) in enumerate(segments):
        is_first = place == 0 or segments[place - 1] != [row, branch]
        positions.append(prefixes.get(row, 0) if is_first else positions[-1] + 1)
        if branch == 0:
            prefixes[row] = positions[-1] + 1
    return positions


@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize("length", [8, 128, 300, 512])
def test_block_mask_equals_boolean_mask(length, window):
    drawn = random.Random(length)
    sequences = []
    for _ in range(2):
        segments, row = [], 0
        while len(segments) < length:
            # Prefixes of several blocks have full ones among them; some rows have no prefix of their own.
            segments += [[row, 0]] * drawn.choice([0, 1, 40, 300])
            segments += [[row, branch] for branch in (1, 2, 3) for _ in range(drawn.randint(1, 60))]
            row += 1
        cut = length - drawn.randint(0, length // 4)
        sequences.append(segments[:cut] + [[-1, -1]] * (length - cut))
    segments = torch.tensor(sequences)
    positions = torch.tensor([positions_of(sequence) for sequence in sequences])
    block = block_mask_from_segments(segments, positions, window)
    dense = attention_mask_from_segments(segments, positions, window)[:, 0]
    batch, query, key = (torch.arange(size) for size in dense.shape)
    seen = block.mask_mod(batch[:, None, None], None, query[:, None], key)
    assert torch.equal(seen, dense)
    # Exactly the blocks with something to see are visited, and of those without a hole the mask is not asked.
    tiles = nn.functional.pad(dense, (0, -length % 128, 0, -length % 128)).unfold(1, 128, 128).unfold(2, 128, 128)
    some, every = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    visited, whole = (torch.zeros_like(some) for _ in range(2))
    for found, counts, indices in (
        (visited, block.kv_num_blocks, block.kv_indices),
        (whole, block.full_kv_num_blocks, block.full_kv_indices),
    ):
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(some.shape[1])).tolist():
            count = counts[place[0], 0, place[1]]
            found[place[0], place[1], indices[place[0], 0, place[1], :count].long()] = True
    if window is None:
        assert torch.equal(whole, every)
        assert torch.equal(visited, some & ~every)
    else:
        # A block may be visited for nothing, and be asked where nothing is hidden; it is never missed.
        assert not (whole & ~every).any()
        assert not (some & ~visited & ~whole).any()
        assert not (visited & whole).any()


def test_best_fit_packing_fills_and_never_cuts():
    bins = pack_best_fit([5, 9, 4, 1, 6], 10)
    assert sorted(row for members in bins for row in members) == [0, 1, 2, 3, 4]
    assert len(bins) == 3
    with pytest.raises(ValueError, match="Row 1 of the batch has 9 tokens and does not fit into max_length=8"):
        pack_best_fit([5, 9], 8)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("length", [384, 640])
def test_flex_attention_on_cuda_equals_separate_samples(length, is_compiled):
    """In fp32 without TF32; 2e-5 for the kernels' other order of sums."""
    config, rows = make_config(), ROWS["packed rows"]
    # The kernels take no narrower heads.
    config.text_config.head_dim = 16
    processor = make_processor(config)
    model = VisionQwen(config).eval().cuda()
    model.model.vision_tower.requires_grad_(False)
    images = sum(count_images(prompt) for prompt, _ in rows)
    features = torch.randn(images, config.num_vision_tokens, 16)
    separate = separate_loss(model, processor, rows, features)
    expected = gradients(model, separate)
    model.set_attn_implementation({"text_config": "flex_attention"})
    if is_compiled:
        compile_layers(model)
    collator = make_collator(features, sequence_length=length, max_length=length, image_token_id=config.image_token_id)
    batch = {name: value.cuda() for name, value in collator(encode(processor, rows)).items()}
    assert batch["input_ids"].shape[1] == length
    shared = model(**batch).loss
    assert abs(shared - separate) / separate < 2e-5
    assert largest_difference(gradients(model, shared), expected) < 2e-5
