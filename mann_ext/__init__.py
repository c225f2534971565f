"""Memory-augmented neural networks for PyTorch."""

__version__ = "0.1.0"

from mann_ext import memory, models, ops
from mann_ext._library import backend
from mann_ext.memory import LRUAMemory, LRUAMemoryTrace, LRUAState, NTMMemory, NTMState

__all__ = [
    "LRUAMemory",
    "LRUAMemoryTrace",
    "LRUAState",
    "NTMMemory",
    "NTMState",
    "__version__",
    "backend",
    "memory",
    "models",
    "ops",
]
