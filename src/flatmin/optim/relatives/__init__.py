"""The relatives of SAM that the papers compare with, each one short rule in a file of its own."""

from flatmin.optim.relatives.bsam import BSAM
from flatmin.optim.relatives.eigen_sam import EigenSAM
from flatmin.optim.relatives.esam import ESAM
from flatmin.optim.relatives.fisher_sam import FisherSAM
from flatmin.optim.relatives.friendly_sam import FriendlySAM
from flatmin.optim.relatives.gsam import GSAM
from flatmin.optim.relatives.looksam import LookSAM
from flatmin.optim.relatives.momentum_sam import MomentumSAM
from flatmin.optim.relatives.random_sam import RandomSAM
from flatmin.optim.relatives.wsam import WSAM

__all__ = [
    "BSAM",
    "ESAM",
    "GSAM",
    "WSAM",
    "EigenSAM",
    "FisherSAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "RandomSAM",
]
