"Callbacks: one concern a file."

from learner.callbacks.lr_finder import LRFinder
from learner.callbacks.one_cycle import OneCycle
from learner.callbacks.progress import Progress
from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults

__all__ = ["LRFinder", "OneCycle", "Progress", "SetupLearner", "TrackResults"]
