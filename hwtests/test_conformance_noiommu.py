"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_noiommu import *  # noqa: F403
