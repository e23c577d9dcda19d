"""Speed, beside other detectors and other ways to do the same."""
