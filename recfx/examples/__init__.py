"""Programs: `python -m recfx.examples.deepfm --help`."""

from recfx.environment import wait_briefly

wait_briefly()  # here, as it must come before any program imports torch
