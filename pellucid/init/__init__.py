"""How a network begins: initial weights by formula or by data, and a study of what they do.

The layers meant throughout are Linear and the convolutions of any rank, transposed ones too.
Normalisation, embeddings, recurrent layers and torch's attention keep what they have.
"""

from .by_data import LSUVReport, lsuv
from .by_formula import fans, init_kaiming, init_orthogonal, init_xavier
from .identity import init_identity
from .residual import fixup
from .study import InitStudy, LayerStudy, study_init
from .whitening import whiten

__all__ = [
    "InitStudy",
    "LSUVReport",
    "LayerStudy",
    "fans",
    "fixup",
    "init_identity",
    "init_kaiming",
    "init_orthogonal",
    "init_xavier",
    "lsuv",
    "study_init",
    "whiten",
]
