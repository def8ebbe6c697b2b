"""Export: a trained adapter -> a folder for others, as a stock Llava or as a merged [`VisionQwen`].

Stage: after training; called by the command line. LoRA is added to the decoder's weights, and what was written is
loaded again and compared with its source before it gets its name.

A Llava folder needs nothing of ours: `LlavaForConditionalGeneration` and `LlavaProcessor` of transformers load it, and
so do the servers that know them. Its weights have the names of the `llava-hf` repositories, which vLLM needs. Its
vision tower ends at the highest layer that is read, as ours does: the same features, no weights that nobody runs, and
no need of the encoder's own checkpoint.
"""

# transformers declares sub-configurations as `dict | PreTrainedConfig | None`, torch a model's methods as `Tensor`.
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..drafts import draft_of, sweep
from ..hub.access import is_hub_id
from ..hub.licences import common_licence, licence_line, stated_licence
from ..hub.markup import markdown
from ..model.configuration_vision_qwen import VisionQwenConfig
from ..model.modeling_vision_qwen import VisionQwen, base_model
from ..model.processing_vision_qwen import VisionQwenProcessor
from ..tasks import TASK_FILE, TaskSettings
from .folder import is_adapter_folder
from .loading import load_model
from .scale import at_scale

# Of a task that has no instruction of its own.
_QUESTION = "Describe the picture."
_PROBE_TOKENS = 16
# Relative to the largest logit. On a CPU all of them are 0 as a rule; another thread or kernel may round differently.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Adding LoRA to the weights rounds differently than adding its output.
_MERGE_TOLERANCE = 1e-4
# In `llava-hf` repositories these towers have a prefix that transformers has dropped; vLLM 0.32 loads none without.
_TOWERS_WITH_PREFIX = ("clip_vision_model", "siglip_vision_model")
# Llava gives a tower pictures and nothing else; these need more.
_TOWERS_WITH_ARGUMENTS = ("siglip2_vision_model", "vit_mae")


