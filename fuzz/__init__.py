"""Fuzz targets: every parser of foreign bytes either returns a value or raises its own typed error, never anything
else.
"""
