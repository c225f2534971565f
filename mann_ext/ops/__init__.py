"""The operators: documented, differentiable functions, native where there is a kernel."""

from mann_ext.ops.content import ContentRead, content_read
from mann_ext.ops.coordinate_lstm import coordinate_lstm
from mann_ext.ops.lrua import HISTORY_BUDGET, LRUAScanOutput, lrua_scan, lrua_step
from mann_ext.ops.lstm import LSTMScanOutput, lstm_scan
from mann_ext.ops.lstm_lrua import LSTMLRUAScanOutput, lstm_lrua_scan
from mann_ext.ops.ntm import NTMScanOutput, ntm_scan
from mann_ext.ops.relu_pool import relu_pool

__all__ = [
    "HISTORY_BUDGET",
    "ContentRead",
    "LRUAScanOutput",
    "LSTMLRUAScanOutput",
    "LSTMScanOutput",
    "NTMScanOutput",
    "content_read",
    "coordinate_lstm",
    "lrua_scan",
    "lrua_step",
    "lstm_lrua_scan",
    "lstm_scan",
    "ntm_scan",
    "relu_pool",
]
