"""Tables of samples: reading, column kinds, splits and the modalities that the columns contain."""

from .table_manifest import Manifest as Manifest
