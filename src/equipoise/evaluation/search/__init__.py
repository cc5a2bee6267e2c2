"""Cross-modal search: an index over the embeddings of a dual encoder, and a gallery page of the results."""

from .embedding_cache import cached_embeddings as cached_embeddings
from .gallery_images import result_gallery as result_gallery
from .search_index import IndexEntry as IndexEntry
from .search_index import SearchHit as SearchHit
from .search_index import SearchIndex as SearchIndex
from .search_index import SearchResult as SearchResult
from .search_index import caption_entries as caption_entries
from .search_index import image_entries as image_entries
from .search_index import index_folder as index_folder
from .table_gallery import TableGallery as TableGallery
