"""Strategies: for each, an adapter's or a model's life on tiny bases, and options that contradict each other."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import RECIPE, STEPS, load_bases, logits, losses, make_trainer
from transformers import LlavaForConditionalGeneration, TrainerCallback

from vlm_peft import VisionQwen
from vlm_peft import __main__ as command
from vlm_peft.adapters.export import export_llava, export_merged
from vlm_peft.adapters.loading import load_model
from vlm_peft.adapters.lora import check_trainable, trainable_table
from vlm_peft.adapters.strategies import Strategy, apply_strategy, choose_strategy
from vlm_peft.commands import doctor
from vlm_peft.model.cuda.training import can_capture
from vlm_peft.training import sft
from vlm_peft.training.arguments import parse_arguments
from vlm_peft.training.trainer import VisionSFTTrainer

# Name -> what is chosen, and the beginnings of the names of what trains in the bases.
PROJECTOR = ("model.multi_modal_projector",)
TOP = (*PROJECTOR, "model.language_model.layers.1.")
TOWER = (*PROJECTOR, "model.vision_tower.encoder.layers.1.")
DECODER = (*PROJECTOR, "model.language_model.", "lm_head.")
CASES = {
    "projector": (choose_strategy("projector"), PROJECTOR),
    "attention_lora": (choose_strategy("attention_lora"), PROJECTOR),
    "top_layers": (choose_strategy("top_layers", top_layers=1), TOP),
    "lora beside vision_layers": (choose_strategy("lora", vision_layers=1), TOWER),
    "projector beside lora_vision": (choose_strategy("projector", lora_vision=True), PROJECTOR),
    "full beside vision_layers": (choose_strategy("full", vision_layers=1), (*DECODER, TOWER[1])),
}


class StopAtStep(TrainerCallback):
    """Ends a run after a step, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer_of(folder: Path, bases, strategy: Strategy, callbacks=(), trainer=None, **settings) -> VisionSFTTrainer:
    model = load_bases(bases)
    config = apply_strategy(model, strategy, r=4)
    images = "pixel_values" if strategy.encoder_trains else "image_features"
    built = make_trainer(folder, model, None, callbacks, trainer, images=images, peft_config=config, **settings)
    return built


@dataclass
class Life:
    """Of one strategy: a run, its weights before, and another one that was ended and went on."""

    strategy: Strategy
    begins: tuple[str, ...]
    before: dict[str, torch.Tensor]
    base_logits: torch.Tensor
    whole: VisionSFTTrainer
    resumed: VisionSFTTrainer
    trained_logits: torch.Tensor

    @property
    def folder(self) -> Path:
        return Path(self.whole.args.output_dir)

    def load(self):
        return VisionQwen.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=CASES)
def life(request, bases, tmp_path_factory) -> Life:
    strategy, begins = CASES[request.param]
    tmp = tmp_path_factory.mktemp("life")
    model = load_bases(bases)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    whole = trainer_of(tmp / "whole", bases, strategy)
    whole.train()
    whole.save_model()
    trainer_of(tmp / "ended", bases, strategy, [StopAtStep(4)]).train()
    resumed = trainer_of(tmp / "ended", bases, strategy)
    resumed.train(resume_from_checkpoint=str(tmp / "ended" / "checkpoint-4"))
    return Life(strategy, begins, before, logits(model), whole, resumed, logits(whole.model))


def test_a_run_learns_and_an_ended_one_goes_on_bit_for_bit(life):
    history = losses(life.whole)
    assert history[STEPS] < history[1]
    after = losses(life.resumed)
    assert {step: after[step] for step in (5, 6)} == {step: history[step] for step in (5, 6)}
    trained = dict(life.whole.model.named_parameters())
    assert not [name for name, value in life.resumed.model.named_parameters() if not torch.equal(value, trained[name])]


def test_the_saved_folder_loads_with_equal_logits_also_by_the_commands_door(life):
    assert torch.equal(logits(life.load()), life.trained_logits)
    model, _ = load_model(life.folder)
    assert torch.equal(logits(model), life.trained_logits)
    assert (life.trained_logits - life.base_logits).abs().max() > 1e-2
    early = logits(VisionQwen.from_pretrained(life.folder / "checkpoint-2"))
    assert not torch.equal(early, life.trained_logits)


