"""Pictures to maps of classes: fusion of scales and orientations, tiles, and the files that come out."""
