"""What takes a device away until the next boot: after all tests that need it."""

from simtests.conformance.test_eeh_unrecoverable import *  # noqa: F403
