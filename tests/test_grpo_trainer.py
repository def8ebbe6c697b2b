"""Training for the score: all samples of a question behind one prefix, against TRL's `GRPOTrainer` on each alone."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_processor
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from separate_samples import gradients, largest_difference
from tiny_runs import QUIET
from trl import GRPOConfig, GRPOTrainer

from vlm_peft import VisionQwen
from vlm_peft.adapters.fused_lora import fuse_lora
from vlm_peft.adapters.lora import lora_config
from vlm_peft.data.collator import SharedPrefixCollator
from vlm_peft.evaluation.generation import generate_ids
from vlm_peft.training.grpo_trainer import Asked, VisionGRPOTrainer, prepare_grpo_arguments

RELATIVE = 1e-5
END = 258
QUESTIONS = ["Describe.", "How many dogs are there?", "Say something"]
# Three samples each; of very different lengths, one that never ends, and two that are equal.
SAMPLES = [["a dog", "two dogs on a lawn", "b"], ["two", "two", "a very long text"], ["x", "no end", "yes"]]
PICTURES = [[0], [1], []]
ENDLESS = (2, 1)


def messages(index):
    parts = [{"type": "image"}] * len(PICTURES[index]) + [{"type": "text", "text": QUESTIONS[index]}]
    return [{"role": "user", "content": parts}]


def earned(completions, **columns):
    """Something that differs from text to text."""
    return [len(text) + 0.1 * text.count("o") for text in completions]


def arguments(folder, **settings):
    fixed = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "steps_per_generation": 1,
        "max_completion_length": 20,
        "max_steps": 2,
    }
    return GRPOConfig(**QUIET | fixed | settings)


def build_model():
    torch.manual_seed(3)
    base = VisionQwen(make_config()).eval()
    base.model.vision_tower.requires_grad_(False)
    model = get_peft_model(base, lora_config(base, r=4, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.normal_(std=0.3)
    return model


def pictures():
    generator = torch.Generator().manual_seed(6)
    noise = torch.randint(0, 256, (2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in noise]


def ours(folder, chosen=(0, 1), trainer=None, end="<|im_end|>", **settings):
    model = build_model()
    processor = make_processor(model.get_base_model().config)
    processor.end_of_turn_token = end
    seen = pictures()
    pixels = processor.image_processor(seen, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_base_model().model.get_vision_features(pixels)
    asked = [
        Asked(
            processor.encode_prompt(messages(index)),
            PICTURES[index],
            [[*processor.tokenizer(text)["input_ids"], END] for text in SAMPLES[index]],
        )
        for index in range(len(QUESTIONS))
    ]
    return VisionGRPOTrainer(
        model,
        [earned],
        args=prepare_grpo_arguments(arguments(folder, **settings), model),
        train_dataset=Dataset.from_list([{"prompt": QUESTIONS[index], "row": index} for index in chosen]),
        processing_class=processor,
        asked=asked,
        collator=SharedPrefixCollator(256, lambda ids: {"image_features": features[ids]}, image_token_id=259),
        **(trainer or {}),
    )


def stock(folder, chosen=(0, 1), **settings):
    model = build_model()
    seen = pictures()
    rows = [
        {
            "prompt": [{"role": "user", "content": QUESTIONS[index]}],
            "images": [seen[place] for place in PICTURES[index]],
        }
        for index in chosen
    ]
    return GRPOTrainer(
        model,
        [lambda completions, **columns: earned([each[0]["content"] for each in completions])],
        args=arguments(folder, router_aux_loss_coef=0.0, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_processor(model.get_base_model().config),
    )


def sampled(processor, chosen):
    """Token ids of the samples of some questions, in the order of a batch."""
    return [
        processor.tokenizer(text)["input_ids"] + ([] if (index, place) == ENDLESS else [END])
        for index in chosen
        for place, text in enumerate(SAMPLES[index])
    ]


def scored(trainer, chosen):
    """A batch with given samples, as the trainer scores it, and the loss that it finds."""
    ids = sampled(trainer.processing_class, chosen)
    trainer._generate_single_turn = lambda *_, **__: (ids, None)
    trainer.generate = lambda rows, temperature: ids
    trainer.model.train()
    rows = [trainer.train_dataset[place] for place in range(len(chosen)) for _ in range(3)]
    batch = trainer._generate_and_score_completions(rows)
    found, score = [], trainer._get_per_token_logps_and_entropies

    def kept(*args, **kwargs):
        found.append(score(*args, **kwargs))
        return found[-1]

    trainer._get_per_token_logps_and_entropies = kept
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    return SimpleNamespace(batch=batch, loss=loss, log_probs=found[-1][0], entropies=found[-1][1])


SETTINGS = {
    "GRPO": {},
    "warm": {"temperature": 0.7, "loss_type": "grpo"},
    "KL": {"beta": 0.3, "loss_type": "dr_grpo"},
    "several updates": {"num_iterations": 2, "loss_type": "bnpo"},
    "not scaled, endless masked": {"scale_rewards": "none", "mask_truncated_completions": True},
    "entropy": {"entropy_coef": 0.2, "temperature": 1.3},
}


@pytest.mark.parametrize("chosen", [(0, 1), (2, 2)], ids=["pictures", "text only"])
@pytest.mark.parametrize("name", SETTINGS)
def test_log_probabilities_loss_and_gradients_are_those_of_samples_alone(name, chosen, tmp_path):
    expected_trainer, trainer = (make(tmp_path, chosen, **SETTINGS[name]) for make in (stock, ours))
    if name == "KL":
        for each in (expected_trainer, trainer):
            # Otherwise the start is where the model is, and KL and its gradient are 0.
            with torch.no_grad():
                for parameter in each.model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.2)
    expected, found = scored(expected_trainer, chosen), scored(trainer, chosen)
    for key in ("prompt_ids", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"):
        assert torch.equal(found.batch[key], expected.batch[key]), key
    mask = expected.batch["completion_mask"].bool()
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        assert (key in found.batch) == (key in expected.batch)
        if key in found.batch:
            torch.testing.assert_close(found.batch[key][mask], expected.batch[key][mask], rtol=RELATIVE, atol=1e-5)
    torch.testing.assert_close(found.log_probs[mask], expected.log_probs[mask], rtol=RELATIVE, atol=1e-5)
    torch.testing.assert_close(found.entropies[mask], expected.entropies[mask], rtol=RELATIVE, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=RELATIVE, atol=1e-6)
    theirs = gradients(expected_trainer.model, expected.loss)
    theirs = {name: gradient for name, gradient in theirs.items() if chosen == (0, 1) or "projector" not in name}
    assert largest_difference(gradients(trainer.model, found.loss), theirs) < RELATIVE


def test_samples_are_drawn_with_the_models_own_probabilities_and_nothing_of_it_is_changed(tmp_path):
    trainer = ours(tmp_path)
    fuse_lora(trainer.model)
    trainer.model.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.manual_seed(5)
    drawn = trainer.generate([0, 0, 1, 0, 2, 1], 1.0)
    asked, features = trainer._asked, trainer._collator.fetch_images
    torch.manual_seed(5)
    chosen = [asked[row] for row in (0, 0, 1, 0, 2, 1)]
    expected = generate_ids(
        trainer.model.eval(),
        trainer.processing_class,
        [each.prompt_ids for each in chosen],
        [each.image_ids for each in chosen],
        features,
        max_new_tokens=20,
        temperature=1.0,
    )
    assert drawn == expected
    assert len({tuple(drawn[place]) for place in (0, 1, 3)}) > 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_greedy_is_greedy(tmp_path):
    trainer = ours(tmp_path)
    texts = trainer.generate([1, 1], None)
    assert texts[0] == texts[1]
    prompt = torch.tensor([[*trainer._asked[1].prompt_ids, *texts[0][:-1]]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=prompt, **trainer._collator.fetch_images([1])).logits[0]
    logits[:, 259] = -torch.inf
    assert logits[len(trainer._asked[1].prompt_ids) - 1 :].argmax(-1).tolist() == texts[0]


def test_self_critical_training_compares_with_the_greedy_text_and_scales_nothing(tmp_path):
    trainer = ours(tmp_path, trainer={"baseline": "greedy"}, reward_weights=[0.5])
    ids = sampled(trainer.processing_class, (0, 1))
    greedy = {0: [*trainer.processing_class.tokenizer("ooo")["input_ids"], END], 1: [END]}
    trainer._generate_single_turn = None
    trainer.generate = lambda rows, temperature: [greedy[row] for row in rows] if temperature is None else ids
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[row] for row in (0, 0, 0, 1, 1, 1)])
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    expected = [
        0.5 * (value - than)
        for value, than in zip(earned(texts), [*earned(["ooo"] * 3), *earned([""] * 3)], strict=True)
    ]
    assert batch["advantages"].tolist() == pytest.approx(expected)
    assert trainer._metrics["train"]["reward_greedy"] == [pytest.approx(sum(earned(["ooo", ""])) / 4)]


def test_the_references_loss_is_that_of_supervised_training(tmp_path):
    trainer = ours(tmp_path, trainer={"supervised_coef": 0.3})
    found = scored(trainer, (0, 1))
    alone = scored(ours(tmp_path), (0, 1))
    collator = trainer._collator
    rows = [
        {**vars(trainer.processing_class.encode_row(messages(index), SAMPLES[index])), "image_ids": PICTURES[index]}
        for index in (0, 1)
    ]
    supervised = trainer.model(**collator(rows)).loss
    torch.testing.assert_close(found.loss, alone.loss + 0.3 * supervised, rtol=RELATIVE, atol=1e-6)
    torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=RELATIVE, atol=1e-5)
    expected = gradients(trainer.model, alone_loss := 0.3 * supervised)
    assert alone_loss > 0
    policy = gradients(trainer.model, scored(trainer, (0, 1)).loss - 0)
    plain = ours(tmp_path)
    without = gradients(plain.model, scored(plain, (0, 1)).loss)
    assert largest_difference({name: policy[name] - without[name] for name in expected}, expected) < 1e-3


def test_kl_starts_at_nothing_and_the_start_is_not_saved(tmp_path):
    trainer = ours(tmp_path, beta=0.1, max_steps=1, num_generations=3, per_device_train_batch_size=6)
    trainer.train()
    (kl,) = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl) < 1e-6
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ref").exists()
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_a_reward_that_can_be_had_is_earned_more_often(tmp_path):
    """Learning as a whole: texts that begin with one letter are paid, and soon most do."""

    def begins(completions, **columns):
        return [float(text.startswith(("a", "b", "c", "d"))) for text in completions]

    trainer = ours(
        tmp_path,
        max_steps=40,
        num_generations=16,
        per_device_train_batch_size=32,
        max_completion_length=2,
        scale_rewards="none",
        learning_rate=2e-2,
        lr_scheduler_type="constant",
    )
    trainer.reward_funcs = [begins]
    fuse_lora(trainer.model)
    trainer.train()
    earned = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(earned[-5:]) / 5 > 3 * max(0.05, sum(earned[:2]) / 2)


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.2)])
def test_sampling_that_would_bend_the_gradient_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name} is {value}: samples are drawn with the model's own probabilities"):
        prepare_grpo_arguments(arguments(tmp_path, **{name: value}), build_model())


def test_kl_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"beta is 0\.1: KL is measured from the adapter's start"):
        prepare_grpo_arguments(arguments(tmp_path, beta=0.1), VisionQwen(make_config()))


def test_a_shuffled_batch_knows_of_which_questions_its_samples_are(tmp_path):
    trainer = ours(tmp_path)
    found = scored(trainer, (0, 1))
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    batch = {name: value[order] if value.ndim else value for name, value in found.batch.items()}
    kept, score = [], trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: kept.append(score(*args, **kwargs)) or kept[0]
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(kept[0][0], found.log_probs[order], rtol=RELATIVE, atol=1e-5)
    torch.testing.assert_close(loss, found.loss, rtol=RELATIVE, atol=1e-6)


def test_the_end_of_a_text_is_that_of_the_template(tmp_path):
    """Not the tokenizer's: what ends so is not cut."""
    trainer = ours(tmp_path, end="<|im_start|>", mask_truncated_completions=True)
    trainer.generate = lambda rows, temperature: [[1, 257], [1, 2], [3, 258]] * 2
    trainer.model.train()
    rows = [trainer.train_dataset[row] for row in (0, 0, 0, 1, 1, 1)]
    assert trainer._generate_and_score_completions(rows)["completion_mask"].sum(-1).tolist() == [2, 0, 0] * 2
