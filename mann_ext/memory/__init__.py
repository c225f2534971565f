"""Memories as modules: they own parameters, map inputs to operator arguments, and return reads."""

from mann_ext.memory.lrua import LRUAMemory, LRUAMemoryTrace, LRUAState

__all__ = ["LRUAMemory", "LRUAMemoryTrace", "LRUAState"]
