"""Trust anchors that ship with the package."""
