"""Tests that run on a real kernel: in the lab's emulated machines, or on a POWER host.

pytest hwtests --lab powernv8 --lab powernv8-64k      in the guest, reported on the host test by test
pytest hwtests --device 0001:01:00.0                  here, on this POWER host: only the tests that are safe
"""
