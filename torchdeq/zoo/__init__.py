"""Models: one file each, in the public names of torchdeq only."""
