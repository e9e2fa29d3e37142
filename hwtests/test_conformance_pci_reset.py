from simtests.conformance.test_pci_reset import *  # noqa: F403
