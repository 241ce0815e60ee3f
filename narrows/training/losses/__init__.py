"""Losses that teach a student what a teacher knows; one file each."""

from narrows.training.losses.attention import spatial_attention
from narrows.training.losses.channel_wise import channel_wise
from narrows.training.losses.logits import distillation, stability
from narrows.training.losses.self_supervised import self_supervised

__all__ = ["channel_wise", "distillation", "self_supervised", "spatial_attention", "stability"]
