"""Parameter-efficient fine-tuning of small vision-language models on the Hugging Face stack.

Importing the package registers its classes with `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor`.
"""

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.configuration_vision_qwen import VisionQwenConfig
    from .model.modeling_vision_qwen import VisionQwen, VisionQwenModel
    from .model.processing_vision_qwen import VisionQwenProcessor

__version__ = "0.1.0"
__all__ = ["VisionQwen", "VisionQwenConfig", "VisionQwenModel", "VisionQwenProcessor", "__version__"]


def _is_command() -> bool:
    """Whether this process runs `vlm-peft`, `python -m vlm_peft`, or a script of the clone's `eval/` or `recipes/`."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    # While `python -m` looks for its module, "-m" stands in for the script; the module's name precedes its arguments.
    if Path(script).stem == "vlm-peft" or (script == "-m" and sys.orig_argv[-len(sys.argv)] == __name__):
        return True
    clone = Path(__file__).resolve().parents[1]
    return bool(script) and Path(script).resolve().parent in (clone / "eval", clone / "recipes")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in ("attention", "configuration_vision_qwen", "modeling_vision_qwen", "processing_vision_qwen"):
        found = vars(import_module(f"{__name__}.model.{module}"))
        globals().update({public: found[public] for public in __all__ if public in found})
    return globals()[name]


# bitsandbytes says on its import, which is peft's and TRL's, too, that a faster 4-bit kernel could be had from the Hub.
# Nothing here uses it, and nobody can act on it. A filter on its logger must be there before it speaks.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

# transformers' Auto classes know only what was registered before they are called, so `import vlm_peft` loads torch and
# registers. Commands alone wait until they need a model: --help, a misspelt option and a score take no seconds.
if not _is_command():
    __getattr__("VisionQwen")
