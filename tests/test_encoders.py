"""Encoders of every kind: the tokens that they give, the size of their pictures, and the projectors that fit them."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_config, save_bases
from peft import get_peft_model
from tiny_encoders import ENCODERS, PROMPT, TinyEncoder, examine, relative, save_encoder
from transformers import (
    Aimv2VisionConfig,
    AutoConfig,
    AutoModel,
    BertConfig,
    MobileViTConfig,
    PixtralVisionConfig,
    PvtConfig,
    ResNetConfig,
    SamVisionConfig,
    ViTConfig,
    YolosConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlm_peft import VisionQwen, VisionQwenConfig, VisionQwenProcessor
from vlm_peft.adapters.export import check_llava, export_llava
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.feature_cache import encoder_key
from vlm_peft.model import joining, projector, vision_tower
from vlm_peft.model.projector import LinearProjector, PoolingProjector, ProjectorSettings, ResamplerProjector
from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.checkpoints import run_record
from vlm_peft.training.options import check_ranges
from vlm_peft.training.setup import load_model, load_processor

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
    monkeypatch.setattr(vision_tower, "_run_on_meta", lambda *arguments: pytest.fail("measured again"))
    assert VisionQwenConfig.from_pretrained(found.adapter).num_image_tokens == found.model.config.num_image_tokens
    loaded = VisionQwen.from_pretrained(found.full).eval()
    prompt = torch.tensor([found.processor.encode_prompt(PROMPT)])
    with torch.inference_mode():
        logits = loaded(input_ids=prompt, pixel_values=found.pixel_values[:1]).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, found.untrained)


def test_an_adapter_is_rebuilt_without_a_forward_pass(encoder, decoder, tmp_path, monkeypatch):
    adapted = get_peft_model(model := VisionQwen.from_vision_text_pretrained(encoder, decoder), lora_config(model, r=4))
    adapted.save_pretrained(tmp_path)
    save_composite_config(adapted, tmp_path)
    monkeypatch.setattr(vision_tower, "_MEASURED", {})
    monkeypatch.setattr(vision_tower, "_run_on_meta", lambda *arguments: pytest.fail("measured again"))
    monkeypatch.setattr(joining, "check_places", lambda *arguments, **named: pytest.fail("run again"))
    assert VisionQwen.from_adapter(tmp_path).config.vision_layout == model.config.vision_layout


def test_stock_llava_is_written_where_it_gives_the_same_and_refused_elsewhere(examined, tmp_path):
    _, kind, _, found = examined
    assert (not found.export) == kind.is_llava
    if kind.is_llava:
        # It loads what it wrote and compares.
        export_llava(found.adapter, tmp_path / "llava")
    else:
        assert "Stock Llava has no " in found.export
        assert "\n" not in found.export


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A SigLIP with 4 x 4 patches."""
    return save_encoder(ENCODERS["SigLIP"](), tmp_path_factory.mktemp("siglip") / "encoder")


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {"image_size": 8, "patch_size": 2}
STAGES = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def joined(config, **fields) -> VisionQwenConfig:
    return make_config(vision_config=config.to_dict(), **fields)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (BertConfig(**SMALL), {}, "bert cannot be joined with pictures of 224 x 224 pixels: it takes input_ids"),
        (PixtralVisionConfig(**SMALL, **PATCHES), {}, "the tokens of several pictures as one sequence"),
        (
            SamVisionConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                output_channels=8,
                global_attn_indexes=[1],
            ),
            {},
            r"maps of 4 x 16 places for pictures of 32 x 32 pixels: their shape must be \(pictures, width, rows",
        ),
        (PvtConfig(image_size=32), {}, "pvt says no patch_size: which of its 2 tokens are patches"),
        (Qwen2VLVisionConfig(depth=1), {}, "AutoModel does not build this part of a model alone"),
        (
            STAGES,
            {"vision_feature_layer": [-1, 0], "image_size": 32},
            "maps of 4 x 4 and 8 x 8 tokens: select those of one",
        ),
        (STAGES, {"vision_feature_layer": 3}, "select from 3 hidden states, -3 to 2, got 3"),
        (ViTConfig(**SMALL, **PATCHES), {"image_size": 9}, "a multiple of 2 pixels, such as 8 or 10, got 9"),
        (
            Aimv2VisionConfig(**SMALL, **PATCHES),
            {"image_size": 12},
            r"aimv2_vision_model \(built for 8 x 8\) cannot be joined with pictures of 12 x 12 pixels: ",
        ),
        (MobileViTConfig(), {"image_size": 0}, "cannot be joined with pictures of 0 x 0 pixels"),
    ],
)
def test_what_gives_no_tokens_of_these_pictures_is_refused_in_one_line(config, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        joined(config, **fields)
    assert "\n" not in str(caught.value)


def test_pixels_that_fill_no_patch_count_no_token():
    """SigLIP-SO400M has patches of 14 pixels in pictures of 384."""
    model = VisionQwen(joined(ViTConfig(**SMALL, image_size=9, patch_size=2))).eval()
    assert model.config.grid == (4, 4)
    assert model.model.get_vision_features(torch.randn(1, 3, 9, 9)).shape == (1, 16, 16)


def test_tokens_in_another_order_are_refused_when_the_encoder_is_joined(decoder, tmp_path):
    """YOLOS puts its detection tokens behind the patches, where counting alone sees as many tokens in front."""
    config = YolosConfig(**SMALL, image_size=[8, 8], patch_size=2, num_detection_tokens=5)
    kind = TinyEncoder(config, ViTImageProcessorPil(size={"height": 8, "width": 8}), 16)
    with pytest.raises(
        ValueError,
        match=r"yolos does not give its patches row by row behind .* of the first row is number 4, expected 9",
    ):
        VisionQwen.from_vision_text_pretrained(save_encoder(kind, tmp_path / "yolos"), decoder)


def test_a_tower_whose_tokens_are_not_the_stored_ones_is_refused(encoder, decoder):
    model = VisionQwen.from_vision_text_pretrained(encoder, decoder)
    model.config.vision_layout["grid"] = [4, 5]
    with pytest.raises(ValueError, match=r"\(images, 20 tokens, 16\), got \(2, 16, 16\)"):
        model.get_image_features(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("layer", "grid", "width"), [(None, 4, 16), (-1, 4, 16), (1, 8, 8), ([0, 1], 8, 16)])
def test_layers_of_a_convolutional_net_are_its_stages(layer, grid, width):
    model = VisionQwen(joined(STAGES, vision_feature_layer=layer, image_size=32)).eval()
    pictures = torch.randn(2, 3, 32, 32)
    features = model.model.get_vision_features(pictures)
    assert features.shape == (2, grid * grid, width)
    states = model.model.vision_tower(pictures, output_hidden_states=True).hidden_states
    chosen = [-1] if layer is None else [layer] if isinstance(layer, int) else layer
    expected = torch.cat([states[index].flatten(2).transpose(1, 2) for index in chosen], dim=-1)
    assert torch.equal(features, expected)


def test_batch_norm_of_a_training_encoder_does_not_mix_pictures():
    model = VisionQwen(joined(STAGES, image_size=32)).train()
    pictures = torch.randn(4, 3, 32, 32)
    together = model.model.get_vision_features(pictures)
    alone = torch.cat([model.model.get_vision_features(picture[None]) for picture in pictures])
    assert relative(alone, together) < RELATIVE
    together.sum().backward()
    assert next(model.model.vision_tower.parameters()).grad is not None


def test_another_picture_size_is_another_entry_of_the_feature_cache():
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    model = VisionQwen(joined(ViTConfig(**SMALL, **PATCHES)))
    key = encoder_key(model, processor, "float16")
    model.config.image_size = 8
    assert encoder_key(model, processor, "float16") != key


def test_an_image_processor_that_cannot_make_the_pictures_is_refused(encoder, decoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "encoder")
    fixed = ViTImageProcessorPil(size={"height": 12, "width": 12}, do_resize=False)
    fixed.save_pretrained(tmp_path / "encoder")
    config = make_config(vision_config=AutoConfig.from_pretrained(encoder).to_dict())
    with pytest.raises(
        ValueError, match="pictures of 8 x 8 pixels, and its ViTImageProcessorPil cannot be set to make"
    ):
        VisionQwenProcessor.from_vision_text_pretrained(tmp_path / "encoder", decoder, config)


PROJECTORS = {
    "pixel shuffle": {"pixel_shuffle_factor": 2},
    "average pool": {"projector_type": "average_pool", "pooled_grid": [2, 2]},
    "average pool that does not divide": {"projector_type": "average_pool", "pooled_grid": [3, 1]},
    "resampler": {"projector_type": "resampler", "num_image_queries": 5},
    "resampler of two layers": {
        "projector_type": "resampler",
        "num_image_queries": 1,
        "num_resampler_layers": 2,
        "projector_layer_norm": True,
    },
}
COUNTS = {"pixel shuffle": 4, "average pool": 4, "average pool that does not divide": 3, "resampler": 5}


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_projector_counts_trains_and_is_saved(name, encoder, decoder, tmp_path):
    found = examine(encoder, decoder, tmp_path, **PROJECTORS[name])
    tokens = found.model.get_image_features(found.pixel_values).pooler_output
    assert tokens.shape == (4, COUNTS.get(name, 1), 16)
    assert found.processor.num_image_tokens == tokens.shape[1]
    assert found.moved
    assert found.reloaded < RELATIVE
    loaded = VisionQwen.from_pretrained(found.full).eval()
    prompt = torch.tensor([found.processor.encode_prompt(PROMPT)])
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=prompt, pixel_values=found.pixel_values[:1]).logits, found.untrained)
    assert "projector_type" in found.export or "pixel_shuffle_factor" in found.export


