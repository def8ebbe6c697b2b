"""Parameter-efficient fine-tuning of small vision-language models on the Hugging Face stack.

Importing the package registers its classes with `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor`.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_vision_qwen import VisionQwenConfig
    from .modeling_vision_qwen import VisionQwen, VisionQwenModel
    from .processing_vision_qwen import VisionQwenProcessor

__version__ = "0.1.0"
__all__ = ["VisionQwen", "VisionQwenConfig", "VisionQwenModel", "VisionQwenProcessor", "__version__"]


def _is_command() -> bool:
    """Whether this process runs `vlm-peft` or `python -m vlm_peft`."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    # While `python -m` looks for its module, "-m" stands in for the script; the module's name precedes its arguments.
    return Path(script).stem == "vlm-peft" or (script == "-m" and sys.orig_argv[-len(sys.argv)] == __name__)


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in ("attention", "configuration_vision_qwen", "modeling_vision_qwen", "processing_vision_qwen"):
        found = vars(import_module(f"{__name__}.{module}"))
        globals().update({public: found[public] for public in __all__ if public in found})
    return globals()[name]


# transformers' Auto classes know only what was registered before they are called, so `import vlm_peft` loads torch and
# registers. The command alone waits until it needs a model: --help and a misspelt option take no seconds.
if not _is_command():
    __getattr__("VisionQwen")
