"""Parameter-efficient fine-tuning of small vision-language models on the Hugging Face stack.

Importing the package registers its classes with `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor`.
"""

from . import attention as attention
from .configuration_vision_qwen import VisionQwenConfig
from .modeling_vision_qwen import VisionQwen, VisionQwenModel
from .processing_vision_qwen import VisionQwenProcessor

__version__ = "0.1.0"
__all__ = ["VisionQwen", "VisionQwenConfig", "VisionQwenModel", "VisionQwenProcessor", "__version__"]
