"""Distillation losses on plain tensors; no model class is known here."""

from pruning_core.distillation.detections import DetectionDistillation, Detections
from pruning_core.distillation.divergences import DISTILLATIONS, Distillation
from pruning_core.distillation.outputs import LogitDistillation, Outputs

__all__ = ["DISTILLATIONS", "DetectionDistillation", "Detections", "Distillation", "LogitDistillation", "Outputs"]