@pytest.mark.parametrize(
    "fields", [*PROJECTORS.values(), {"projector_type": "resampler", "num_image_queries": 3, "keep_class_token": True}]
)
def test_the_gradient_reaches_every_weight_of_a_projector(fields):
    model = VisionQwen(joined(ViTConfig(**SMALL, image_size=[8, 12], patch_size=2), **fields))
    projector = model.model.multi_modal_projector
    projector.start(std=0.2)
    rows = [[1, *[259] * model.config.num_image_tokens, 5, 7 + place] for place in range(2)]
    ids = torch.tensor(rows)
    model(
        input_ids=ids, labels=ids.masked_fill(ids == 259, -100), pixel_values=torch.randn(2, 3, 8, 12)
    ).loss.backward()
    assert not [name for name, weight in projector.named_parameters() if not weight.grad.abs().sum() > 0]


def test_a_projector_starts_from_its_decoders_scale():
    model = VisionQwen(make_config(projector_type="resampler", num_image_queries=8))
    projector = model.model.multi_modal_projector
    for name, parameter in projector.named_parameters():
        if "norm" not in name:
            parameter.data.fill_(7)
    projector.start(std=0.3)
    for name, parameter in projector.named_parameters():
        if parameter.ndim > 1:
            assert parameter.detach().std() == pytest.approx(0.3, rel=0.3)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name)))


