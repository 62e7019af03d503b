"""Presets: studies that ship with kdprof, one TOML file each, which :mod:`kdprof.study` reads.

Here are settings of published recipes and of examples; never code, weights or data.
"""
