"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_core_viability import *  # noqa: F403
