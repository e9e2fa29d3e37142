"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_nvme_freeze import *  # noqa: F403
