"""MANN around the memory, MetaNet, and the baselines they are compared with."""

from mann_ext.models.baselines import LSTM, FeedForward
from mann_ext.models.controllers import ControllerState, FeedForwardController, LSTMController
from mann_ext.models.mann import MANN, MANNState
from mann_ext.models.metanet import MetaNet
from mann_ext.models.metric import MatchingNet, PrototypicalNet, SiameseNet

__all__ = [
    "LSTM",
    "MANN",
    "ControllerState",
    "FeedForward",
    "FeedForwardController",
    "LSTMController",
    "MANNState",
    "MatchingNet",
    "MetaNet",
    "PrototypicalNet",
    "SiameseNet",
]
