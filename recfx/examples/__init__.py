"""Programs: `python -m recfx.examples.deepfm --help`."""
