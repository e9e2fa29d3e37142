"""The lab: real Debian kernels on QEMU's emulated POWER machines, with this checkout inside.

    python -m hwtests.lab run powernv8 -- COMMAND       run a command in the guest; its output and exit status
    python -m hwtests.lab shell powernv8                a root shell there
    python -m hwtests.lab targets                       what there is to boot
    pytest hwtests --lab powernv8                       the hardware tests, reported here test by test

It needs an apt that knows a Debian mirror (or VFIO_LAB_MIRROR with the URL of one) and the package qemu-system-ppc.
Nobody needs to be root. Images are built once, in about half a minute, under ~/.cache/vfio-lab (XDG_CACHE_HOME moves
it); a bare machine is then up in 5 to 9 seconds, a pseries one in 4. `--phb 0` leaves out the other PHBs, for each of
which the firmware waits a second.

In the guest the command runs as root in /checkout, with `vfio`, `vfio_cli` and `hwtests` importable and `vfio` in
PATH; there are busybox, Python with pytest, and an ordinary user, alice. vfio-pci is loaded, no device is bound.
Nothing that the guest does outlives the run.

From the outside in: `targets` names the machines, `qemu` makes arguments of a topology, `image` and `overlay` make
the initramfs (`mirror`, `packages`, `cpio` and `bake` serve them), `machine` boots it and listens, `guest` is what it
listens to, in `frames`; `pytest_lab` and `pytest_guest` are the two halves of `pytest --lab`.
"""
