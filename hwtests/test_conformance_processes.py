"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_processes import *  # noqa: F403
