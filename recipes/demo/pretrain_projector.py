"""Align the demo's CLIP with its decoder: a linear projector in closed form, from canvases and not from the scenes.

    python recipes/demo/pretrain_projector.py --art DIR --output recipes/demo/projector

LLaVA's first stage (arXiv 2304.08485, section 4.2) trains a projector on many pictures with texts, and all its later
trainings start there. The demo's decoder has learnt to read grids of its own word embeddings (`reading_texts.py`), and
a canvas knows what each patch shows: so the projector is a ridge regression from the patches' last states to the cells
that the decoder reads, and takes seconds. The folder is an adapter of the strategy `projector`, for `--start_from`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from canvases import (
    COLOURS,
    GRID,
    IGNORED,
    PATCH,
    SIDE,
    CanvasBatches,
    CanvasMaker,
    Entry,
    load_entries,
    written_digits,
)
from emoji_art import CONCEPTS, DEFAULT_ART, HeldOutFilter, load_held_out_pairs
from peft import get_peft_model
from pretrain_clip import VENDORS, embed_pictures
from pretrain_reading import EDGE_SHARE, PLACE_SHARE, WORD_NORM, Codes
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from vlm_peft import VisionQwen, VisionQwenProcessor
from vlm_peft.adapters.folder import save_composite_config
from vlm_peft.adapters.strategies import apply_strategy, choose_strategy

HERE = Path(__file__).parent


class Targets:
    """What the decoder should read in each patch of a canvas.

    Args:
        embeddings: Of the decoder's words (V, D_t).
        tokenizer: The decoder's.
        entries: What labels stand for.
    """

    def __init__(self, embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerBase, entries: list[Entry]) -> None:
        self._embeddings, self._tokenizer, self._entries = embeddings, tokenizer, entries
        self._codes = Codes(embeddings.shape[1], 0)
        self._nouns = {c.phrase: c.noun for c in CONCEPTS}
        self._numbers = {i: entry.label for i, entry in enumerate(entries) if entry.label.isdigit()}
        self._known: dict[str, torch.Tensor] = {}

    def _word(self, word: str) -> torch.Tensor:
        """The mean of a word's embeddings, as the decoder has read it; digits have no blank before them."""
        if word not in self._known:
            ids = self._tokenizer.encode(word if word.isdigit() else f" {word}")
            self._known[word] = self._embeddings[ids].mean(0)
        return self._known[word]

    def __call__(self, labels: torch.Tensor, boxes: torch.Tensor, ground: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells (64, D_t), and which of them are known (64,): not those on a ground without a name."""
        cells = torch.zeros(len(labels), self._embeddings.shape[1])
        known = torch.zeros(len(labels), dtype=torch.bool)
        digits = written_digits(labels[None], boxes[None], self._numbers)[0].tolist()
        edges, shown = np.zeros((len(labels), 4)), np.zeros(len(labels), bool)
        for patch, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True)):
            row, column = divmod(patch, GRID)
            if label < 0:
                if label < IGNORED:
                    cells[patch], known[patch] = self._word(COLOURS[IGNORED - 1 - label]), True
                continue
            entry = self._entries[label]
            word = self._nouns[entry.texts[0]] if entry.demo else entry.label
            if label in self._numbers:
                word = str(digits[patch])
            # A long name: a mean of its tokens has lost their order.
            if len(self._tokenizer.encode(f" {word}")) > 2:
                continue
            across = min((column + 1) * PATCH, box[2]) - max(column * PATCH, box[0])
            down = min((row + 1) * PATCH, box[3]) - max(row * PATCH, box[1])
            cover = max(0.0, across) * max(0.0, down) / PATCH**2 if ground != IGNORED else 1.0
            cells[patch] = cover * self._word(word)
            if ground != IGNORED:
                cells[patch] += (1 - cover) * self._word(COLOURS[ground])
            known[patch], shown[patch], edges[patch] = True, True, np.array(box) / SIDE
        rows, columns = np.divmod(np.arange(len(labels)), GRID)
        place = np.stack([(columns + 0.5) / GRID, (rows + 0.5) / GRID], 1)
        codes = PLACE_SHARE * self._codes.of_places(place)
        codes[shown] += EDGE_SHARE * self._codes.of_edges(edges[shown])
        return cells + WORD_NORM * torch.from_numpy(codes).float(), known


@torch.no_grad()
def align(
    clip: CLIPModel, targets: Targets, maker: CanvasMaker, canvases: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The projector's weight (D_t, D_v) and bias (D_t,), and the share of the cells' variance that it explains on
    canvases kept apart.

    Patches are normalized as the projector's layer norm normalizes them.
    """
    states, cells = [], []
    for pixels, labels, boxes, grounds in CanvasBatches(maker, 64):
        found = embed_pictures(clip, pixels)[2]
        found = layer_norm(found, found.shape[-1:])
        for state, label, box, ground in zip(found, labels, boxes, grounds.tolist(), strict=True):
            cell, known = targets(label, box, ground)
            states.append(state[known])
            cells.append(cell[known])
        if len(states) >= canvases:
            break
    held = sum(map(len, states[: canvases // 10]))
    inputs, outputs = torch.cat(states).double(), torch.cat(cells).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    seen, wanted = inputs[held:], outputs[held:]
    normal = seen.T @ seen + ridge * len(seen) * torch.eye(seen.shape[1])
    solution = torch.linalg.solve(normal, seen.T @ wanted)
    left = (inputs[:held] @ solution - outputs[:held]).square().sum()
    whole = (outputs[:held] - outputs[:held].mean(0)).square().sum()
    return solution[:-1].T.float(), solution[-1].float(), 1 - float(left / whole)


def card(share: float, canvases: int) -> str:
    """The folder's README.md."""
    return f"""---
license: other
library_name: peft
---
# The demo's projector, aligned

A linear projector from the patches of `../clip` to the embeddings of `../qwen3`, to start from: `--start_from
recipes/demo/projector`. Made by `recipes/demo/pretrain_projector.py` in closed form: a ridge regression on the patches
of {canvases:,} canvases (emoji, words and digits; no picture of `../scenes`, no held-out pair, no art of `test_style`)
from their last states to the cells that the decoder has learnt to read in text. It explains {share:.1%} of the cells'
variance on canvases kept apart. Sources and licences of the art: see `../NOTICE.md`.
"""


def main() -> None:
    """Fit the projector and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--art", type=Path, default=DEFAULT_ART, help="folder of unpacked npm packs and fonts; filled")
    parser.add_argument("--clip", type=Path, default=HERE / "clip")
    parser.add_argument("--model", type=Path, default=HERE / "qwen3")
    parser.add_argument("--output", type=Path, default=HERE / "projector")
    parser.add_argument("--scenes", type=Path, default=HERE / "scenes", help="for its held-out pairs")
    parser.add_argument("--canvases", type=int, default=6000)
    parser.add_argument("--ridge", type=float, default=1e-3, help="penalty per patch, in squares of the inputs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = load_held_out_pairs(options.scenes / "held_out_pairs.json")
    entries = load_entries(options.art, VENDORS, HeldOutFilter(pairs))
    clip = CLIPModel.from_pretrained(options.clip, dtype=torch.float32).eval()
    decoder = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    embeddings = decoder.get_input_embeddings().weight.detach()
    targets = Targets(embeddings, AutoTokenizer.from_pretrained(options.model), entries)
    # Other canvases than those that the CLIP was trained on.
    maker = CanvasMaker(entries, pairs, 10**9 + options.seed, options.art)
    weight, bias, share = align(clip, targets, maker, options.canvases, options.ridge)

    model = VisionQwen.from_vision_text_pretrained(
        str(options.clip),
        str(options.model),
        vision_feature_layer=[-1],
        projector_type="linear",
        projector_layer_norm=True,
    )
    # Which token stands for a picture is known with the tokenizer.
    VisionQwenProcessor.from_vision_text_pretrained(str(options.clip), str(options.model), model.config)
    linear = next(m for m in model.model.multi_modal_projector.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    adapted = get_peft_model(model, apply_strategy(model, choose_strategy("projector")))
    fresh = options.output.with_name(options.output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    adapted.save_pretrained(fresh)
    save_composite_config(adapted, fresh)
    # Names of a clone's own folders hold wherever it lies.
    config = json.loads((fresh / "config.json").read_text())
    config |= {"vision_name_or_path": "recipes/demo/clip", "text_name_or_path": "recipes/demo/qwen3"}
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (fresh / "README.md").write_text(card(share, options.canvases))
    shutil.rmtree(options.output, ignore_errors=True)
    fresh.rename(options.output)
    print(json.dumps({"canvases": options.canvases, "explained": round(share, 4)}))


if __name__ == "__main__":
    main()
