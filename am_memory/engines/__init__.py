"""What runs a model: one package for each kind, all behind `base.Engine`."""