def test_only_what_the_strategy_names_has_changed(life):
    """In the merged model; LoRA changes the weights that it is on."""
    loaded = life.load()
    adapted = set()
    if isinstance(loaded, PeftModel):
        marked = (name for name, _ in loaded.named_parameters() if ".lora_A." in name)
        adapted = {name.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight" for name in marked}
        loaded = loaded.merge_and_unload()
    in_decoder = {name for name in adapted if ".language_model." in name}
    assert bool(in_decoder) == bool(life.strategy.lora)
    if life.strategy.lora == "attention":
        assert {name.split(".")[-2] for name in in_decoder} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    merged = dict(loaded.named_parameters())
    assert merged.keys() == life.before.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, life.before[name])}
    meant = {name for name in merged if name.startswith(life.begins)} | adapted
    assert changed <= meant
    # Biases of keys have no effect on attention, and so no gradient.
    assert {name for name in meant - changed if not name.endswith("k_proj.bias")} == set()


def test_disabling_an_adapter_restores_the_base_and_merging_equals_it(life):
    loaded = life.load()
    if life.strategy.trains_decoder:
        assert type(loaded) is VisionQwen
        assert not list(life.folder.glob("adapter_*"))
        return
    # The projector was drawn before it was given its start; all else is the base's.
    projector = {name: value for name, value in life.before.items() if name.startswith(PROJECTOR)}
    loaded.get_base_model().model.multi_modal_projector.original_module.load_state_dict(
        {name.removeprefix("model.multi_modal_projector."): value for name, value in projector.items()}
    )
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), life.base_logits)
    merged = logits(VisionQwen.from_adapter(life.folder, merge=True))
    difference = (merged - life.trained_logits).abs().max()
    # Where no LoRA is added, nothing is rounded.
    assert difference <= (1e-5 if life.strategy.lora or life.strategy.lora_vision else 0) * merged.abs().max()


