"""Guards the speed of the engine's data path: short cases, each beside its limit and beside a committed reference.

    python -m benchmarks.guard --json guard.json

takes about two minutes on one GPU. Run it before and after every change to the data path. Each case loads a model with
random weights, runs a few steps, and calibrates the machine before and after: efficiency is the limit of those steps by
that calibration over their time, hence it hardly depends on a bus that is slower today.

The reference is `benchmarks/results/guard/KIND.json`, KIND being the GPU's name (nvidia-h200). A case that lost more
than `--within` of the reference's efficiency (default: 0.02), and whose step takes as much longer, is a fault: a slower
bus changes the step alone, and a disturbed calibration the efficiency alone. A disturbance only ever makes a case
slower, so one that seems to have lost is measured again, at most `--repeats` times in all (default: 2), and the best
counts. `--save` measures every case `--repeats` times and makes the best of each the reference.

Exit status: 0, nothing lost (or nothing to compare with, as a line says); 1, a case lost, or could not be measured; 2,
there is no GPU, or the options are wrong.

A new case is one more entry in `cases.CASES`; until it is saved, it has no reference and is no fault.
"""
