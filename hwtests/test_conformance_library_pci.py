"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_library_pci import *  # noqa: F403
