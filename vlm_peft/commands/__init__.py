"""What the command `vlm-peft` does, a module each; `vlm_peft/__main__.py` reads its options."""
