"""Wing 1: zeroes weights while training goes on."""

from pruning_core.masks.driver import Pruning as Pruning
