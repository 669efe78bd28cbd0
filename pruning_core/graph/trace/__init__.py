"""A run of the model, seen through labels: one for each channel of each weight."""
