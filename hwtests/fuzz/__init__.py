"""Differential fuzzing: random programs of VFIO calls, made on a real kernel and on the modelled one, compared.

    python -m hwtests.fuzz powernv8 --calls 20000          boot the lab, and say where the two answer differently
    python -m hwtests.fuzz powernv8 --seed 7 --steps 60    other programs

A program is a list of steps whose operands are symbols: the descriptor that step 3 returned, the address 4096 bytes
into buffer 1. It comes from a seed and the facts of a target (`facts`), never from results, so that one program runs
anywhere. Running it gives a record for each step: what the call returned or its errno, every byte that it changed,
the data that a device moved, and the locked memory after it. Two kernels that are alike give equal records.

In the order of use: `facts` and `program`; `generate` (with `generate_iommu` and `generate_device`) writes programs;
`execute` runs one, in the `arena` of its memory, asking the `guard` before every call; `guest` runs many in the
lab, a fresh process each; `sides` are the two kernels; `compare` finds the first difference; `shrink` makes the
program short; `render` prints it as C.
"""
