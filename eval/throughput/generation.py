"""Generation on both sides of eval/throughput.py, in a process of each side's own."""

import logging
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from vlm_peft.data.feature_cache import build_feature_cache
from vlm_peft.data.pictures import Pictures, open_picture
from vlm_peft.evaluation.generation import generate_texts
from vlm_peft.tasks import make_task

from .data import INSTRUCTION, Preset, make_config, make_processor
from .sides import PEER, build_model, build_peer_model, build_peer_processor, fetch_from, make_rows

BATCH_SIZE = 64
MAX_NEW_TOKENS = 16
"""A random model never ends a text, so every text has this many tokens: about the length of a caption."""

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]


def run_generation(
    connection: Connection, side: str, preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer
) -> None:
    """Body of a process: answers `(way, pictures, beams)` with `(seconds, texts)` until it gets `None`."""
    try:
        logging.disable(logging.WARNING)
        connection.recv()
        if dtype == "fp32":
            # Texts are compared, so convolutions must not round their inputs to TF32.
            torch.backends.cudnn.allow_tf32 = False
        ways = (_peer_ways if side == PEER else _our_ways)(preset, dtype, folder, paths, tokenizer)
        connection.send(None)
        while (command := connection.recv()) is not None:
            way, count, num_beams = command
            start = time.perf_counter()
            texts = ways[way](list(range(count)), num_beams)
            connection.send((time.perf_counter() - start, texts))
    except Exception:
        connection.send(RuntimeError(f"generation of {side}:\n{traceback.format_exc()}"))


def _our_ways(preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer) -> dict[str, Callable]:
    """`cached`: features come from the cache; `first time`: pictures are decoded and encoded, once each."""
    model = build_model(preset, dtype)
    processor = make_processor(model.config, tokenizer)
    rows = make_rows(paths)
    pictures = Pictures(rows, make_task("caption", rows.column_names).image_columns)
    features = build_feature_cache(model, processor.image_processor, pictures, directory=folder, dtype="float32")

    def way(fetch: Callable) -> Callable:
        def generate(indices: list[int], num_beams: int) -> list[str]:
            return generate_texts(
                model,
                processor,
                [PROMPT] * len(indices),
                [[index] for index in indices],
                fetch,
                batch_size=BATCH_SIZE,
                max_new_tokens=MAX_NEW_TOKENS,
                num_beams=num_beams,
            )

        return generate

    return {
        "cached": way(fetch_from(features, pictures, processor.image_processor)),
        "first time": way(fetch_from(None, pictures, processor.image_processor)),
    }


def _peer_ways(preset: Preset, dtype: str, folder: Path, paths: list[str], tokenizer) -> dict[str, Callable]:
    """`one by one` and `batched`, as the model's documentation shows them."""
    model = build_peer_model(preset, dtype)
    processor = build_peer_processor(make_processor(make_config(preset), tokenizer), model)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def way(batch_size: int) -> Callable:
        @torch.inference_mode()
        def generate(indices: list[int], num_beams: int) -> list[str]:
            texts = []
            for start in range(0, len(indices), batch_size):
                opened = [[open_picture(paths[index])] for index in indices[start : start + batch_size]]
                prompt = processor.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False)
                inputs = processor(
                    images=opened, text=[prompt] * len(opened), padding=True, padding_side="left", return_tensors="pt"
                ).to(model.device, model.dtype)
                generated = model.generate(
                    **inputs,
                    max_new_tokens=MAX_NEW_TOKENS,
                    num_beams=num_beams,
                    do_sample=False,
                    eos_token_id=end_of_turn,
                    pad_token_id=tokenizer.pad_token_id,
                )
                answers = generated[:, inputs["input_ids"].shape[1] :]
                texts += [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
            return texts

        return generate

    return {"one by one": way(1), "batched": way(BATCH_SIZE)}
