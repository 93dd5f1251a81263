"""Where tasks come from: pure samplers with a protocol card."""

from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.glyphs import glyph_metadata, glyphs
from jaxmeta.tasks.harmonic import harmonic
from jaxmeta.tasks.omniglot import omniglot, omniglot_split
from jaxmeta.tasks.sinusoid import sinusoid
from jaxmeta.tasks.splits import ClassSplit

__all__ = [
    "ClassSplit",
    "from_arrays",
    "glyph_metadata",
    "glyphs",
    "harmonic",
    "omniglot",
    "omniglot_split",
    "sinusoid",
]
