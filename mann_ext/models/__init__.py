"""Networks with one interface: MANN around the memory, and the baselines it is compared with."""

from mann_ext.models.baselines import LSTM, FeedForward
from mann_ext.models.controllers import ControllerState, FeedForwardController, LSTMController
from mann_ext.models.mann import MANN, MANNState
from mann_ext.models.metanet import MetaNet

__all__ = [
    "LSTM",
    "MANN",
    "ControllerState",
    "FeedForward",
    "FeedForwardController",
    "LSTMController",
    "MANNState",
    "MetaNet",
]
