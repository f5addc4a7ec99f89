"""Random torture of a database by real processes: `python -m tests.torture --minutes 20`.

Writers, readers, a janitor, a clerk who types commands, a process that forks and one that trains and patches its model
work on one directory, of any fidelity, while a conductor kills, stops, interrupts and restarts them at random. Then
copies are damaged, and those who hold locks are stopped for good. Every value is known from its address alone, so every
one that is read anywhere is checked; what was acknowledged stands in journals, so what is lost is noticed.

| module | kind of trouble |
|---|---|
| `conductor`, `process`, `worker`, `roles` | kills, stops and interrupts while others write, read and tidy up |
| `values` | every dtype and fidelity |
| `commands` | commands of the command line, at random |
| `forks` | forks with the database open in any way |
| `tuning` | models that are trained, patched or cast between runs |
| `damage`, `large`, `catalogs` | damaged files: small stores, large ones, catalogs that decide what is computed |
| `holders`, `bystanders` | holders of locks that are stopped for good, and what all others do meanwhile |
| `rounds`, `survey`, `journal`, `report` | what is done in which order, what is found afterwards, and the sums |
"""
