"""Watching: which share of attention every layer and head gives to every modality, in any model."""

from .call import Call as Call
from .labels import Labelled as Labelled
from .seen import Seen as Seen
from .session import Session as Session
from .watch import labels_for as labels_for
from .watch import opened as opened
from .watch import watch as watch