def export_llava(
    folder: str | Path,
    output: str | Path,
    *,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Path:
    """Writes a stock `LlavaForConditionalGeneration` with its `LlavaProcessor`, which load without this package.

    Two-layer projectors map one to one. A linear projector becomes the first layer, followed by no activation
    (`"linear"`) and the identity, which changes no bit. Several layers, the class token, SigLIP's missing one and a
    projector without bias have their fields in `LlavaConfig`. A placeholder outside the decoder's vocabulary gets rows
    that are the mean of all others, since Llava embeds it: its logit is the mean of the others and never the largest.

    Args:
        folder (`str` or `Path`): Adapter folder, or a full save of a [`VisionQwen`].
        output (`str` or `Path`): Folder to write; must not exist or be empty.
        vision, text (`str` or `Path`, *optional*): Where an adapter's bases lie when they moved.
        dtype (`torch.dtype`, *optional*): Of the weights; float32 for an adapter, as stored for a full save. LoRA is
            added in float32 and the sum is rounded once.
        scale (`float`, *optional*): So much of LoRA is added, 0..1; see [`~vlm_peft.adapters.scale.at_scale`].

    Returns:
        `Path`: `output`.

    Raises:
        FileExistsError: When `output` holds something.
        FileNotFoundError: When the folder or one of its bases is not there.
        ValueError: When stock Llava cannot express the model, names what; or the reloaded model answers differently.
    """
    output = check_output(output)
    source = _load_source(Path(folder), vision, text, dtype, check_llava, scale)
    with _new_folder(output) as partial:
        to_llava(source.model).save_pretrained(partial)
        processor = _to_llava_processor(source)
        processor.save_pretrained(partial)
        # transformers before 5 and some servers look for it under this name only.
        processor.image_processor.save_pretrained(partial)
        write_card(source, partial, output.name, _check_reload(source, partial), is_llava=True)
    return output


def export_merged(
    folder: str | Path,
    output: str | Path,
    *,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Path:
    """Writes a full [`VisionQwen`] with LoRA added to its weights, whatever its joint is; needs `import vlm_peft`.

    Args:
        folder, output, vision, text, dtype, scale: As for [`export_llava`].

    Returns:
        `Path`: `output`.

    Raises:
        FileExistsError: When `output` holds something.
        FileNotFoundError: When the folder or one of its bases is not there.
        ValueError: When the folder holds no [`VisionQwen`], or the reloaded model answers differently.
    """
    output = check_output(output)
    source = _load_source(Path(folder), vision, text, dtype, scale=scale)
    with _new_folder(output) as partial:
        source.model.save_pretrained(partial)
        source.processor.save_pretrained(partial)
        if (source.folder / TASK_FILE).is_file():
            shutil.copyfile(source.folder / TASK_FILE, partial / TASK_FILE)
        write_card(source, partial, output.name, _check_reload(source, partial), is_llava=False)
    return output


def check_llava(config: VisionQwenConfig) -> None:
    """Refuses what stock Llava has no field for.

    Args:
        config ([`VisionQwenConfig`]): Of the adapter or the full save.

    Raises:
        ValueError: Names every setting that cannot be mapped, and what to do.
    """
    lacking = []
    kind = config.vision_config.model_type
    if config.projector_type not in ("linear", "mlp"):
        lacking.append(f"projector_type={config.projector_type!r}")
    if not config.vision_tower_is_cut or kind in _TOWERS_WITH_ARGUMENTS:
        lacking.append(f"encoder of the type {kind}")
    if config.needs_interpolation:
        lacking.append(f"image_size={config.image_size}, which needs {kind}'s position embeddings interpolated")
    if config.pixel_shuffle_factor > 1:
        lacking.append(f"pixel_shuffle_factor={config.pixel_shuffle_factor}")
    if config.projector_layer_norm:
        lacking.append("projector_layer_norm=True")
    if config.num_prefix_tokens > 1 and not config.keep_class_token:
        lacking.append(f"keep_class_token=False with {config.num_prefix_tokens} class and register tokens")
    if config.tie_word_embeddings and not _has_llavas_embedding(config):
        lacking.append(f"a decoder of the type {config.text_config.model_type} with tied embeddings")
    if lacking:
        raise ValueError(
            f"Stock Llava has no {' and no '.join(lacking)}: export with --to merged, which loads with "
            "AutoModelForImageTextToText after `import vlm_peft`, or train without it."
        )


def _has_llavas_embedding(config: VisionQwenConfig) -> bool:
    """Whether the decoder's embedding is where Llava ties the head to; GPT-2, OPT and BLOOM have it elsewhere."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(config.text_config)
    return hasattr(decoder, "embed_tokens")


@dataclass(frozen=True)
class _Source:
    """The merged model, what belongs to it, and how it answers about one picture."""

    folder: Path
    model: VisionQwen
    processor: VisionQwenProcessor
    instruction: str
    merge_difference: float | None
    answer: "_Answer"


@dataclass(frozen=True)
class _Answer:
    """Token ids of the prompt `(1, T)`, logits `(1, T, V)`, and prompt and greedy answer together `(1, T + ...)`."""

    input_ids: torch.Tensor
    logits: torch.Tensor
    generated: torch.Tensor


def check_output(output: str | Path) -> Path:
    """The folder to write.

    Raises:
        FileExistsError: When it holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already and not empty: name another folder, or remove it first.")
    return output


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed when something goes wrong before."""
    sweep(output.parent, output.name)
    partial = draft_of(output)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _load_source(
    folder: Path,
    vision: str | Path | None,
    text: str | Path | None,
    dtype: torch.dtype | None,
    check: Callable[[VisionQwenConfig], None] | None = None,
    scale: float | None = None,
) -> _Source:
    """Loads an adapter with its bases, or a full save, as a plain model.

    Args:
        check (`Callable`, *optional*): Sees the configuration before anything is computed.
        scale (`float`, *optional*): Of an adapter's LoRA.

    Raises:
        ValueError: When the merged model answers differently than the adapter.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected the folder of a trained model, and {folder} is not there.")
    is_adapter = is_adapter_folder(folder)
    loaded, processor = load_model(
        folder, vision=vision, text=text, dtype=torch.float32 if is_adapter else dtype or "auto"
    )
    if check is not None:
        check(base_model(loaded).config)
    settings = TaskSettings.read(folder) or TaskSettings()
    instruction = settings.instruction or _QUESTION
    with nullcontext() if scale is None else at_scale(loaded, scale):
        model, merge_difference = _merge(loaded, processor, instruction) if is_adapter else (loaded, None)
    # `model.to` would round the frequencies of the rotary embedding, too, which loading never does.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        eos_token_id=processor.end_of_turn_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=model.config.text_config.bos_token_id,
        # As `VisionQwen.generate` does: a picture is never asked for in an answer.
        suppress_tokens=[model.config.image_token_id],
    )
    answer = _ask(model, processor, instruction)
    return _Source(folder, model, processor, instruction, merge_difference, answer)


def _merge(adapted: PeftModel, processor: VisionQwenProcessor, instruction: str) -> tuple[VisionQwen, float]:
    """Adds LoRA to the decoder's weights, in their dtype.

    Returns:
        The plain model, and the largest difference that it makes to a logit, as a share of the largest one.
    """
    inputs = _probe(processor, instruction)
    with torch.inference_mode():
        expected = adapted(**inputs).logits
    with warnings.catch_warnings():
        # peft says that rows of turn tokens are in the embedding already, where loading has put them.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        model = adapted.merge_and_unload().eval()
    with torch.inference_mode():
        difference = _relative(model(**inputs).logits, expected)
    if not difference <= _MERGE_TOLERANCE:
        raise ValueError(
            f"The merged model's logits differ from the adapter's by {difference:.1e} of the largest one, expected at "
            f"most {_MERGE_TOLERANCE:.0e}: its weights are not finite, or of a kind that cannot be merged."
        )
    return model, difference


def to_llava(model: VisionQwen) -> LlavaForConditionalGeneration:
    """The stock model with the same weights."""
    config = model.config
    vision_config, text_config = config.vision_tower_config.to_dict(), config.text_config.to_dict()
    for part in (vision_config, text_config):
        # Where the parts lay on this machine, and in which dtype, is not what is written.
        part.pop("_name_or_path", None)
        part["dtype"] = str(model.dtype).removeprefix("torch.")
    for field in ("out_features", "out_indices", "stage_names"):
        # DINOv2 names its layers here, those that are not built, too.
        vision_config.pop(field, None)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    missing_rows = config.image_token_id + 1 - config.text_config.vocab_size
    if missing_rows > 0:
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                rows = weights[name].mean(dim=0, keepdim=True).expand(missing_rows, -1)
                weights[name] = torch.cat([weights[name], rows])
        text_config["vocab_size"] += missing_rows
    # vLLM builds the decoder from this name.
    text_config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config["model_type"]]]

    projector = model.model.multi_modal_projector
    hidden_act = config.projector_hidden_act
    if config.projector_type == "linear":
        hidden_act = "linear"
        name = "model.multi_modal_projector.linear_2"
        width = projector.linear_1.out_features
        weights[f"{name}.weight"] = torch.eye(width, dtype=model.dtype)
        if config.projector_bias:
            weights[f"{name}.bias"] = torch.zeros(width, dtype=model.dtype)

    depth = max(config.hidden_state_indices)
    layers = [index - depth - 1 for index in config.hidden_state_indices]
    llava_config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=config.image_token_id,
        image_seq_length=config.num_image_tokens,
        projector_hidden_act=hidden_act,
        multimodal_projector_bias=config.projector_bias,
        vision_feature_layer=layers[0] if isinstance(config.vision_feature_layer, int) else layers,
        vision_feature_select_strategy=select_strategy(config),
        tie_word_embeddings=config.tie_word_embeddings,
    )
    llava = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=llava_config,
        state_dict={_hub_name(name, config): weight for name, weight in weights.items()},
        dtype=model.dtype,
    )
    llava.generation_config = model.generation_config
    return llava


