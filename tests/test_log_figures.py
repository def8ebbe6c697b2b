"""Every figure that a log shows against its plain definition, computed text by text without this package's trainer."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_processor
from datasets import Dataset
from peft import get_peft_model
from tiny_runs import quiet_config
from transformers import TrainerCallback

from vlm_peft import VisionQwen
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.training import trainer as training
from vlm_peft.training.callbacks import log_line

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
# Of very different lengths, and an odd number of rows: means of batches are not means of labels.
TRAINED = [
    ["a dog", "two dogs on a lawn"],
    ["a"],
    ["a very long text about one small dog"],
    ["b", "cc", "ddd"],
    ["x y"],
    ["one horse"],
    ["z", "no"],
]
HELD_OUT = [["a dog"], ["another very long text about two small dogs", "b"], ["c"]]
STEPS, RATE, PROJECTOR_RATE, CLIP, DECAY = 8, 0.05, 0.1, 0.4, 0.1
# Seven rows are four batches of two, the last of one.
BATCH, ACCUMULATED, STEPS_AN_EPOCH = 2, 2, 2


class Clock(TrainerCallback):
    """A step takes a second, an evaluation a hundred and a checkpoint a thousand."""

    def __init__(self):
        self.now = 50_000.0

    def monotonic(self) -> float:
        return self.now

    def on_step_end(self, *arguments, **others):
        self.now += 1

    def on_evaluate(self, *arguments, **others):
        self.now += 100

    def on_save(self, *arguments, **others):
        self.now += 1000


@pytest.fixture
def make(bases, tmp_path, monkeypatch):
    """Trainers of one run, with what they are made of."""
    base = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259)
    processor = make_processor(base.config)
    encoded = [
        {**vars(processor.encode_row(PROMPT, texts)), "image_ids": [number]}
        for number, texts in enumerate([*TRAINED, *HELD_OUT])
    ]
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)
    features = torch.randn(len(encoded), 16, 16, generator=torch.Generator().manual_seed(5))

    def build(**settings):
        made = VisionQwen.from_vision_text_pretrained(*bases, image_token_id=259)
        made.model.vision_tower.requires_grad_(False)
        torch.manual_seed(4)
        for layer in (made.model.multi_modal_projector.linear_1, made.model.multi_modal_projector.linear_2):
            layer.weight.data.normal_(std=0.3)
        model = get_peft_model(made, lora_config(made, r=4))
        collator = SharedPrefixCollator(256, lambda ids: {"image_features": features[ids]}, image_token_id=259)
        batches: list[list[int]] = []

        def collate(rows):
            batches.append([row["image_ids"][0] for row in rows])
            return collator(rows)

        arguments = {
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATED,
            "max_steps": STEPS,
            "learning_rate": RATE,
            "warmup_steps": 2,
            "lr_scheduler_type": "linear",
            "max_grad_norm": CLIP,
            "weight_decay": DECAY,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 3,
            "per_device_eval_batch_size": 2,
            "output_dir": str(tmp_path),
        }
        trainer = training.VisionSFTTrainer(
            model=model,
            args=training.prepare_training_arguments(quiet_config(**{**arguments, **settings})),
            train_dataset=Dataset.from_list(encoded[: len(TRAINED)]),
            eval_dataset=Dataset.from_list(encoded[len(TRAINED) :]),
            data_collator=collate,
            processing_class=processor,
            projector_learning_rate=PROJECTOR_RATE,
            score=lambda model: {"CIDEr": 0.25},
            callbacks=[clock],
        )
        return SimpleNamespace(trainer=trainer, model=model, batches=batches, clock=clock)

    return SimpleNamespace(build=build, processor=processor, encoded=encoded, features=features)


def label_figures(model, made, number) -> torch.Tensor:
    """Labels, entropies, hits and nats of one picture's texts, each a sample of its own, summed."""
    sums = torch.zeros(4)
    for text in [*TRAINED, *HELD_OUT][number]:
        row = made.processor.encode_row(PROMPT, [text])
        labels = torch.tensor(row.shift_labels)
        is_label = labels != -100
        logits = model(
            input_ids=torch.tensor([row.input_ids]), image_features=made.features[number : number + 1]
        ).logits[0][is_label]
        log_probs = logits.log_softmax(-1)
        entropy, hits = -(log_probs.exp() * log_probs).sum(), (logits.argmax(-1) == labels[is_label]).sum()
        nats = -log_probs.gather(1, labels[is_label][:, None]).sum()
        sums = sums + torch.stack([is_label.sum(), entropy, hits, nats])
    return sums


