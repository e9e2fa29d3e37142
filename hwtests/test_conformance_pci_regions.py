from simtests.conformance.test_pci_regions import *  # noqa: F403
