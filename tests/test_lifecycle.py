"""An adapter's life, for each kind: trained, killed, resumed, saved, loaded, merged, exported, pushed and pulled.

Runs are real ones of `VisionSFTTrainer` on tiny bases, six steps long with a checkpoint every two.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_client import Worker
from hub_server import OWNER, serve
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import (
    NF4,
    STEPS,
    VARIANTS,
    batch,
    load_bases,
    loading,
    logits,
    losses,
    make_trainer,
    wide_config,
)
from transformers import (
    LlavaForConditionalGeneration,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.export import export_llava, export_merged
from vlm_peft.training.trainer import VisionSFTTrainer


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class KillAfterStep5(TrainerCallback):
    """The process is gone in the middle of a run, as when the machine is: no handler, no flush."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder: Path, model: VisionQwen, lora: dict) -> None:
    """Trains in a process of its own, which does not survive step 5."""
    child = os.fork()
    if child == 0:
        try:
            make_trainer(folder, model, lora, [KillAfterStep5()]).train()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@dataclass
class Life:
    """Of one variant: the uninterrupted run and the one that was killed and went on."""

    variant: str
    whole: VisionSFTTrainer
    resumed: VisionSFTTrainer
    trained_logits: torch.Tensor

    @property
    def folder(self) -> Path:
        """The saved adapter."""
        return Path(self.whole.args.output_dir)

    def load(self, **arguments) -> PeftModel | VisionQwen:
        return VisionQwen.from_adapter(self.folder, **{**loading(self.variant), **arguments})


@pytest.fixture(scope="module")
def lives(wide_bases, tmp_path_factory) -> dict[str, Life]:
    tmp, found = tmp_path_factory.mktemp("lives"), {}
    for variant, lora in VARIANTS.items():

        def base(variant: str = variant) -> VisionQwen:
            return load_bases(wide_bases, **loading(variant))

        whole = make_trainer(tmp / variant, base(), lora)
        whole.train()
        whole.save_model()
        train_and_die(tmp / f"{variant}-killed", base(), lora)
        resumed = make_trainer(tmp / f"{variant}-killed", base(), lora)
        resumed.train(resume_from_checkpoint=True)
        found[variant] = Life(variant, whole, resumed, logits(whole.model))
    return found