def test_exports_answer_alike(life, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(export_llava(life.folder, tmp_path / "llava"))
    merged = VisionQwen.from_pretrained(export_merged(life.folder, tmp_path / "merged"))
    for exported in (llava, merged):
        torch.testing.assert_close(logits(exported), life.trained_logits, rtol=0, atol=1e-4)


def test_the_table_tells_what_trains(life):
    rows = trainable_table(life.whole.model)
    check_trainable(rows, vision_tower_trains=life.strategy.encoder_trains)
    trained = {row.module: row.trainable for row in rows}
    assert (trained["vision_tower"] > 0) == life.strategy.encoder_trains
    assert (trained["language_model"] > 0) == bool(
        life.strategy.lora or life.strategy.top_layers or life.strategy.trains_decoder
    )
    if not life.strategy.trains_decoder:
        saved = load_file(life.folder / "adapter_model.safetensors")
        assert sum(value.numel() for value in saved.values()) == sum(trained.values())


# --- rates ---


def rates(trainer: VisionSFTTrainer) -> dict[str, float]:
    names = {id(each): name for name, each in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = [(names[id(each)], group["lr"]) for group in groups for each in group["params"]]
    assert len(dict(found)) == len(found) == sum(each.requires_grad for each in trainer.model.parameters())
    return dict(found)


@pytest.mark.parametrize(
    "name", ["lora beside vision_layers", "full beside vision_layers", "projector beside lora_vision"]
)
def test_rates_fall_by_layer_below_the_top_of_each_part(bases, tmp_path, name):
    own = {"projector_learning_rate": 0.5, "vision_learning_rate": 0.25, "layer_decay": 0.1}
    trainer = trainer_of(tmp_path, bases, CASES[name][0], trainer=own, weight_decay=0.1)

    def expected(parameter: str) -> float:
        if "multi_modal_projector" in parameter:
            return 0.5
        rate = 0.25 if "vision_tower" in parameter else 1e-2
        below = 2 if "embed_tokens" in parameter else 1 if ".layers.0." in parameter else 0
        return rate * 0.1**below

    found = rates(trainer)
    assert found == pytest.approx({parameter: expected(parameter) for parameter in found})
    assert any(expected(parameter) in (1e-3, 1e-4, 0.025) for parameter in found) or "lora_vision" not in name


class Weights(TrainerCallback):
    """Keeps the trained weights after every step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: each.detach().clone() for name, each in model.named_parameters()})


def test_layers_are_unfrozen_one_by_one_from_the_top_in_fixed_groups(bases, tmp_path):
    strategy, watch = CASES["full beside vision_layers"][0], Weights()
    trainer = trainer_of(tmp_path, bases, strategy, [watch], {"unfreeze_steps": 2}, max_steps=8)
    watch.steps.append({name: each.detach().clone() for name, each in trainer.model.named_parameters()})
    trainer.train()
    starts = {}
    for name in watch.steps[0]:
        pairs = zip(watch.steps, watch.steps[1:], strict=False)
        moved = [step for step, (before, after) in enumerate(pairs) if not torch.equal(before[name], after[name])]
        starts[name] = moved[0] if moved else None

    def of(part: str) -> set:
        return {start for name, start in starts.items() if part in name and not name.endswith("k_proj.bias")}

    # The rate of step 0 is that of its end: the schedule has no warm-up.
    assert of("multi_modal_projector") == of("language_model.layers.1.") == of("language_model.norm") == {0}
    assert of("language_model.layers.0.") == {2}
    assert of("embed_tokens") == {4}
    assert of("encoder.layers.1.") == {6}
    assert of("encoder.layers.0.") == {None}


def test_unfreezing_goes_on_where_it_was(bases, tmp_path):
    strategy, options = CASES["top_layers"][0], {"unfreeze_steps": 5, "layer_decay": 0.5}
    whole = trainer_of(tmp_path / "whole", bases, strategy, trainer=options)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", bases, strategy, trainer=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    trained = dict(whole.model.named_parameters())
    assert not [name for name, value in resumed.model.named_parameters() if not torch.equal(value, trained[name])]


# --- what contradicts itself ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"is_quantized": True}, "--strategy full trains the decoder's own weights, and quantized ones cannot"),
        ("scratch", {"is_quantized": True}, "--strategy scratch trains the decoder's own weights"),
        ("top_layers", {"is_quantized": True}, "leave --load_in_4bit and --load_in_8bit out"),
        ("lora", {"top_layers": 2}, "--top_layers 2 belongs to --strategy top_layers, got --strategy lora"),
        ("full", {"lora_vision": True}, "--lora_vision adapts the encoder, and --strategy full saves or trains it"),
        ("lora", {"lora_vision": True, "vision_layers": 1}, "--strategy lora with --vision_layers"),
        ("attention_lora", {"target_modules": ["up_proj"]}, "chooses LoRA's layers by itself, got .*up_proj"),
        ("projector", {"loraplus": True}, "--loraplus_lr_ratio is of LoRA, and --strategy projector trains none"),
    ],
)
def test_options_that_contradict_each_other_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        choose_strategy(name, **options)


def test_more_layers_than_there_are_is_named(model):
    with pytest.raises(ValueError, match="--top_layers 3: the decoder has 2 layers"):
        apply_strategy(model, choose_strategy("top_layers", top_layers=3))
    with pytest.raises(ValueError, match="--vision_layers 3: the encoder has 2 layers that are run"):
        apply_strategy(model, choose_strategy("full", vision_layers=3))


def test_quantized_bases_may_have_their_encoder_trained():
    assert choose_strategy("lora", vision_layers=1, is_quantized=True).encoder_trains


# --- the recipe ---


OPTIONS = f"{RECIPE}max_steps: 4\n"


@pytest.fixture(scope="module")
def options(bases, flickr, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("options")
    (folder / "config.yaml").write_text(OPTIONS)
    named = ["--dataset_name", str(flickr), "--vision_model", str(bases[0]), "--model_name_or_path", str(bases[1])]
    return ["--config", str(folder / "config.yaml"), *named, "--feature_cache_dir", str(folder / "features")]


def test_a_decoder_from_scratch_is_trained_saved_whole_resumed_and_asked(options, bases, tmp_path, capsys):
    chosen = [*options, "--strategy", "scratch", "--vision_layers", "1", "--bf16", "true"]
    assert sft.main([*chosen, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "The encoder trains (its last layers): its features change" in said
    assert "reloaded, its logits are equal." in said
    assert f"model    {tmp_path / 'run'}" in said
    model, _ = load_model(tmp_path / "run")
    base = VisionQwen.from_vision_text_pretrained(*bases).model.language_model.layers[0].mlp.up_proj.weight
    assert (model.model.language_model.layers[0].mlp.up_proj.weight - base).abs().mean() > 0.1
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert (summary["strategy"], summary["trains"]) == (
        "scratch",
        "decoder from scratch, last 1 layers of the encoder and projector",
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A model (decoder from scratch, last 1 layers of the encoder and projector, " in card
    assert "VisionQwen.from_pretrained(" in card
    # A longer run goes on from it, under the same name.
    resume = ["--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "run")]
    assert sft.main([*chosen, *resume]) == 0
    assert "Trained to step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run \(strategy: scratch there, full here"):
        sft.main([*options, "--strategy", "full", *resume])
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    assert command.main(["caption", str(tmp_path / "run"), str(picture)]) == 0


def test_a_full_save_takes_the_place_of_an_adapter(options, tmp_path):
    chosen = [*options, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_strategy", "no"]
    assert sft.main([*chosen, "--strategy", "projector"]) == 0
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert sft.main([*chosen, "--strategy", "full"]) == 0
    assert not list((tmp_path / "run").glob("adapter_*"))
    assert type(load_model(tmp_path / "run")[0]) is VisionQwen
    assert sft.main([*chosen, "--strategy", "top_layers", "--top_layers", "1"]) == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert isinstance(load_model(tmp_path / "run")[0], PeftModel)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--strategy", "full", "--load_in_4bit"], "--strategy full trains the decoder's own weights"),
        (["--strategy", "top_layers", "--dtype", "bfloat16"], "--dtype bfloat16: the layers .* must be in float32"),
        (["--strategy", "full", "--push_to_hub"], "what is pushed is an adapter folder"),
        (
            ["--unfreeze_steps", "2", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"],
            "needs a schedule that is known beforehand",
        ),
        (["--top_layers", "0"], "top_layers is 0, expected at least 1"),
        (["--lora_target_modules", "("], r"--lora_target_modules \(: expected names of layers, or a"),
        # As many as YAML makes of 1e308; and more than a float holds.
        (
            ["--gradient_accumulation_steps", f"{10**308}"],
            "gradient_accumulation_steps is .* 1024 bits, expected 63 at",
        ),
        (["--save_steps", f"{10**309}"], "steps is infinite, expected finite --logging_steps"),
        (["--lora_modules_to_save", "lm_head", "[1"], r"--lora_modules_to_save \[1: expected names of layers"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(options, tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        parse_arguments([*options, "--output_dir", str(tmp_path), *given])


def test_the_doctor_knows_what_is_saved(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "TRIAL_STEPS", 1)
    monkeypatch.setattr(doctor, "WARM_UP", 1)
    status = doctor.main([*options, "--output_dir", str(tmp_path), "--strategy", "full", "--vision_layers", "1"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "no feature cache: pictures are encoded in every step" in said
    total = int(re.search(r"^total +([\d,]+)", said, re.M)[1].replace(",", ""))
    assert f"  model file: {4 * total / 1e6:.2f} MB" in said


def test_an_embedding_that_trains_keeps_steps_from_being_captured(model):
    """CUDA graphs of the decoder begin behind the embedding."""
    training: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), gradient_accumulation_steps=1, world_size=1, gradient_checkpointing=False
    )
    apply_strategy(model, choose_strategy("full"))
    assert not can_capture(model, training)
    model.requires_grad_(False)
    adapted = get_peft_model(model, apply_strategy(model, choose_strategy("top_layers", top_layers=1)))
    assert can_capture(adapted, training)


def test_the_head_trains_with_the_last_layers_when_asked(bases, tmp_path):
    """Beside a tied embedding, which stays as it is."""
    model = load_bases(bases)
    embedding = model.get_input_embeddings().weight.detach().clone()
    config = apply_strategy(model, choose_strategy("top_layers", top_layers=1), modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, model, None, peft_config=config, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    loaded = VisionQwen.from_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert not torch.equal(loaded.get_output_embeddings().weight, embedding)
