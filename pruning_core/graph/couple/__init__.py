"""Turns tied labels into groups of channels, balances between groups, and a trial cut that proves them."""
