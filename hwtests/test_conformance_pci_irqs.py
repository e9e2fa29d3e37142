from simtests.conformance.test_pci_irqs import *  # noqa: F403
