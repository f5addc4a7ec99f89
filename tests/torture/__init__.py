"""Random torture of a database by real processes: `python -m tests.torture --minutes 20`.

Writers, readers and a janitor work on one directory while a conductor kills, stops, interrupts and restarts them at
random. Every value is known from its address alone, so every one that is read anywhere is checked; what was
acknowledged stands in journals, so what is lost is noticed.
"""
