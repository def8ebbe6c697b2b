"""A trainer of transformers with adapter folders for checkpoints, without TRL."""

import pytest
import torch
from conftest import make_processor
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPModel, TrainingArguments

from vlm_peft import VisionQwen
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.training.adapter_trainer import AdapterTrainer

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
TEXTS = [["a dog", "two dogs"], ["a cat"], ["one horse", "a horse"], ["b", "cc"]]


@pytest.fixture
def make(bases):
    """A trainer of four steps on two of four rows each; `start` is LoRA's."""

    def make(folder, start=True, **options) -> AdapterTrainer:
        torch.manual_seed(4)
        base = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259)
        base.model.vision_tower.requires_grad_(False)
        processor = make_processor(base.config)
        rows = [
            {**vars(processor.encode_row(PROMPT, texts)), "image_ids": [place]} for place, texts in enumerate(TEXTS)
        ]
        features = torch.randn(len(rows), 16, 16)
        settings = TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return AdapterTrainer(
            get_peft_model(base, lora_config(base, r=4, init_lora_weights=start)),
            settings,
            train_dataset=Dataset.from_list(rows),
            data_collator=SharedPrefixCollator(256, lambda ids: {"image_features": features[ids]}),
            processing_class=processor,
            extra_files={"note.txt": "mine"},
            **options,
        )

    return make


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("start", "tolerance"), [(True, 0.0), ("pissa", 1e-4)])
def test_a_plain_trainer_saves_adapter_folders_and_goes_on_from_them(make, tmp_path, capsys, start, tolerance):
    whole = make(tmp_path / "whole", start)
    whole.train()
    # A loss of its own, which falls, and lines instead of dictionaries.
    assert losses(whole)[-1] < losses(whole)[0]
    assert "step 4/4  epoch 2.00  loss" in capsys.readouterr().out
    saved = tmp_path / "whole" / "checkpoint-4"
    assert (saved / "note.txt").read_text() == "mine"
    assert not (saved / "training_args.bin").exists()

    batch = whole.data_collator([whole.train_dataset[0]])
    batch = {name: value for name, value in batch.items() if "labels" not in name}
    with torch.inference_mode():
        expected = whole.model.eval()(**batch).logits
        found = VisionQwen.from_adapter(saved)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)

    resumed = make(tmp_path / "resumed", start)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=tolerance)
    after = load_file(tmp_path / "resumed" / "checkpoint-4" / "adapter_model.safetensors")
    for name, value in load_file(saved / "adapter_model.safetensors").items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=tolerance, msg=name)


def test_scores_and_a_rate_of_its_own_need_no_trl(make, tmp_path):
    trainer = make(tmp_path, projector_learning_rate=0.5, score=lambda model: {"CIDEr": 1.5})
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {1e-2, 0.5}
    assert trainer.evaluate(trainer.train_dataset)["eval_CIDEr"] == 1.5
    with pytest.raises(ValueError, match=r"The loss is nan at step 0: lower --learning_rate"):
        trainer.log({"loss": float("nan")})


def test_another_model_is_saved_with_its_configuration(bases, tmp_path):
    def adapted():
        clip = CLIPModel.from_pretrained(bases[0])
        return get_peft_model(clip, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))

    settings = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    AdapterTrainer(adapted(), settings).save_model()
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(bases[0]), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert all(torch.equal(saved[name], value) for name, value in get_peft_model_state_dict(model).items())
    assert AutoConfig.from_pretrained(tmp_path).model_type == "clip"
