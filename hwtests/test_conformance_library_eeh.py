"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_library_eeh import *  # noqa: F403
