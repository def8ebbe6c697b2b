"""The local `evaluate` module `coco_caption`, a wrapper around `vlm_peft.metrics.captions`."""
