"""Cuts what a plan says, compares the cut model with the masked one, and rolls back if they differ."""
