"Callbacks: one concern a file."

from learner.callbacks.accumulate import Accumulate
from learner.callbacks.activations import ActivationStats
from learner.callbacks.clip import ClipGradients
from learner.callbacks.compile import Compile
from learner.callbacks.ema import EMA
from learner.callbacks.fine_tune import FineTune, fine_tune
from learner.callbacks.lr_finder import LRFinder, lr_find
from learner.callbacks.mix import Mix
from learner.callbacks.one_cycle import OneCycle
from learner.callbacks.precision import MixedPrecision
from learner.callbacks.progress import Progress
from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults

__all__ = [
    "EMA",
    "Accumulate",
    "ActivationStats",
    "ClipGradients",
    "Compile",
    "FineTune",
    "LRFinder",
    "Mix",
    "MixedPrecision",
    "OneCycle",
    "Progress",
    "SetupLearner",
    "TrackResults",
    "fine_tune",
    "lr_find",
]
