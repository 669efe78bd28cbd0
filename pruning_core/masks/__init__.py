"""Masks: zeroes weights while training goes on."""

from pruning_core.masks.pruning import Pruning as Pruning
