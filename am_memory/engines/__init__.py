"""Engines run models: one package for each kind of engine, all behind the protocols of `base`."""
