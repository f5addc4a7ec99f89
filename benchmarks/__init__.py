"""Benchmarks: ratios taken in one run, results asserted equal before they are printed."""
