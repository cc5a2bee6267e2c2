"""Records the share of attention that each layer and head of a model gives to each modality."""

from .attention_call import AttentionCall as AttentionCall
from .attention_record import AttentionRecord as AttentionRecord
from .confirmed_labels import ConfirmedLabels as ConfirmedLabels
from .recording_session import RecordingSession as RecordingSession
from .token_labels import LabeledKeys as LabeledKeys
from .watch_context import labels_for as labels_for
from .watch_context import open_session as open_session
from .watch_context import watch as watch
