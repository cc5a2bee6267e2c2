"""Cross-modal search: an index over a shared space, and the gallery of what was found."""

from .gallery import gallery as gallery
from .index import Entry as Entry
from .index import Found as Found
from .index import Hit as Hit
from .index import Index as Index
from .index import captions_of as captions_of
from .index import folder_of as folder_of
from .index import pictures_of as pictures_of
from .kept import kept as kept
