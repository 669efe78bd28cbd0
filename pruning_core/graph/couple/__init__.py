"""Labels become groups: what lives and dies together, what must go in equal number, and a trial that proves it."""
