"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_pci_reset_state import *  # noqa: F403
