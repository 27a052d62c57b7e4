"""What diffusers loads from an exported generator; :mod:`rae.formats.single_file` makes one file of each module here.

Nothing of the library imports these modules: they need diffusers, which their reader has and ``rae`` does without.
"""
