"""What storing representations saves and costs, as curves with fitted exponents: `python -m benchmarks.plots`."""
