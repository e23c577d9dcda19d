"""Programs that measure on a GPU what the paper claims; see README.md in this folder."""
