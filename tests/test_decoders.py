"""Whatever decoder is joined: trained, scored, saved, generated from and exported as its separate samples would be."""

import re
from types import SimpleNamespace

import joined
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_decoders import DECODERS, ONE_TEXT_A_SEQUENCE, REFUSED, WITHOUT_PLACEHOLDER, save_decoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.export import check_llava, export_llava, export_merged
from vlm_peft.data.probe import probe

RELATIVE = 1e-5
# The placeholder of these lies outside the vocabulary, as SmolLM2's does.
OUTSIDE = {"Llama", "GPT-2", "Gemma 3", "LFM2"}
# Stock Llava cannot tie their heads.
WITHOUT_LLAVA = {"GPT-2", "OPT", "BLOOM"}
# Exported as Llava here, which takes half a second each; `joinable.py` exports all others, too.
LLAVA = {"Qwen3-MoE", "Qwen3.5", "Llama", "Gemma 3", "Phi-3", "GPT-NeoX", "GPT-OSS", "Falcon-H1"}


def join(name: str, vision, folder) -> SimpleNamespace:
    fields = {"vocab_size": WITHOUT_PLACEHOLDER} if name in OUTSIDE else {}
    text = save_decoder(name, folder, **fields)
    model = VisionQwen.from_vision_text_pretrained(vision, text)
    model.model.vision_tower.requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(vision, text, model.config)
    return SimpleNamespace(
        name=name, model=model, processor=processor, features=joined.make_features(model), sharing=probe(model).sharing
    )


@pytest.fixture(scope="module", params=DECODERS)
def pair(request, bases, tmp_path_factory) -> SimpleNamespace:
    """An encoder and a decoder, joined."""
    return join(request.param, bases[0], tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory) -> SimpleNamespace:
    """The same after three steps, and its adapter folder."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = joined.make_trainer(pair.model, pair.processor, pair.features, folder)
    with torch.no_grad():
        loss = float(joined.separate_loss(pair.model, pair.processor, pair.features))
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    trainer.save_model(folder)
    return SimpleNamespace(trainer=trainer, loss=loss, start=start, folder=folder, model=trainer.model.eval())


def test_layout_is_the_one_that_the_decoder_can_do(pair):
    layout = probe(pair.model)
    assert layout.sharing == (pair.name not in ONE_TEXT_A_SEQUENCE)
    assert layout.difference < RELATIVE
    assert layout.prefill_difference < RELATIVE
    assert bool(layout.reason) == (not layout.sharing)
    assert (pair.model.config.image_token_id < pair.model.lm_head.out_features) == (pair.name not in OUTSIDE)


def test_loss_and_every_gradient_equal_separate_samples(pair):
    difference = joined.largest_difference(pair.model, pair.processor, pair.features, sharing=pair.sharing)
    # In a padded batch the decay of a recurrence (A_log, which never trains) is summed in another order.
    assert difference < (RELATIVE if pair.sharing else 10 * RELATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["Qwen2, sliding windows", "Mistral, sliding windows", "Ministral", "Gemma 3", "GPT-OSS", "SmolLM3"]
)
def test_flex_attention_of_each_kind_of_layer_equals_separate_samples(name, bases, tmp_path):
    """On CUDA, windows and all; their kernels sum in another order, and take no heads narrower than 16."""
    text = save_decoder(name, tmp_path, head_dim=16)
    model = VisionQwen.from_vision_text_pretrained(bases[0], text)
    model.model.vision_tower.requires_grad_(False)
    processor = VisionQwenProcessor.from_vision_text_pretrained(bases[0], text, model.config)
    features = joined.make_features(model)
    model.cuda().set_attn_implementation({"text_config": "flex_attention"})
    layout = {"packing": False, "sequence_length": 384, "image_token_id": model.config.image_token_id}
    assert joined.largest_difference(model, processor, features, sharing=True, **layout) < 1e-4


def test_three_steps_move_what_trains_and_reload(pair, trained):
    losses = [entry["loss"] for entry in trained.trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(trained.loss, rel=RELATIVE)
    now = dict(trained.trainer.model.named_parameters())
    moved = {name for name, value in trained.start.items() if not torch.equal(value, now[name])}
    assert moved == set(trained.start)
    for layer in range(2):
        assert any(f".{layer}." in name and "lora_A" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    reloaded = VisionQwen.from_adapter(trained.folder)
    batch = trained.trainer.data_collator(list(trained.trainer.train_dataset))
    batch = {name: value for name, value in batch.items() if "labels" not in name}
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trained.model(**batch).logits)


def test_cached_answers_equal_uncached_ones(pair, trained):
    expected = joined.uncached_answers(trained.model, pair.processor, pair.features)
    assert joined.answers(trained.model, pair.processor, pair.features) == expected
    assert len(set(map(tuple, expected))) > 1


def test_beams_of_a_batch_equal_those_of_single_prompts(pair, trained):
    together = joined.answers(trained.model, pair.processor, pair.features, num_beams=3)
    assert joined.answers(trained.model, pair.processor, pair.features, num_beams=3, batch_size=1) == together
    assert len(set(map(tuple, together))) > 1


def test_it_exports(pair, trained, tmp_path):
    """Each export loads what it wrote, and compares its logits and its answer with those of its source."""
    export_merged(trained.folder, tmp_path / "merged")
    if pair.name in WITHOUT_LLAVA:
        with pytest.raises(ValueError, match=r"a decoder of the type \w+ with tied embeddings"):
            check_llava(pair.model.config)
    else:
        check_llava(pair.model.config)
    if pair.name in LLAVA:
        export_llava(trained.folder, tmp_path / "llava")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_joined_is_refused_by_name_in_one_line(name, bases, tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        probe(VisionQwen.from_vision_text_pretrained(bases[0], save_decoder(name, tmp_path)))
    assert REFUSED[name][0] in str(caught.value).lower()


def test_readme_tells_how_each_is_laid_out():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What can be joined")[2]
    told = dict(re.findall(r"^\| ([^|]+) \| (shared prefixes, packed|one text a sequence) \| ", text, re.MULTILINE))
    assert told == {
        name: "one text a sequence" if name in ONE_TEXT_A_SEQUENCE else "shared prefixes, packed" for name in DECODERS
    }
    assert set(re.findall(r"^- ([^:]+): ", text.partition("Refused in one line:")[2], re.MULTILINE)) >= set(REFUSED)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_of_a_checkpoint_that_sees_by_itself_the_decoder_is_joined(bases, tmp_path, prefix):
    """Qwen3.5 and Gemma 3 lie on the Hub with an encoder of their own."""
    vision, _ = bases
    text = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    own |= {"image_size": 8, "patch_size": 2}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=own, mm_tokens_per_image=4))
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ways = r"^(model\.language_model|language_model\.model)\."
    stored = {re.sub(ways, prefix, name): value for name, value in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = VisionQwen.from_vision_text_pretrained(vision, tmp_path)
    assert type(model.model.language_model).__name__ == "Gemma3TextModel"
    expected = whole.model.language_model.state_dict()
    found = model.model.language_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    del stored[f"{prefix}norm.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of its decoder gemma3_text, such as model\\.norm\\.weight"):
        VisionQwen.from_vision_text_pretrained(vision, tmp_path)
