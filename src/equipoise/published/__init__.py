"""Published models put to the same work as our own: CLIP and its kin at the emoji, those that write at the scenes."""

from .judge import judge as judge
from .spaces import PretrainedSpace as PretrainedSpace
from .spaces import Shown as Shown
from .writers import Writer as Writer
