"""Watching: which share of attention every layer and head gives to every modality, in any model."""

from .attention_call import AttentionCall as AttentionCall
from .attention_record import AttentionRecord as AttentionRecord
from .recording_session import RecordingSession as RecordingSession
from .token_labels import LabeledKeys as LabeledKeys
from .watch_context import labels_for as labels_for
from .watch_context import open_session as open_session
from .watch_context import watch as watch
