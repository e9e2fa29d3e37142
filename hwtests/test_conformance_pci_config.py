from simtests.conformance.test_pci_config import *  # noqa: F403