def train_plainly(model, made, batches) -> list[dict]:
    """AdamW, a clipped gradient, a rate that rises for two steps and falls to 0: figures of each step."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    groups = [
        {
            "params": [each],
            "lr": PROJECTOR_RATE if "projector" in name else RATE,
            "weight_decay": 0.0 if name.endswith("bias") else DECAY,
        }
        for name, each in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    top = [group["lr"] for group in groups]
    found, tokens, held_out = [], 0, range(len(TRAINED), len(TRAINED) + len(HELD_OUT))
    for step in range(STEPS):
        first = step // STEPS_AN_EPOCH * 4 + step % STEPS_AN_EPOCH * 2
        rows = [row for batch in batches[first : first + 2] for row in batch]
        factor = step / 2 if step < 2 else (STEPS - step) / (STEPS - 2)
        for group, rate in zip(optimizer.param_groups, top, strict=True):
            group["lr"] = rate * factor
        sums = sum(label_figures(model, made, row) for row in rows)
        loss = sums[3] / sums[0]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)
        optimizer.step()
        tokens += sum(len(made.encoded[row]["input_ids"]) for row in rows)
        with torch.no_grad():
            scored = sum(label_figures(model, made, row) for row in held_out)
        found.append(
            {
                "loss": float(loss.detach()),
                "labels": sums[0].item(),
                "entropy": sums[1].item(),
                "hits": sums[2].item(),
                "norm": float(norm),
                "rate": RATE * factor,
                "tokens": tokens,
                "eval_loss": float(scored[3] / scored[0]),
                "eval_entropy": float(scored[1] / scored[0]),
                "eval_accuracy": float(scored[2] / scored[0]),
            }
        )
    return found


def test_every_figure_of_the_log_is_its_plain_definition(make):
    plain, run = make.build(), make.build()
    run.clock.now += 9_999
    run.trainer.train()
    batches = [batch for batch in run.batches if batch[0] < len(TRAINED)]
    assert [len(batch) for batch in batches[:4]] == [2, 2, 2, 1]
    steps = train_plainly(plain.model.train(), make, batches)
    log = run.trainer.state.log_history
    near = {"rel": 2e-3}

    logged = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    for entry in logged:
        last = entry["step"]
        since = steps[last - 2 : last]
        labels = sum(each["labels"] for each in since)
        assert entry["loss"] == pytest.approx(sum(each["loss"] for each in since) / 2, **near)
        assert entry["entropy"] == pytest.approx(sum(each["entropy"] for each in since) / labels, **near)
        assert entry["mean_token_accuracy"] == pytest.approx(sum(each["hits"] for each in since) / labels, rel=1e-6)
        assert entry["grad_norm"] == pytest.approx(since[-1]["norm"], rel=2e-2)
        assert entry["learning_rate"] == pytest.approx(since[-1]["rate"], rel=1e-6, abs=1e-12)
        assert entry["num_tokens"] == since[-1]["tokens"]
        tokens = since[-1]["tokens"] - (steps[last - 3]["tokens"] if last > 2 else 0)
        # Neither what was before the training nor evaluations and checkpoints.
        assert entry["tokens_per_second"] == round(tokens / 2)
        assert entry["epoch"] == pytest.approx(last / STEPS_AN_EPOCH)
        assert not entry.keys() - {
            "loss",
            "entropy",
            "mean_token_accuracy",
            "grad_norm",
            "learning_rate",
            "num_tokens",
            "tokens_per_second",
            "epoch",
            "step",
        }
    # Means of steps of other lengths would differ.
    since = steps[6:8]
    assert abs(sum(each["hits"] / each["labels"] for each in since) / 2 - logged[3]["mean_token_accuracy"]) > 5e-4

    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6, 8]
    for entry in evaluated:
        then = steps[entry["step"] - 1]
        assert entry["eval_loss"] == pytest.approx(then["eval_loss"], **near)
        assert entry["eval_entropy"] == pytest.approx(then["eval_entropy"], **near)
        assert entry["eval_mean_token_accuracy"] == pytest.approx(then["eval_accuracy"], rel=1e-6)
        assert entry["eval_num_tokens"] == then["tokens"]
        assert entry["eval_CIDEr"] == 0.25
        assert entry["epoch"] == pytest.approx(entry["step"] / STEPS_AN_EPOCH)
        assert entry["eval_samples_per_second"] == pytest.approx(len(HELD_OUT) / entry["eval_runtime"], rel=0.02)
        assert entry["eval_steps_per_second"] == pytest.approx(2 / entry["eval_runtime"], rel=0.02)
        assert f"eval loss {entry['eval_loss']:.4f}" in log_line(entry, run.trainer.state)

    last = log[-1]
    assert last["train_loss"] == pytest.approx(sum(each["loss"] for each in steps) / STEPS, **near)
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(
        STEPS / STEPS_AN_EPOCH * len(TRAINED), rel=0.02
    )
    assert last["train_steps_per_second"] * last["train_runtime"] == pytest.approx(STEPS, rel=0.02)
    padded = sum(len(batch) * max(len(make.encoded[row]["input_ids"]) for row in batch) for batch in batches)
    assert last["total_flos"] == 6 * run.model.num_parameters(exclude_embeddings=True) * padded


def test_a_run_that_goes_on_counts_on(make, tmp_path):
    whole, again = make.build(), make.build()
    whole.trainer.train()
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected, found = (
        {entry["step"]: entry["num_tokens"] for entry in run.trainer.state.log_history if "num_tokens" in entry}
        for run in (whole, again)
    )
    assert found == expected
    (first,) = [entry for entry in again.trainer.state.log_history if entry["step"] == 4 and "loss" in entry]
    # Of the one step since the checkpoint.
    trained = [batch for batch in whole.batches if batch[0] < len(TRAINED)]
    tokens = sum(len(make.encoded[row]["input_ids"]) for batch in trained[6:8] for row in batch)
    assert first["tokens_per_second"] == tokens
