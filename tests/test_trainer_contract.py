"""What TRL's `SFTTrainer` must do with this model: the right loss, the right weights moved, the right metrics."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_processor
from datasets import Dataset
from host_reads import HostReads
from peft import get_peft_model
from tiny_runs import quiet_config
from transformers import TrainerCallback
from trl import SFTConfig

from vlm_peft import VisionQwen
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.model import head
from vlm_peft.model.modeling_vision_qwen import VisionQwenModel
from vlm_peft.training.trainer import VisionSFTTrainer, prepare_training_arguments

RELATIVE = 1e-5
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
# Completions of very different lengths: a mean of means would differ from the mean over all labels.
COMPLETIONS = [["a dog", "two dogs on a lawn"], ["a"], ["a very long text about one small dog"], ["b", "cc", "ddd"]]


@pytest.fixture
def setup(bases):
    """A frozen encoder, LoRA and projector, four encoded rows, and a trainer factory."""

    def build(projector_learning_rate=None, **settings):
        base = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259)
        base.model.vision_tower.requires_grad_(False)
        torch.manual_seed(4)
        base.model.multi_modal_projector.linear_1.weight.data.normal_(std=0.3)
        base.model.multi_modal_projector.linear_2.weight.data.normal_(std=0.3)
        model = get_peft_model(base, lora_config(base, r=4))
        processor = make_processor(base.config)
        rows = [
            {**vars(processor.encode_row(PROMPT, texts)), "image_ids": [index]}
            for index, texts in enumerate(COMPLETIONS)
        ]
        features = torch.randn(len(rows), 16, 16)
        collator = SharedPrefixCollator(256, lambda ids: {"image_features": features[ids]}, image_token_id=259)
        arguments = {"per_device_train_batch_size": 4, "max_steps": 3, "lr_scheduler_type": "constant"}
        trainer = VisionSFTTrainer(
            model=model,
            args=prepare_training_arguments(quiet_config(**{**arguments, **settings})),
            train_dataset=Dataset.from_list(rows),
            data_collator=collator,
            processing_class=processor,
            projector_learning_rate=projector_learning_rate,
        )
        return SimpleNamespace(trainer=trainer, model=model, rows=rows, collator=collator)

    return build


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(run) -> list[float]:
    run.trainer.train()
    return history(run.trainer, "loss")


def test_loss_and_metrics_are_the_models_own_at_the_labelled_positions(setup, tmp_path):
    run = setup(output_dir=str(tmp_path), max_steps=1)
    batch = run.collator(run.rows)
    with torch.inference_mode():
        output = run.model(**batch)
    targets = batch["shift_labels"][0]
    log_probabilities = output.logits[0].log_softmax(-1)
    expected = -log_probabilities[torch.arange(len(targets)), targets].mean()
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    accuracy = (output.logits[0].argmax(-1) == targets).float().mean()
    losses = train(run)
    torch.testing.assert_close(float(output.loss), float(expected), rtol=RELATIVE, atol=0)
    # The log rounds to four digits behind the point.
    assert losses[0] == pytest.approx(float(expected), abs=6e-5)
    assert history(run.trainer, "entropy")[0] == pytest.approx(float(entropy), rel=RELATIVE)
    assert history(run.trainer, "mean_token_accuracy")[0] == pytest.approx(float(accuracy), rel=RELATIVE)
    assert history(run.trainer, "num_tokens")[0] == sum(len(row["input_ids"]) for row in run.rows)


def test_projector_and_lora_move_and_nothing_else(setup, tmp_path):
    run = setup(output_dir=str(tmp_path))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    losses = train(run)
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert sum("multi_modal_projector" in name for name in moved) == 4


def test_the_projector_learns_at_its_own_rate_and_nothing_else_does(setup, tmp_path):
    run = setup(output_dir=str(tmp_path), projector_learning_rate=0.5, max_steps=1, weight_decay=0.1)
    train(run)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = run.trainer.optimizer.param_groups
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates == {
        name: 0.5 if "multi_modal_projector" in name else 1e-2
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }
    assert sum(len(group["params"]) for group in groups) == len(rates)
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert all(decay == (0 if name.endswith("bias") else 0.1) for name, decay in decays.items())


def test_trl_finds_the_trunk_that_sees_the_pictures(setup, tmp_path):
    run = setup(output_dir=str(tmp_path))
    assert isinstance(run.model.get_base_model().base_model, VisionQwenModel)


def test_accumulated_batches_equal_one_batch(setup, tmp_path):
    """2 x 2 rows weigh every labelled token as 4 x 1 rows do, though the halves have different counts of labels."""
    whole = setup(output_dir=str(tmp_path / "whole"))
    parts = setup(output_dir=str(tmp_path / "parts"), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    expected, losses = train(whole), train(parts)
    assert losses == pytest.approx(expected, abs=2e-4)
    expected_weights = dict(whole.model.named_parameters())
    for name, parameter in parts.model.named_parameters():
        torch.testing.assert_close(parameter, expected_weights[name], rtol=1e-3, atol=1e-4)
    assert history(parts.trainer, "num_tokens") == history(whole.trainer, "num_tokens")


def test_gradient_checkpointing_changes_nothing(setup, tmp_path):
    plain = train(setup(output_dir=str(tmp_path / "plain")))
    checkpointed = setup(output_dir=str(tmp_path / "checkpointed"), gradient_checkpointing=True)
    assert train(checkpointed) == pytest.approx(plain, abs=1e-4)
    assert checkpointed.model.get_base_model().model.language_model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_trls_own_packing_is_refused(name, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    setattr(args, name, True)
    with pytest.raises(ValueError, match="do not know branches: use --pack_rows"):
        prepare_training_arguments(args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_template_path": "auto"}, "--chat_template_path auto: rows come rendered"),
        ({"eos_token": "{}"}, "--eos_token {}: texts end where"),
    ],
)
def test_another_template_is_refused(tmp_path, given, message):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
    with pytest.raises(ValueError, match=message):
        prepare_training_arguments(args)


def test_every_checkpoint_is_a_complete_adapter_folder(setup, tmp_path):
    run = setup(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    train(run)
    run.trainer.save_model(str(tmp_path / "final"))
    batch = {key: value for key, value in run.collator(run.rows).items() if "labels" not in key}
    with torch.inference_mode():
        first, second, final = [
            VisionQwen.from_adapter(tmp_path / name)(**batch).logits
            for name in ("checkpoint-1", "checkpoint-2", "final")
        ]
        expected = run.model.eval()(**batch).logits
    assert torch.equal(final, expected)
    assert torch.equal(second, expected)
    assert (first - expected).abs().max() > 1e-3


def test_a_step_between_two_logs_waits_for_nothing_on_the_device(setup, monkeypatch):
    run = setup(max_steps=5, logging_steps=5)
    reads = HostReads()

    class Watched(TrainerCallback):
        """From the forward pass to the optimizer's step; the batch is made before, by the host alone."""

        def on_step_begin(self, args, state, control, **kwargs):
            reads.is_on = state.global_step in (2, 3)

        def on_step_end(self, args, state, control, **kwargs):
            reads.is_on = False

    # As on CUDA; a CPU has its own, cheaper way.
    monkeypatch.setattr(head, "_is_argmax", lambda logits, places, is_here: logits.argmax(-1) == places)
    run.trainer.add_callback(Watched())
    with reads:
        run.trainer.train()
    assert reads.found == []
    assert history(run.trainer, "num_tokens")[0] == 5 * sum(len(row["input_ids"]) for row in run.rows)
