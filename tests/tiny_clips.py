"""Tiny CLIPs and SigLIPs with random weights, as checkpoints."""

import torch
from conftest import make_tokenizer
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIDE = 8
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COLORS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")


def save_tiny(folder, kind="clip", dtype=torch.float32):
    """A checkpoint with random weights: 8 px pictures, 24 tokens of text, 2 layers a tower."""
    torch.manual_seed(1)
    text = {**TOWER, "vocab_size": 260, "max_position_embeddings": 24, "bos_token_id": 257, "eos_token_id": 258}
    text |= {"pad_token_id": 256}
    vision = {**TOWER, "image_size": SIDE, "patch_size": 2}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    else:
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
