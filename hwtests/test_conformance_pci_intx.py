"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_pci_intx import *  # noqa: F403
