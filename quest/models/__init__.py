"""Models that the comparison trains, written with plain ``nn.Linear`` layers."""

from quest.models.llama import SIZES, Llama, LlamaConfig, Size

__all__ = ["SIZES", "Llama", "LlamaConfig", "Size"]
