"""The operators: documented, differentiable functions, native where there is a kernel."""

from mann_ext.ops.content import ContentRead, content_read
from mann_ext.ops.lrua import HISTORY_BUDGET, LRUAScanOutput, lrua_scan, lrua_step

__all__ = [
    "HISTORY_BUDGET",
    "ContentRead",
    "LRUAScanOutput",
    "content_read",
    "lrua_scan",
    "lrua_step",
]