def _hub_name(name: str, config: VisionQwenConfig) -> str:
    """A weight's name in `llava-hf` repositories; transformers reads it, and writes what it has read."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    if config.vision_config.model_type in _TOWERS_WITH_PREFIX:
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def select_strategy(config: VisionQwenConfig) -> str:
    """`"default"` drops the first token of the tower, `"full"` none."""
    return "full" if config.keep_class_token or not config.num_prefix_tokens else "default"


def _to_llava_processor(source: _Source) -> LlavaProcessor:
    """The stock processor that renders the same text and counts the same tokens."""
    config, processor = source.model.config, source.processor
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=select_strategy(config),
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=config.num_prefix_tokens,
    )


def _probe(processor: ProcessorMixin, instruction: str) -> dict[str, torch.Tensor]:
    """Model inputs of a prompt with one picture: a wide one with an edge in each channel, the same every time."""
    shades = [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]
    picture = Image.merge("RGB", shades).resize((320, 200))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": instruction}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.inference_mode()
def _ask(model: PreTrainedModel, processor: ProcessorMixin, instruction: str) -> _Answer:
    inputs = _probe(processor, instruction)
    generated = model.generate(**inputs, max_new_tokens=_PROBE_TOKENS, num_beams=1)
    return _Answer(inputs["input_ids"], model(**inputs).logits, generated)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; not a number when a value is none."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _check_reload(source: _Source, written: Path) -> float:
    """Loads what was written and compares its answer with the source's.

    Returns:
        `float`: Largest difference of two logits as a share of the largest one.

    Raises:
        ValueError: When the prompt, the logits or the greedy answer differ.
    """
    model = AutoModelForImageTextToText.from_pretrained(written).eval()
    answer = _ask(model, AutoProcessor.from_pretrained(written), source.instruction)
    expected = source.answer
    if not torch.equal(answer.input_ids, expected.input_ids):
        raise ValueError(
            f"The exported processor makes {answer.input_ids.shape[1]} tokens of a prompt, the source's "
            f"{expected.input_ids.shape[1]}, and not the same ones: the export was given up."
        )
    difference = _relative(answer.logits[..., : expected.logits.shape[-1]], expected.logits)
    if not difference <= _TOLERANCE[source.model.dtype] or not torch.equal(answer.generated, expected.generated):
        raise ValueError(
            f"The exported model answers differently than {source.folder}: its logits differ by {difference:.1e} of "
            f"the largest one, expected at most {_TOLERANCE[source.model.dtype]:.0e} and the same greedy answer. The "
            "export was given up."
        )
    return difference


def write_card(source: _Source, written: Path, title: str, difference: float, *, is_llava: bool) -> None:
    """The folder's README.md: where it comes from, how it loads, and what was measured."""
    card = source.folder / "README.md"
    known = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    bases = _bases(source)
    data = ModelCardData(
        license=known.get("license") or common_licence(licence for _, _, licence in bases),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        datasets=known.get("datasets"),
        base_model=[name for _, name, _ in bases if "/" in name] or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vlm_peft", "vision-language", *(["llava"] if is_llava else [])],
    )
    kind = "A stock `LlavaForConditionalGeneration`" if is_llava else "A `VisionQwen` with all its weights"
    merged = "; LoRA was added to the decoder's weights" if source.merge_difference is not None else ""
    parts = json.dumps([{"type": "image", "url": "picture.jpg"}, {"type": "text", "text": source.instruction}])
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown(title)}\n",
        f"{kind}, exported with vlm_peft{merged}. It is made of\n",
        *(licence_line(part, name, licence) for part, name, licence in bases),
        "\n```python",
        "from transformers import pipeline" if is_llava else "import vlm_peft\nfrom transformers import pipeline",
        'ask = pipeline("image-text-to-text", model="THIS_FOLDER_OR_ID")',
        f"parts = {parts}",
        'print(ask(text=[{"role": "user", "content": parts}], return_full_text=False)[0]["generated_text"])',
        "```\n",
        f"Texts of users may hold `{source.processor.end_of_turn_token}` and the like: with",
        "`sanitize_control_tokens=True`, `apply_chat_template` keeps them text.\n",
        "| measured by the export, on one picture and a CPU | |",
        "|---|---|",
        f"| parameters | {sum(parameter.numel() for parameter in source.model.parameters()):,} |",
        f"| dtype | {str(source.model.dtype).removeprefix('torch.')} |",
        f"| tokens a picture | {source.model.config.num_image_tokens} |",
        f"| largest difference of a logit, this folder against its source | {difference:.1e} |",
    ]
    if source.merge_difference is not None:
        lines.append(f"| likewise, source with LoRA added against beside its weights | {source.merge_difference:.1e} |")
    lines.append(
        f"\nDifferences are shares of the largest logit. transformers {transformers.__version__}, torch "
        f"{torch.__version__}.\n"
    )
    (written / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _bases(source: _Source) -> list[tuple[str, str, str | None]]:
    """Encoder and decoder: part, name and stated licence. Of a folder only the last name."""
    config, recorded = source.model.config, VisionQwenConfig.from_pretrained(source.folder)
    bases = []
    for part, field in (("encoder", "vision"), ("decoder", "text")):
        # An adapter records what it was trained on; what was loaded may be a copy of that.
        loaded, trained_on = (getattr(each, f"{field}_name_or_path") for each in (config, recorded))
        if loaded is not None:
            is_id = trained_on is not None and is_hub_id(trained_on) and not Path(trained_on).exists()
            licence = stated_licence(loaded, revision=getattr(config, f"{field}_revision"))
            bases.append((part, trained_on if is_id else Path(loaded).name, licence))
    return bases
