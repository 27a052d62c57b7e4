"""Code that diffusers loads from an exported generator; :mod:`rae.formats.single_file` makes one file of each module here.

The rest of the library does not import these modules: they need diffusers, which ``rae`` does not depend on.
"""
