from simtests.conformance.test_pci_feature import *  # noqa: F403
