"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_core_container import *  # noqa: F403
