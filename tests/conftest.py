"""Settings for all tests."""

from hypothesis import settings

# A shared machine may stall any single example, and a red test must be red for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
