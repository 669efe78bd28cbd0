"""Cuts exactly what a plan says, compares the cut model with the masked one, and takes everything back if they differ."""
