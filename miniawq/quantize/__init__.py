"""From a dense checkpoint to an AWQ INT4 one, a decoder block at a time.

`job.quantize_checkpoint` streams the model through chapter 2 (`awq.py`) and writes the result; `journal.py`, with what
`records.py` notes on each block, lets a killed run go on, `memory.py` plans its memory, `verify.py` checks the written
files, `report.py` tells what was gained. `recipes.py` chooses between the searches of the paper and ours: `factors.py`,
`ranges.py` and, for learned codes, `streams.py`, `descent.py` and `neighbours.py` are what we add to the paper,
`grids.py` and `moments.py` its other grids and faster sums.
"""
