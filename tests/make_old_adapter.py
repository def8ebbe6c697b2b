"""Makes an adapter folder with its bases and what it answers, for later versions to load.

    python tests/make_old_adapter.py tests/data/old_adapter

Never run over a folder that is there: a change of the format gets a folder of its own, and the old ones stay.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import make_config, make_processor
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen3ForCausalLM

from vlm_peft import VisionQwen, __version__
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.lora import lora_config

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]


def make(folder: Path) -> None:
    """Writes `adapter/`, `clip/`, `qwen3/`, `expected.safetensors` and `expected.json`."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**make_config().vision_config.to_dict())).save_pretrained(folder / "clip")
    Qwen3ForCausalLM(make_config().text_config).save_pretrained(folder / "qwen3")
    base = VisionQwen.from_vision_text_pretrained(folder / "clip", folder / "qwen3", image_token_id=259)
    adapted = get_peft_model(base, lora_config(base, r=2)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    save_composite_config(adapted, folder / "adapter")
    config = json.loads((folder / "adapter" / "config.json").read_text())
    # Where the bases lay is of no use elsewhere.
    config |= {"vision_name_or_path": "clip", "text_name_or_path": "qwen3"}
    (folder / "adapter" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = make_processor(base.config)
    processor.save_pretrained(folder / "adapter")

    picture = Image.new("RGB", (8, 8), (200, 40, 90))
    text = processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = adapted(**inputs).logits
        generated = adapted.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = generated[0, inputs["input_ids"].shape[1] :].tolist()
    save_file({**inputs, "logits": logits}, folder / "expected.safetensors")
    expected = {"version": __version__, "prompt": PROMPT, "colour": [200, 40, 90], "answer": answer}
    expected["text"] = processor.tokenizer.decode(answer)
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} holds files already: choose a new folder.")
    make(target)