def test_cells_of_a_grid_that_is_not_square_are_averaged():
    model = VisionQwen(
        joined(ViTConfig(**SMALL, image_size=[8, 12], patch_size=2), projector_type="average_pool", pooled_grid=[2, 4])
    )
    features = torch.randn(2, 4 * 6, 16)
    maps = features.reshape(2, 4, 6, 16)
    # Six columns in four cells: 0-1, 1-2, 3-4, 4-5.
    expected = [
        maps[:, rows : rows + 2, columns : columns + 2].mean(dim=(1, 2)) for rows in (0, 2) for columns in (0, 1, 3, 4)
    ]
    pooled = model.model.multi_modal_projector.regroup(features)
    assert relative(pooled, torch.stack(expected, dim=1)) < RELATIVE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_type": "resampler"}, "needs num_image_queries, .* got None and 1"),
        ({"projector_type": "resampler", "num_image_queries": 0}, "at least 1, got 0 and 1"),
        ({"projector_type": "average_pool"}, "rows and columns of at most 4 x 4 patches, got None"),
        ({"projector_type": "average_pool", "pooled_grid": [5, 1]}, r"at most 4 x 4 patches, got \[5, 1\]"),
        (
            {"projector_type": "average_pool", "pooled_grid": [2, 2], "keep_class_token": True},
            "cannot hold the class token",
        ),
        ({"num_image_queries": 4}, "num_image_queries=4 does nothing with projector_type='mlp'"),
        (
            {"projector_type": "resampler", "num_image_queries": 4, "pixel_shuffle_factor": 2},
            "pixel_shuffle_factor=2 does nothing with projector_type='resampler'",
        ),
        (
            {"projector_type": "linear", "pooled_grid": [2, 2]},
            "pooled_grid=.* does nothing with projector_type='linear'",
        ),
        ({"num_resampler_layers": 2}, "num_resampler_layers=2 does nothing"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_config(**fields)
    assert "\n" not in str(caught.value)


def test_a_projectors_settings_are_written_once():
    """Options, the saved configuration, their ranges and the record of a run follow from [`ProjectorSettings`]."""
    of_kinds = {name for kind in (PoolingProjector, ResamplerProjector) for name in kind.settings}
    own = of_kinds - set(LinearProjector.settings)
    package = Path(projector.__file__).parents[1]
    naming = [path.name for path in package.rglob("*.py") if any(name in path.read_text() for name in own)]
    assert naming == ["projector.py"]
    assert own == {"pooled_grid", "num_image_queries", "num_resampler_layers"}
    assert own < make_config().joint_fields.keys()
    with pytest.raises(ValueError, match="num_resampler_layers is 0, expected at least 1"):
        check_ranges(ProjectorSettings(num_resampler_layers=0))
    with pytest.raises(ValueError, match="'banana', expected one of linear, mlp, average_pool, resampler"):
        make_config(projector_type="banana")


def test_the_recipes_options_reach_the_model(bases):
    vision, text = bases
    options = [
        "--dataset_name",
        "any",
        "--vision_model",
        str(vision),
        "--model_name_or_path",
        str(text),
        "--use_peft",
        "true",
    ]
    options += ["--use_cpu", "true", "--bf16", "false", "--image_size", "12", "--projector_type", "average_pool"]
    options += ["--pooled_grid", "2", "3", "--vision_feature_layer", "-1"]
    vision_arguments, training_arguments, model_arguments = parse_arguments(options)
    assert run_record(vision_arguments, training_arguments, model_arguments)["pooled_grid"] == [2, 3]
    processor, config = load_processor(vision_arguments, model_arguments)
    model, _ = load_model(vision_arguments, model_arguments)
    assert (config.picture_size, config.grid, config.num_image_tokens) == ((12, 12), (6, 6), 6)
    assert processor.num_image_tokens == model.config.num_image_tokens == 6
    assert model.config.vision_feature_layer == -1
    assert make_config(pooled_grid=None).pooled_grid is None, "The parser changed the configuration's fields."
    with pytest.raises(ValueError, match=r"Stock Llava has no projector_type='average_pool' and no image_size=12"):
        check_llava(model.config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("feature_size", 10**25), ("feature_size", True), ("grid", [8]), ("grid", 8), ("grid", [8, 0]), ("layers", None)],
)
def test_a_damaged_layout_is_named(name, value):
    layout = make_config().vision_layout
    layout = {key: each for key, each in layout.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(ValueError, match=rf"vision_layout\.{name}"):
        make_config(vision_layout=layout)
