"""The one exception of the lab: something outside the command under test went wrong."""


class LabError(Exception):
    """The lab cannot do what was asked; the message says why and what mends it."""