@pytest.fixture(scope="module")
def hub(wide_bases, tmp_path_factory):
    """Calls functions of `vlm_peft.hub` in a process that knows a server on loopback, which has the bases."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "home").mkdir()
    with serve() as server:
        for name, base in zip(("tiny/clip", "tiny/qwen3"), wide_bases, strict=True):
            server.add(name, {path.name: path.read_bytes() for path in base.iterdir()})
        worker = Worker(server, folder)
        yield worker
        worker.close()


@pytest.fixture(params=VARIANTS)
def life(lives, request) -> Life:
    return lives[request.param]


def test_the_loss_falls(life):
    history = losses(life.whole)
    assert history[STEPS] < history[1]


def test_a_killed_run_goes_on_as_if_it_had_not_been(life):
    """Bit for bit: the same losses, and the same weights at the end."""
    after = losses(life.resumed)
    assert {step: after[step] for step in (5, 6)} == {step: losses(life.whole)[step] for step in (5, 6)}
    trained = dict(life.whole.model.named_parameters())
    differing = [name for name, value in life.resumed.model.named_parameters() if not torch.equal(value, trained[name])]
    assert not differing


def test_every_checkpoint_loads_with_the_logits_of_its_step(life):
    folders = sorted(path.name for path in life.folder.glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    early = logits(VisionQwen.from_adapter(life.folder / "checkpoint-2", **loading(life.variant)))
    last = logits(VisionQwen.from_adapter(life.folder / "checkpoint-6", **loading(life.variant)))
    assert torch.equal(last, logits(life.load()))
    assert not torch.equal(early, last)


def test_loaded_in_fresh_process_equals_trained(lives, tmp_path):
    """One process for all variants. PiSSA is trained on a base without its start: its logits differ by rounding."""
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from transformers import BitsAndBytesConfig\n"
        "from vlm_peft import VisionQwen\n"
        "batch, found = torch.load('batch.pt'), {}\n"
        "for variant, (folder, quantization) in torch.load('folders.pt').items():\n"
        "    config = BitsAndBytesConfig(**quantization) if quantization else None\n"
        "    with torch.inference_mode():\n"
        "        found[variant] = VisionQwen.from_adapter(folder, quantization_config=config)(**batch).logits\n"
        "torch.save(found, 'logits.pt')\n"
    )
    folders = {name: (str(life.folder), NF4 if name == "qlora" else {}) for name, life in lives.items()}
    torch.save(folders, tmp_path / "folders.pt")
    torch.save(batch(), tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "logits.pt")
    assert_close(found.pop("pissa"), lives["pissa"].trained_logits, 1e-5)
    assert set(found) == {"lora", "dora", "qlora"}
    assert all(torch.equal(loaded, lives[variant].trained_logits) for variant, loaded in found.items())


def test_the_adapter_changes_the_output_and_disabling_it_restores_the_base_bit_for_bit(life, wide_bases):
    adapted = life.load()
    base = load_bases(wide_bases, **loading(life.variant))
    fresh = adapted.get_base_model().model.multi_modal_projector.original_module
    base.model.multi_modal_projector.load_state_dict(fresh.state_dict())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(base))
    assert (logits(adapted) - logits(base)).abs().max() > 1e-2


def test_merged_equals_unmerged(life):
    """Into full weights; what merging rounds is relative to the largest logit."""
    full = VisionQwen.from_adapter(life.folder)
    merged = VisionQwen.from_adapter(life.folder, merge=True)
    assert type(merged) is VisionQwen
    assert_close(logits(merged), logits(full), 1e-4 if life.variant == "dora" else 1e-5)


def test_exported_equals_local(life, tmp_path):
    """A stock Llava and a merged folder; adapters of a quantized decoder go into its full weights."""
    local = logits(VisionQwen.from_adapter(life.folder))
    llava = LlavaForConditionalGeneration.from_pretrained(export_llava(life.folder, tmp_path / "llava"))
    merged = VisionQwen.from_pretrained(export_merged(life.folder, tmp_path / "merged"))
    for exported in (llava, merged):
        assert_close(logits(exported), local, 1e-4 if life.variant == "dora" else 1e-5)


def test_pushed_and_pulled_equals_local(life, hub, wide_bases, tmp_path):
    folder = shutil.copytree(life.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / "README.md").write_text("# An adapter\n")
    names = {"vision": "tiny/clip", "text": "tiny/qwen3"}
    assert hub("push_adapter", folder=folder, repo_id=f"me/{life.variant}", token=OWNER, **names)[0] == "ok"
    shutil.rmtree(folder)
    status, pulled = hub("pull_model", repo_id=f"me/{life.variant}")
    assert status == "ok"
    bases = dict(zip(names, wide_bases, strict=True))
    assert torch.equal(logits(VisionQwen.from_adapter(pulled, **bases, **loading(life.variant))), logits(life.load()))


def test_another_base_is_refused(life, wide_bases, tmp_path):
    torch.manual_seed(9)
    Qwen3ForCausalLM(wide_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another text base: expected .*qwen3, got .*other \(the same shape with"):
        life.load(text=tmp_path / "other")
    Qwen3ForCausalLM(wide_config(num_hidden_layers=3, layer_types=None)).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"another text base: .* \(num_hidden_layers: 2 against 3\)"):
        life.load(text=tmp_path / "deeper")


def test_a_pissa_folder_holds_plain_lora_of_twice_the_rank_and_the_projector(lives):
    state = load_file(lives["pissa"].folder / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in state.items() if ".lora_A." in name} == {8}
    assert sum("multi_modal_projector" in name for name in state) == 4
    loaded = lives["pissa"].load().active_peft_config
    assert (loaded.r, loaded.init_lora_weights) == (8, True)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_goes_on_where_other_singular_vectors_were_found(wide_bases, tmp_path, monkeypatch, rslora):
    """Another machine may turn signs around; here, even the smallest ones take the place of the largest."""
    lora = {"init_lora_weights": "pissa", "use_rslora": rslora}
    whole = make_trainer(tmp_path, load_bases(wide_bases), lora)
    whole.train()
    svd = torch.linalg.svd

    def reversed_svd(*args, **kwargs):
        left, values, right = svd(*args, **kwargs)
        return left.flip(1), values.flip(0), right.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", reversed_svd)
    resumed = make_trainer(tmp_path, load_bases(wide_bases), lora)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert_close(logits(resumed.model), logits(whole.model), 1e-5)
    resumed.save_model(tmp_path / "again")
    assert_close(logits(VisionQwen.from_adapter(tmp_path / "again")), logits(whole.model), 1e-5)


@pytest.mark.parametrize("projector_rate", [0.5, None])
def test_loraplus_and_separate_rates_reach_the_right_weights(wide_bases, tmp_path, projector_rate):
    rates = {"projector_learning_rate": projector_rate, "vision_learning_rate": 0.25, "loraplus_lr_ratio": 16.0}
    model = load_bases(wide_bases)
    trainer = make_trainer(tmp_path, model, {"lora_vision": True}, trainer=rates, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)

    def expected(name: str) -> float:
        if "multi_modal_projector" in name:
            return projector_rate or 1e-2
        return (0.25 if "vision_tower" in name else 1e-2) * (16 if "lora_B" in name else 1)

    assert found == pytest.approx({name: expected(name) for name in names.values() if name in found})
    assert {name for name, each in trainer.model.named_parameters() if each.requires_grad} == set(found)


def test_lora_on_the_encoder_learns_is_saved_and_survives_checkpointing_of_activations(wide_bases, tmp_path):
    settings = {"images": "pixel_values", "max_steps": 2, "save_strategy": "no"}
    moved = {}
    for name, checkpointing in (("plain", False), ("recomputed", True)):
        folder = tmp_path / name
        trainer = make_trainer(
            folder, load_bases(wide_bases), {"lora_vision": True}, gradient_checkpointing=checkpointing, **settings
        )
        trainer.train()
        trainer.save_model()
        # B starts at zero.
        weights = {each: value.detach() for each, value in trainer.model.named_parameters() if "lora_B" in each}
        moved[name] = {each: value for each, value in weights.items() if "vision_tower" in each}
        assert all(value.abs().sum() > 0 for value in weights.values())
        assert torch.equal(logits(VisionQwen.from_adapter(folder)), logits(trainer.model))
    assert len(moved["plain"]) == 2 * 6
    for each, value in moved["plain"].items():
        torch.testing.assert_close(moved["recomputed"][each], value, rtol=1e-3, atol=1e-5)


OLD = sorted((Path(__file__).parent / "data").glob("old_adapter*"))


@pytest.mark.parametrize("folder", OLD, ids=[path.name for path in OLD])
def test_an_adapter_of_an_earlier_version_loads_and_answers_as_then(folder):
    """Later versions must go on loading it; see tests/data/make_old_adapter.py."""
    expected = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    model = VisionQwen.from_adapter(folder / "adapter", vision=folder / "clip", text=folder / "qwen3")
    processor = VisionQwenProcessor.from_pretrained(folder / "adapter")
    picture = Image.new("RGB", (8, 8), tuple(expected["colour"]))
    text = processor.apply_chat_template(expected["prompt"], add_generation_prompt=True)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], tensors["input_ids"])
    torch.testing.assert_close(inputs["pixel_values"], tensors["pixel_values"], rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, tensors["logits"], rtol=1e-4, atol=1e-4)
        generated = model.generate(**inputs, max_new_tokens=len(expected["answer"]), do_sample=False)
    answer = generated[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == expected["answer"]
    assert processor.tokenizer.decode(answer) == expected["text"]
