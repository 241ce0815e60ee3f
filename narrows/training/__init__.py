"""Training hooks for plain torch loops that end in a channel plan: gates, losses, parameter groups.

A gate learns which channels a layer needs while the model is trained; its plan goes to
`narrows.apply`. Nothing here owns a loop. Import it by name, ``from narrows import training``:
``import narrows`` leaves it alone.
"""

from narrows.training.annealed import AnnealedMasks
from narrows.training.attended_ratios import AttendedRatios
from narrows.training.footprint import Footprint
from narrows.training.gates import Gates
from narrows.training.generated import GeneratedGates, LatencyPredictor
from narrows.training.gumbel import GumbelGates
from narrows.training.losses import (
    channel_wise,
    distillation,
    self_supervised,
    spatial_attention,
    stability,
)
from narrows.training.norm_sparsity import NormSparsity
from narrows.training.parameter_groups import follow
from narrows.training.pdp import DifferentiableMasks, element_mask
from narrows.training.predictors import Predictors
from narrows.training.schedules import Ramp, Sawtooth, Tent
from narrows.training.searched_widths import SearchedWidths
from narrows.training.soft_masks import SoftMasks

__all__ = [
    "AnnealedMasks",
    "AttendedRatios",
    "DifferentiableMasks",
    "Footprint",
    "Gates",
    "GeneratedGates",
    "GumbelGates",
    "LatencyPredictor",
    "NormSparsity",
    "Predictors",
    "Ramp",
    "Sawtooth",
    "SearchedWidths",
    "SoftMasks",
    "Tent",
    "channel_wise",
    "distillation",
    "element_mask",
    "follow",
    "self_supervised",
    "spatial_attention",
    "stability",
]
