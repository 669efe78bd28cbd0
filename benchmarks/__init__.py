"""Side-by-side measurements. Each prints ratios, so that the machine it ran on matters little."""
