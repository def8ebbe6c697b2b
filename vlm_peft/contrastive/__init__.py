"""CLIP and SigLIP themselves: fine-tuned on pairs, searched and classified with, and given back to the captioner."""
