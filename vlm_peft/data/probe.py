"""Probe: whether a decoder keeps apart what is laid out together, found out on the model itself in a second or two.

Stage: joined model -> how rows are laid out in training, and how prompts are read in generation. A mask can be passed
to any decoder, but not every layer looks at it: recurrences and convolutions run over whatever stands before a token.
So nothing is believed of a name: a few synthetic texts are run together and alone, and what comes out is compared.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..model.configuration_vision_qwen import IGNORE_INDEX
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.shared_prefix import lay_out
from .collator import SharedPrefixCollator

# Tokens of the two prefixes, and of the two texts behind each: unequal, so that padding is tried, too.
_PREFIXES = (9, 6)
_TEXTS = (3, 5)

_TOLERANCE, _LOOSE_TOLERANCE = 1e-3, 0.03
"""In float32, and in fewer bits or quantized."""
_ROUNDING, _MOST = 3.0, 0.2
"""Times what rounding alone does, when that is more: it is measured, too. Beyond the second a leak could hide in it.

Random decoders of 16 layers, share of the hidden states' length: rounding moves them by 1e-6 in float32, by 0.01 to
0.2 in bfloat16 and by 0.003 to 0.5 in 8 bits; a shared prefix does as much. Recurrences move a sibling by 0.3 to 1.5.
"""
_WRONG, _FOREIGN = 0.02, 0.8
"""What rounding never does in float32, and in fewer bits; texts that have nothing in common differ by 1.4 as a rule."""


@dataclass(frozen=True)
class Layout:
    """What may stand together in a sequence of this model, and what was measured.

    Args:
        sharing (`bool`): Rows are one sequence of prefix and branches, and packed; else one text a sequence.
        sharing_prefill (`bool`): Prompts may be read as `prefix, padding, rest`, each prefix once.
        leak (`float`): How far a changed branch moves its sibling and a packed neighbour.
        difference (`float`): Of texts that are laid out as `sharing` says from each text alone.
        prefill_difference (`float`): Likewise, of texts that are read with a cache as `sharing_prefill` says.
        window (`int`, *optional*): Tokens that the narrowest layer sees.
        reason (`str`): Why rows are not shared; empty when they are.

    Figures are of last hidden states, as a share of their length (Euclidean norm): the largest of all tokens, since a
    short convolution reaches no further than the first tokens of a text.
    """

    sharing: bool
    sharing_prefill: bool
    leak: float
    difference: float
    prefill_difference: float
    window: int | None = None
    reason: str = ""

    def shares_prefill(self, length: int) -> bool:
        """Whether prefixes may be read once for sequences of `length` tokens in the end.

        A cache with windows counts the padding behind a prefix as tokens, so that what is longer than a window is read
        from its beginning.
        """
        return self.sharing_prefill and (self.window is None or length <= self.window)


def probe(model: VisionQwen | PeftModel) -> Layout:
    """How a model's rows and prompts may be laid out; tried once for each model and attention implementation.

    Raises:
        ValueError: When not even texts side by side in a batch, one a sequence, give what each text alone does.
    """
    base = base_model(model)
    found = _FOUND.setdefault(base, {})
    implementation = base.model.language_model.config._attn_implementation
    if implementation not in found:
        with _at_rest(base):
            found[implementation] = _try(base)
    return found[implementation]


_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[str, Layout]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _at_rest(model: VisionQwen) -> Iterator[None]:
    """Without dropout and gradients; modules that were in training mode are again afterwards.

    FlexAttention would be compiled for each of the shapes, which takes minutes. Its mask is the one of eager attention,
    which takes its place.
    """
    training = [module for module in model.modules() if module.training]
    decoder: Any = model.model.language_model
    is_compiled = decoder.config._attn_implementation == "flex_attention"
    if is_compiled:
        decoder.set_attn_implementation("eager")
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if is_compiled:
            decoder.set_attn_implementation("flex_attention")
        for module in training:
            module.training = True


def _try(model: VisionQwen) -> Layout:
    name, texts = _name(model), _Texts(model)
    is_exact = all(parameter.dtype == torch.float32 for parameter in model.model.language_model.parameters())
    try:
        alone = texts.alone()
        separate = _difference(texts.laid_out(sharing=False), alone)
        plain_prefill = _difference(texts.generated(sharing=False), alone)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be joined: it lacks what is needed of a decoder here ({_first_line(error)})."
        ) from error
    for what, difference in (("a batch", separate), ("a left-padded batch with a cache", plain_prefill)):
        if not difference <= (_WRONG if is_exact else _FOREIGN):
            raise ValueError(
                f"{name} cannot be joined: its texts in {what} differ from each text alone by {difference:.2g} of "
                "their hidden states' length."
            )

    together, refusal = _attempt(lambda: texts.laid_out(sharing=True))
    changed, _ = _attempt(lambda: texts.laid_out(sharing=True, changed=True))
    continued, _ = _attempt(lambda: texts.generated(sharing=True))
    leak = _difference(changed[1:], together[1:]) if together and changed else math.inf
    difference = _difference(together, alone) if together else math.inf
    prefill = _difference(continued, alone) if continued else math.inf
    reason = f"{_layers(model)} not {f'take a mask of branches ({refusal})' if refusal else 'keep branches apart'}"
    tolerance = _TOLERANCE if is_exact else _LOOSE_TOLERANCE
    sharing = max(leak, difference) <= min(max(tolerance, _ROUNDING * separate), _MOST)
    sharing_prefill = prefill <= min(max(tolerance, _ROUNDING * plain_prefill), _MOST)
    config: Any = model.model.language_model.config
    windows = [getattr(config, field, None) for field in ("sliding_window", "attention_chunk_size")]
    return Layout(
        sharing,
        sharing_prefill,
        leak,
        difference if sharing else separate,
        prefill if sharing_prefill else plain_prefill,
        min((window for window in windows if window is not None), default=None),
        "" if sharing else reason,
    )


def _attempt(run: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], str]:
    """What a run gives, or nothing and the first line of its error: decoders may raise anything at a foreign mask."""
    try:
        return run(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return [], _first_line(error)


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """See [`Layout`]; `(T, D_t)` of each text."""
    differences = torch.cat(actual) - torch.cat(expected)
    shares = differences.norm(dim=-1) / torch.cat(expected).norm(dim=-1)
    return float(shares.nan_to_num(nan=math.inf).max())


def _name(model: VisionQwen) -> str:
    return type(model.model.language_model).__name__


def _layers(model: VisionQwen) -> str:
    """The decoder as subject of a sentence, or those of its layers that are not attention."""
    kinds = dict.fromkeys(getattr(model.model.language_model.config, "layer_types", None) or ())
    others = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    return f"{_name(model)}'s {' and '.join(others)} layers do" if others else f"{_name(model)} does"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


class _Texts:
    """Two rows of synthetic tokens with two texts each, run in several ways.

    Each way gives, for each text, the last hidden states `(T, D_t)` of the positions that predict it, in float32.
    """

    def __init__(self, model: VisionQwen):
        self._trunk = model.model
        generator = torch.Generator().manual_seed(0)
        placeholder = model.config.image_token_id
        # The last tokens of a vocabulary are special ones, or padding that no text has.
        highest = min(256, model.config.text_config.vocab_size)  # type: ignore[union-attr]

        def draw(length: int) -> list[int]:
            ids = torch.randint(highest, (length,), generator=generator)
            return ids.masked_fill(ids == placeholder, 0).tolist()

        self._prefixes = [draw(length) for length in _PREFIXES]
        self._texts = [[draw(length) for length in _TEXTS] for _ in _PREFIXES]
        self._other = draw(_TEXTS[0])

    def _rows(self, changed: bool = False) -> list[list[list[int]]]:
        """Token ids of each text of each row, with its prefix; `changed` replaces the first."""
        rows = [[prefix + text for text in texts] for prefix, texts in zip(self._prefixes, self._texts, strict=True)]
        if changed:
            rows[0][0] = self._prefixes[0] + self._other
        return rows

    def _run(self, **inputs) -> Any:
        moved = {
            name: value.to(self._trunk.device) if torch.is_tensor(value) else value for name, value in inputs.items()
        }
        return self._trunk(**moved)

    def alone(self) -> list[torch.Tensor]:
        """Each text by itself, from its beginning."""
        states = []
        for row in self._rows():
            for ids, length in zip(row, _TEXTS, strict=True):
                output = self._run(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
                states.append(output.last_hidden_state[0, -length:].float())
        return states

    def laid_out(self, *, sharing: bool, changed: bool = False) -> list[torch.Tensor]:
        """As the collator lays them out, packed into one sequence where it shares."""
        rows = []
        for prefix, texts in zip(self._prefixes, self._rows(changed), strict=True):
            unlabelled = [IGNORE_INDEX] * len(prefix)
            layout = lay_out([(ids, unlabelled + ids[len(prefix) :]) for ids in texts])
            rows.append({**vars(layout), "image_ids": []})
        together = sum(len(row["input_ids"]) for row in rows)
        collate = SharedPrefixCollator(0, lambda ids: {}, max_length=together, packing=True, sharing=sharing)
        batch = {name: value for name, value in collate(rows).items() if "labels" not in name}
        states = self._run(**batch, use_cache=False).last_hidden_state[0].float()
        return list(states.split(_TEXTS * len(rows)))

    def generated(self, *, sharing: bool) -> list[torch.Tensor]:
        """With a cache: read up to the last token but one, then a step; prefixes once when `sharing`."""
        owners = torch.tensor([row for row, texts in enumerate(self._texts) for _ in texts])
        sequences = [ids[:-1] for row in self._rows() for ids in row]
        if sharing:
            cut = [length - 1 for length in _PREFIXES for _ in _TEXTS]
            prefix_ids, prefix_mask = _left_pad([prefix[:-1] for prefix in self._prefixes])
            output = self._run(
                input_ids=prefix_ids, attention_mask=prefix_mask, position_ids=_positions(prefix_mask), use_cache=True
            )
            cache = output.past_key_values
            cache.reorder_cache(owners.to(self._trunk.device))
            rest_ids, rest_mask = _left_pad([ids[start:] for ids, start in zip(sequences, cut, strict=True)])
            ids = torch.cat([prefix_ids[owners], rest_ids], dim=1)
            mask = torch.cat([prefix_mask[owners], rest_mask], dim=1)
            start = prefix_ids.shape[1]
        else:
            ids, mask = _left_pad(sequences)
            cache, start = None, 0
        states = []
        for stop in (ids.shape[1] - 1, ids.shape[1]):
            output = self._run(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=_positions(mask)[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            states.append(output.last_hidden_state.float())
            cache, start = output.past_key_values, stop
        whole = torch.cat(states, dim=1)
        return [state[-length:] for state, length in zip(whole, _TEXTS * len(_PREFIXES), strict=True)]


def _left_pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, `(B, T)` each."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in sequences])
    return ids, torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in sequences])


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
