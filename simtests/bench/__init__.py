"""What the modelled kernel costs, beside a real one.

python -m simtests.bench                        the fake alone, in this process and served
python -m simtests.bench --beside powernv8      and the same calls on a real kernel in the lab
"""
