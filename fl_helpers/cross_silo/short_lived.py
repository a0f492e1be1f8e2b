"""For a process of a run, which imports PyTorch, works for seconds and ends.

Imported before PyTorch, for its effect. What an import makes, stays: to look at it
again and again for something to free, and to take it apart at the end, takes tenths of
a second each.
"""

import atexit
import gc

gc.set_threshold(20_000, 50, 100)  # objects made between two looks; 700, 10, 10 before
atexit.register(gc.freeze)
