from simtests.conformance.test_pci_info import *  # noqa: F403
