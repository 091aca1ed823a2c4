"Data selection for fastai: train on the items that are worth a backward pass"

__version__ = "0.1.0"
