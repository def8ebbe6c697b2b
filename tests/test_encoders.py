"""Encoders of every kind: the tokens that they give, the size of their pictures, and the projectors that fit them."""

import gc
import json

import pytest
import torch
import transformers
from conftest import make_config, save_bases
from tiny_encoders import ENCODERS, PROMPT, TinyEncoder, examine, make_pictures, relative, save_encoder
from transformers import AutoConfig, AutoModel, BertConfig, PixtralVisionConfig, SamVisionConfig, YolosConfig
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlm_peft import VisionQwen, VisionQwenConfig, VisionQwenProcessor, vision_tower
from vlm_peft.commands.export import export_llava
from vlm_peft.projector import count_image_tokens, projector_type
from vlm_peft.training_setup import bases as named_bases

# Kernels may add up in another order in a batch of another size.
RELATIVE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The trainer collects garbage at its end, and would go through all that was imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_bases(tmp_path_factory.mktemp("decoder"))[1]


@pytest.fixture(scope="module", params=ENCODERS)
def examined(request, decoder, tmp_path_factory):
    """Name of a kind, what it must give, its folder, and what was measured with it."""
    folder = tmp_path_factory.mktemp("encoder")
    kind = ENCODERS[request.param]()
    encoder = save_encoder(kind, folder / "encoder")
    return request.param, kind, encoder, examine(encoder, decoder, folder, image_size=kind.image_size)


def stock_features(kind: TinyEncoder, encoder, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patches of the default hidden state, from the whole encoder as transformers runs it."""
    config = AutoConfig.from_pretrained(encoder)
    config = getattr(config, "vision_config", config)
    arguments = {"pixel_values": pixel_values}
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
        arguments["noise"] = torch.linspace(0, 1, kind.tokens).expand(len(pixel_values), -1)
    if config.model_type == "siglip2_vision_model":
        # Its own processor cuts patches; it is asked to do nothing else.
        cut = Siglip2ImageProcessorPil(patch_size=2, max_num_patches=16, do_rescale=False, do_normalize=False)
        arguments = cut([picture.numpy() for picture in pixel_values], return_tensors="pt", do_resize=False)
    if kind.image_size is not None and config.model_type in ("clip_vision_model", "vit"):
        arguments["interpolate_pos_encoding"] = True
    whole = AutoModel.from_pretrained(encoder, config=config).eval()
    with torch.inference_mode():
        states = whole(**arguments, output_hidden_states=True).hidden_states
    if states[-1].ndim == 4:
        return states[-1].permute(0, 2, 3, 1).reshape(len(pixel_values), kind.tokens, kind.width)
    return states[-1] if states[0].shape != states[-1].shape else states[-2][:, kind.prefix :]


def test_tokens_are_those_of_the_whole_encoder_run_by_transformers(examined):
    _, kind, encoder, found = examined
    config = found.model.config
    assert found.pixel_values.shape == (4, 3, kind.size, kind.size)
    assert found.features.shape == (4, kind.tokens, kind.width)
    assert (config.num_vision_tokens, config.num_prefix_tokens) == (kind.tokens, kind.prefix)
    assert config.num_image_tokens == found.processor.num_image_tokens == kind.tokens
    assert relative(found.features, stock_features(kind, encoder, found.pixel_values)) < RELATIVE
    assert not torch.equal(found.features[0], found.features[1])


def test_it_trains_on_cached_features_and_its_adapter_answers_the_same(examined):
    *_, found = examined
    assert found.cached < RELATIVE
    assert len(found.losses) == 2
    assert all(0 < loss < 20 for loss in found.losses)
    assert found.moved
    assert found.reloaded < RELATIVE
    assert found.generated == 3


def test_what_was_measured_once_is_stored_and_rebuilds_without_a_forward_pass(examined, monkeypatch):
    *_, found = examined
    stored = json.loads((found.adapter / "config.json").read_text())
    assert stored["vision_layout"] == found.model.config.vision_layout
    monkeypatch.setattr(vision_tower, "_MEASURED", {})
    monkeypatch.setattr(vision_tower, "_shapes", lambda *arguments: pytest.fail("measured again"))
    assert VisionQwenConfig.from_pretrained(found.adapter).num_image_tokens == found.model.config.num_image_tokens
    loaded = VisionQwen.from_pretrained(found.full).eval()
    prompt = torch.tensor([found.processor.encode_prompt(PROMPT)])
    with torch.inference_mode():
        logits = loaded(input_ids=prompt, pixel_values=found.pixel_values[:1]).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, found.untrained)


def test_stock_llava_is_written_where_it_gives_the_same_and_refused_elsewhere(examined, tmp_path):
    _, kind, _, found = examined
    assert (not found.export) == kind.is_llava
    if kind.is_llava:
        # It loads what it wrote and compares.
        export_llava(found.adapter, tmp_path / "llava")
    else:
        assert "Stock Llava has no " in found.export
        assert "\n" not in found.export
